"""The gradient word: per-example clipping against a loop, a user's own, and microbatches."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bmjax import distill, losses, parallel, trees
from bmjax.models.linen import LinenModel
from bmjax.models.mlp import PlainMLP
from bmjax.parallel import collectives
from bmjax.train import Problem, gradients, init_state, make_step
from bmjax.train.jaxprs import alike
from bmjax.types import Mean, Outputs, Term

MODEL = LinenModel(PlainMLP((7,), classes=4))
ONE = ("data=1", "partitioned")
PLACES = [ONE, ("data=8", "replicated"), ("data=8", "pmap"), ("fsdp=8", "partitioned"), ("data=2,fsdp=2,tensor=2", "hybrid")]
CE = {"ce": (1.0, losses.cross_entropy_term())}
B = 16


def make_batch(padding=5):
    rng = np.random.default_rng(3)
    inputs = rng.normal(size=(B, 6)) * np.where(np.arange(B) % 3, 1.0, 8.0)[:, None]  # some gradients are large
    return {
        "inputs": inputs.astype(np.float32),
        "targets": rng.integers(0, 4, B).astype(np.int32),
        "weights": np.where(np.arange(B) < padding, 0.0, rng.uniform(0.2, 1.0, B)).astype(np.float32),
        "id": np.arange(B, dtype=np.int32),
    }


def start(problem, place, batch):
    mesh = parallel.make_mesh(place[0], jax.devices()[:1] if place is ONE else None)
    state = init_state(problem, mesh, getattr(problem.model, "rules", ()), jax.random.key(0), batch)
    return state, make_step(problem, mesh, state, place[1]), parallel.put_batch(batch, mesh)


def run(problem, place=ONE, batch=None, steps=1):
    state, step, placed = start(problem, place, batch or make_batch())
    metrics = {}
    for _ in range(steps):
        state, metrics = step(state, None, placed)
    return jax.device_get(state), jax.device_get(metrics)


def sgd(gradient=None, terms=CE, model=MODEL, **more):
    return Problem(model, terms, optax.sgd(1.0), gradient=gradient or gradients.mean(), **more)


def close(found, wanted, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, wanted)


@functools.cache
def begun():
    return jax.device_get(start(sgd(), ONE, make_batch())[0].params["model"])


def looped(norm):
    """Parameters after one step of size 1: each example alone, clipped in NumPy, averaged by weight."""
    batch, params = make_batch(), begun()

    def loss(params, x, y):
        return -jax.nn.log_softmax(MODEL.apply(params, {}, {"inputs": x[None]})[0].logits)[0, y]

    gradient, norms = jax.jit(jax.grad(loss)), []
    total = jax.tree.map(lambda p: np.zeros(p.shape), params)
    for x, y, weight in zip(batch["inputs"], batch["targets"], batch["weights"]):
        one = jax.tree.map(lambda g: np.asarray(g, np.float64), gradient(params, x, y))
        norms.append(np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(one))))
        share = weight * min(1, norm / norms[-1])
        total = jax.tree.map(lambda t, g, share=share: t + share * g, total, one)
    scale = np.asarray(batch["weights"], np.float64).sum()
    return jax.tree.map(lambda p, t: p - t / scale, params, total), np.array(norms)[batch["weights"] > 0]


@pytest.mark.parametrize("place", PLACES, ids="/".join)
def test_each_example_is_clipped_as_in_a_loop(place):
    wanted, norms = looped(2.0)
    assert norms.min() < 2 < norms.max()
    close(run(sgd(gradients.clipped_per_example(2.0)), place)[0].params["model"], wanted)


def test_clipping_does_not_depend_on_microbatches():
    close(run(sgd(gradients.clipped_per_example(2.0), accumulate=2), PLACES[1])[0].params["model"], looped(2.0)[0])


def test_a_norm_that_clips_nothing_is_the_mean():
    two = {"ce": (0.5, losses.cross_entropy_term()), "smooth": (2.0, losses.cross_entropy_term(0.2))}
    mean, metrics = run(sgd(terms=two))
    clipped, found = run(sgd(gradients.clipped_per_example(1e6), two), PLACES[1])
    close(clipped.params, mean.params)
    close(found, metrics)


def test_one_example_moves_nothing_by_more_than_its_share():
    batch = make_batch(padding=0)
    batch["weights"][:] = 1
    mad = {**batch, "inputs": np.where(np.arange(B)[:, None] == 3, 1e4, batch["inputs"]).astype(np.float32)}
    one, other = (run(sgd(gradients.clipped_per_example(0.1)), batch=b)[0].params["model"] for b in (batch, mad))
    moved = np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other))))
    assert 0 < moved <= 2 * 0.1 / B * 1.001


def test_padding_may_hold_anything():
    batch = make_batch()
    batch["inputs"][:5] = np.nan
    close(run(sgd(gradients.clipped_per_example(2.0)), batch=batch)[0].params["model"], looped(2.0)[0])


@pytest.mark.parametrize("place", PLACES[:3], ids="/".join)
def test_a_plain_function_is_a_gradient(place):
    """Signs of each device's gradient, summed: what is exchanged is the function's own business."""

    def signs(loss_fn, params, batch, ctx):
        def total(params):
            loss, aux = loss_fn(params, batch, ctx.memory)
            return loss.total, aux

        grads, aux = jax.grad(total, has_aux=True)(params)
        grads, means = ctx.psum((jax.tree.map(jnp.sign, grads), aux.means))
        return grads, aux._replace(means={name: Mean(*mean) for name, mean in means.items()})

    state, _ = run(sgd(signs), place, make_batch(padding=0))
    moved = jax.tree.map(lambda a, b: np.round(a - b, 4), state.params["model"], begun())
    values = {abs(int(v)) for leaf in jax.tree.leaves(moved) for v in leaf.ravel()}
    assert max(values) <= (1 if place is ONE else 8) and values - {0}
    if place is not ONE:
        assert max(values) > 1


@pytest.mark.parametrize("place", [ONE, PLACES[1], PLACES[4]], ids="/".join)
@pytest.mark.parametrize("terms", [CE, {**CE, "heavy": (0.5, losses.cross_entropy_term(0.1, (1.0, 2.0, 0.5, 1.5)))}], ids=len)
def test_four_microbatches_equal_one_batch(place, terms):
    batch = {name: np.concatenate([x, x[::-1]]) for name, x in make_batch().items()}
    one, metrics = run(sgd(terms=terms), batch=batch, steps=2)
    four, found = run(sgd(terms=terms, accumulate=4), place, batch, steps=2)
    close(four.params, one.params)
    close(found, metrics)


def test_microbatches_add_up_in_one_buffer():
    """Beyond the sum there is room for the gradient of one layer of eight, and for activations."""
    model = LinenModel(PlainMLP((256,) * 8, classes=4))
    batch = {
        "inputs": np.zeros((32, 256), np.float32),
        "targets": np.zeros(32, np.int32),
        "weights": np.ones(32, np.float32),
    }

    def spare(place, accumulate):
        state, step, placed = start(sgd(model=model, accumulate=accumulate), place, batch)
        used = step.lower(state, None, placed).compile().memory_analysis()
        return used.temp_size_in_bytes / trees.nbytes(state.params["model"])

    assert 1 < spare(ONE, 4) < 1.3
    assert spare(PLACES[1], 4) < 1.02 * spare(PLACES[1], 1)  # there the exchange needs most


class Statistics(nn.Module):
    """Moves a running mean of its inputs."""

    features, axes, rules = (), {}, ((".*", ()),)

    @nn.compact
    def __call__(self, batch, train=False, capture=()):
        x = batch["inputs"]
        mean = self.variable("batch_stats", "mean", jnp.zeros, (6,))
        if train:
            mean.value = 0.5 * mean.value + 0.5 * collectives.moments(x, batch["weights"])[0]
        return Outputs(nn.Dense(4)(x), {})


@pytest.mark.parametrize("place", PLACES[:3], ids="/".join)
def test_statistics_that_may_see_microbatches_pass_from_one_to_the_next(place):
    state, _ = run(sgd(model=LinenModel(Statistics()), accumulate=2, microbatch_statistics=True), place)
    batch, mean = make_batch(), 0
    for i in range(2):
        x, w = (np.float64(batch[name][i::2]) for name in ("inputs", "weights"))
        mean = 0.5 * mean + 0.5 * (w[:, None] * x).sum(0) / max(w.sum(), 1)
    np.testing.assert_allclose(state.model_state["batch_stats"]["mean"], mean, atol=1e-5)


@pytest.mark.parametrize("place", [ONE, PLACES[1], PLACES[3]], ids="/".join)
def test_norms_are_those_of_the_whole_gradient(place):
    problem = Problem(MODEL, CE, optax.sgd(0.25), norms=True)
    state, metrics = run(problem, place)
    moved = jax.tree.map(lambda a, b: np.float64(a) - b, state.params["model"], begun())
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(moved)))
    np.testing.assert_allclose([metrics["update_norm"], metrics["grad_norm"]], [norm, 4 * norm], rtol=1e-4)
    assert set(run(sgd())[1]) == {"loss", "ce"}


def counting(*counts):
    return lambda batch: [count(batch["weights"], batch["x"]) for count in counts]


LOCAL = np.arange(16, dtype=np.float32)


@pytest.mark.parametrize(
    ("counts", "same"),
    [
        ((lambda w, x: w.sum(), lambda w, x: jnp.sum(w.astype(jnp.float32))), True),
        ((lambda w, x: Mean.of(x, w).count, lambda w, x: Mean.of(x * 2, w).count), True),
        ((lambda w, x: w.sum(), lambda w, x: (2 * w).sum()), False),
        ((lambda w, x: w.sum(), lambda w, x: x.sum()), False),
        ((lambda w, x: (w * LOCAL).sum(), lambda w, x: (w * LOCAL[::-1]).sum()), False),
        ((lambda w, x: jax.jit(lambda w: w * LOCAL)(w).sum(), lambda w, x: jax.jit(lambda w: w * (LOCAL + 1))(w).sum()), False),
        ((lambda w, x: jnp.where(w > 0, 1.0, 0.0).sum(), lambda w, x: jnp.where(w > 0, 1.0, 0.0).sum()), True),
        ((lambda w, x: jnp.where(w > 0, 1.0, 0.0).sum(), lambda w, x: jnp.where(w > 1, 1.0, 0.0).sum()), False),
        ((lambda w, x: jnp.float32(3), lambda w, x: jnp.float32(3)), True),
    ],
)
def test_equal_counts_are_known_by_how_they_are_made(counts, same):
    assert alike(counting(*counts), {"weights": np.ones(16, np.float32), "x": np.ones(16, np.float32)}) is same


REMEMBERS = Term(
    lambda key, student, teacher: ({}, {"n": jnp.int32(0)}),
    lambda ctx, student, teacher, batch: (Mean.of(student.logits[:, 0], batch["weights"]), {"n": ctx.state["n"] + 1}),
)
RELATES = Term(lambda *_: ({}, {}), None, relates_examples=True)
CLIPPED = gradients.clipped_per_example(1.0)
WEIGHED = {**CE, "heavy": (1.0, losses.cross_entropy_term(class_weights=(1.0, 2.0, 1.0, 1.0)))}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gradients.clipped_per_example(0), "clipped to the norm 0; expected a finite number above 0"),
        (lambda: gradients.clipped_per_example(float("nan")), "norm nan"),
        (lambda: sgd(CLIPPED, {"x": (1.0, RELATES)}), "'x' relates examples, so no example has a gradient of its own"),
        (lambda: run(sgd(CLIPPED, model=LinenModel(Statistics()))), "the model has batch statistics, which no single example"),
        (lambda: run(sgd(CLIPPED, {"x": (1.0, REMEMBERS)})), "'x' has a state, which no single example can renew"),
        (lambda: run(sgd(CLIPPED, WEIGHED)), "ce, heavy weigh examples differently"),
        (lambda: run(sgd(model=LinenModel(Statistics()), accumulate=2)), "batch statistics: 2 microbatches would change them"),
        (lambda: sgd(terms={"x": (1.0, RELATES)}, accumulate=2), "or microbatch_statistics to True if that is meant"),
        (lambda: sgd(ema=1.0), "ema is 1.0; expected a decay between 0 and 1"),
        (lambda: sgd(mean_teacher=True), "give its decay as ema"),
        (lambda: sgd(mean_teacher=True, ema=0.9, teacher=MODEL), "a problem has one teacher"),
        (lambda: sgd(terms={"loss": CE["ce"]}), "cannot be called 'loss'"),
        (lambda: sgd(terms={"ema": CE["ce"]}, ema=0.9), "cannot be called 'ema'"),
        (lambda: sgd(terms={"grad_norm": CE["ce"]}, norms=True), "cannot be called 'grad_norm'"),
        (lambda: run(sgd(terms={"kd": (1.0, losses.on_logits(distill.kd))})), "needs a teacher"),
    ],
)
def test_what_makes_no_sense_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_names_are_free_where_nothing_else_has_them():
    assert set(run(sgd(terms={"ema": CE["ce"], "grad_norm": CE["ce"]}))[1]) == {"loss", "ema", "grad_norm"}
