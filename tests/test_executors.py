"""Every executor that fits a mesh gives the same numbers; one that does not fit says so."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from vit_pair import STUDENT, TEACHER, B, frozen, make_batch

from bmjax import distill, losses, parallel
from bmjax.models.linen import LinenModel
from bmjax.parallel import collectives
from bmjax.train import Problem, abstract_state, init_state, make_step
from bmjax.types import Mean, Outputs, Term

ONE = ("data=1", "partitioned")
PLACES = [
    ("data=8", "replicated"),
    ("data=8", "partitioned"),
    ("data=8", "pmap"),
    ("data=4,fsdp=2", "partitioned"),
    ("data=4,fsdp=2", "hybrid"),
    ("data=2,fsdp=2,tensor=2", "hybrid"),
]


def queue(length):
    """A memory bank: examples are pushed from the queue's mean, then replace its oldest rows."""

    def init(key, student, teacher):
        return {}, {"rows": jnp.ones((length, student.logits.shape[-1])), "filled": jnp.int32(0)}

    def apply(ctx, student, teacher, batch):
        away = jnp.square(student.logits - ctx.state["rows"].mean(0)).sum(-1)
        rows = jnp.concatenate([ctx.all_gather(student.logits), ctx.state["rows"]])[:length]
        filled = ctx.state["filled"] + ctx.psum(jnp.sum(batch["weights"] > 0))
        return Mean.of(away, batch["weights"]), {"rows": rows, "filled": filled}

    return Term(init, apply)


ALL = {
    "ce": (0.7, losses.cross_entropy_term(label_smoothing=0.1, class_weights=(1.0, 2.0, 0.5, 1.5))),
    "kd": (0.3, losses.on_logits(distill.kd, temperature=2.0)),
    "hint": (0.5, losses.on_features(distill.hint, {"layers/0": "layers/1/mlp"}, project="linear")),
    "bank": (0.1, queue(24)),
}
PLAIN = {"ce": (1.0, losses.cross_entropy_term())}


def full(terms=ALL, model=STUDENT, teacher=TEACHER, **more):
    return Problem(model, terms, optax.sgd(0.3, momentum=0.9), teacher=teacher, loss_tx=optax.sgd(0.5), **more)


def start(problem, place, rules=None, batch=None, params=None):
    spec, executor = place
    mesh = parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None)
    batch = batch or make_batch()
    teacher = frozen() if problem.teacher else None
    rules = rules or problem.model.rules
    state = init_state(problem, mesh, rules, jax.random.key(0), batch, frozen=teacher, params=params)
    placed = jax.device_put(teacher, parallel.replicated(mesh)), parallel.put_batch(batch, mesh)
    return state, make_step(problem, mesh, state, executor), *placed


def run(problem, place, steps=3, **more):
    state, step, teacher, batch = start(problem, place, **more)
    history = []
    for _ in range(steps):
        state, metrics = step(state, teacher, batch)
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


def close(found, wanted, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, wanted)


@functools.cache
def on_one_device():
    return run(full(), ONE)


@pytest.mark.parametrize("place", PLACES, ids="/".join)
def test_all_executors_give_the_numbers_of_one_device(place):
    """A teacher, four terms of three counts, uneven weights, a projector and a memory bank, under SGD with momentum."""
    wanted, history = on_one_device()
    state, got = run(full(), place)
    close(got, history)
    close(state.params, wanted.params)
    close(state.extra, wanted.extra)
    close(state.opt_state, wanted.opt_state)


def test_the_memory_bank_holds_the_newest_rows_of_the_whole_batch():
    state, _ = on_one_device()
    assert int(state.extra["bank"]["filled"]) == 3 * 11
    logits = []
    for steps in (1, 2):  # the outputs of a step are those of the parameters that the step before it left
        params = run(full(), ONE, steps=steps)[0].params["model"]
        logits.append(STUDENT.apply(params, {}, make_batch())[0].logits)
    np.testing.assert_allclose(state.extra["bank"]["rows"][:16], logits[1], atol=1e-5)
    np.testing.assert_allclose(state.extra["bank"]["rows"][16:], logits[0][:8], atol=1e-5)


@pytest.mark.parametrize("place", PLACES[:3], ids="/".join)
def test_gradients_through_gathered_examples_are_right(place):
    """All pairs of the global batch: each example is pulled to what all others predict."""

    def apply(ctx, student, teacher, batch):
        every = ctx.all_gather(student.logits)
        return Mean.of(jnp.square(student.logits[:, None] - every[None]).sum(-1).mean(-1), batch["weights"])

    problem = full({"pairs": (1.0, Term(lambda *_: ({}, {}), apply, relates_examples=True))}, teacher=None)
    wanted, _ = run(problem, ONE, steps=2)
    begun = start(problem, ONE)[0].params["model"]
    assert np.abs(begun["head"]["kernel"] - wanted.params["model"]["head"]["kernel"]).max() > 1e-3
    close(run(problem, place, steps=2)[0].params, wanted.params)


class Tokens(nn.Module):
    """A table that is looked up, and its transpose as head: the parameters that a partitioner trips over."""

    @property
    def rules(self):
        return (("embedding", ("tensor", "fsdp")), ("head/kernel", ("fsdp", "tensor")), (".*", ()))

    features, axes = (), {}

    @nn.compact
    def __call__(self, batch, train=False, capture=()):
        x = nn.Embed(32, 8, name="embed")(batch["inputs"])
        return Outputs(nn.Dense(32, name="head")(nn.tanh(x)), {})


@pytest.mark.parametrize("place", PLACES[-3:], ids="/".join)
def test_partitioned_tables_and_heads_can_be_indexed(place):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (B, 6)).astype(np.int32)
    batch = {"inputs": tokens, "targets": np.roll(tokens, -1, 1), "weights": (rng.uniform(size=(B, 6)) < 0.7) * np.float32(1)}
    problem = full(PLAIN, LinenModel(Tokens()), teacher=None)
    wanted, history = run(problem, ONE, batch=batch)
    state, got = run(problem, place, batch=batch)
    close(got, history)
    close(state.params, wanted.params)


@pytest.mark.parametrize("place", [ONE, *PLACES[:3], PLACES[5]], ids="/".join)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_dropout_agrees_on_any_mesh_and_with_any_microbatches(place, accumulate):
    model = LinenModel(STUDENT.module.clone(dropout=0.3))
    wanted, history = dropped()
    state, got = run(full(PLAIN, model, teacher=None, accumulate=accumulate), place, steps=2)
    assert history[0]["loss"] != history[1]["loss"]
    close(got, history)
    close(state.params, wanted.params)


@functools.cache
def dropped():
    return run(full(PLAIN, LinenModel(STUDENT.module.clone(dropout=0.3)), teacher=None), ONE, steps=2)


def all_reduces(problem, place, batch=None):
    state, step, teacher, batch = start(problem, place, batch=batch)
    lines = step.lower(state, teacher, batch).compile().as_text().splitlines()
    return [line for line in lines if re.search(r"= .* all-reduce(-start)?\(", line)]


TWO = {"ce": (0.5, losses.cross_entropy_term()), "kd": (0.5, losses.on_logits(distill.kd))}


@pytest.mark.parametrize("place", PLACES[:3:2], ids="/".join)
@pytest.mark.parametrize(
    ("terms", "accumulate", "wanted"),
    [(PLAIN, 1, 1), (TWO, 1, 1), (TWO, 2, 1), (ALL, 1, None)],
    ids=("one", "two", "micro", "all"),
)
def test_gradients_totals_and_equal_counts_travel_together(place, terms, accumulate, wanted):
    found = all_reduces(full(terms, accumulate=accumulate), place)
    if wanted is None:  # different counts are summed first, and the memory bank counts on its own
        assert len(found) >= 3
    else:
        assert len(found) == wanted


class Counting(nn.Module):
    """Its state is made of what one device sees, unless it asks the others."""

    shared: bool
    features, axes, rules = (), {}, ((".*", ()),)

    @nn.compact
    def __call__(self, batch, train=False, capture=()):
        x = batch["inputs"].reshape(len(batch["inputs"]), -1)
        seen = self.variable("batch_stats", "seen", jnp.zeros, (16,))
        if train:
            seen.value = collectives.psum(x.sum(0)) if self.shared else x.sum(0)
        return Outputs(nn.Dense(4)(x), {})


@pytest.mark.parametrize("place", PLACES[:3], ids="/".join)
def test_a_models_state_is_of_the_global_batch(place):
    problem = full(PLAIN, LinenModel(Counting(True)), teacher=None)
    state, _ = run(problem, place, steps=1)
    np.testing.assert_allclose(state.model_state["batch_stats"]["seen"], make_batch()["inputs"].reshape(B, 16).sum(0), atol=1e-5)


def local_state(ctx, student, teacher, batch):
    return Mean.of(student.logits[:, 0], batch["weights"]), {"last": student.logits[0]}


def other_state(ctx, student, teacher, batch):
    return Mean.of(student.logits[:, 0], batch["weights"]), {"last": jnp.zeros(3)}


def stateful(apply):
    return {"x": (1.0, Term(lambda key, student, teacher: ({}, {"last": jnp.zeros(4)}), apply))}


@pytest.mark.parametrize(
    ("problem", "place", "words"),
    [
        (full(), ("data=8", "shard"), "no executor 'shard'; there are auto, replicated"),
        (full(), ("data=4,fsdp=2", "pmap"), "pmap keeps parameters whole, and the mesh is data=4,fsdp=2,tensor=1"),
        (full(), ("data=4,fsdp=2", "replicated"), "replicated keeps parameters whole"),
        (full(), ("data=8", "hybrid"), "hybrid needs data above 1 and fsdp or tensor above 1.*take replicated"),
        (full(), ("fsdp=8", "hybrid"), "take partitioned"),
        (
            full(PLAIN, LinenModel(Counting(False)), teacher=None),
            ("data=8", "replicated"),
            "model's state at batch_stats/seen is",
        ),
        (full(PLAIN, LinenModel(Counting(False)), teacher=None), ("data=8", "pmap"), "made of one device's examples only"),
        (full(stateful(local_state), teacher=None), ("data=8", "pmap"), "state of the loss term 'x' at last is made of one"),
        (full(stateful(local_state), teacher=None), ("data=8", "replicated"), "compute it with ctx.all_gather"),
        (full(stateful(other_state), teacher=None), ("data=8", "replicated"), "'x' has the shapes .*3.*, and had .*4"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(problem, place, words):
    with pytest.raises(ValueError, match=words):
        run(problem, place)


@pytest.mark.parametrize("place", [PLACES[0], PLACES[4]], ids="/".join)
def test_a_moving_average_is_partitioned_like_the_parameters(place):
    problem = full(PLAIN, teacher=None, ema=0.75)
    state, step, teacher, batch = start(problem, place)
    shapes = abstract_state(problem, parallel.make_mesh(place[0]), STUDENT.rules, jax.random.key(0), make_batch())
    where = lambda tree: jax.tree.map(lambda leaf: leaf.sharding.spec, tree)
    assert where(shapes.extra["ema"]) == where(shapes.params["model"]) == where(state.extra["ema"])
    held = jax.device_get(state.params["model"])
    close(jax.device_get(state.extra["ema"]), held, 0)
    for _ in range(3):
        state, _ = step(state, teacher, batch)
        held = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * np.asarray(new), held, state.params["model"])
    close(jax.device_get(state.extra["ema"]), held)


def test_a_moving_average_shares_no_memory_with_given_parameters():
    given = start(full(PLAIN, teacher=None), ONE)[0].params["model"]
    before = jax.device_get(given)
    state, step, teacher, batch = start(full(PLAIN, teacher=None, ema=0.9), ONE, params=given)
    step(state, teacher, batch)
    close(jax.device_get(given), before, 0)


@pytest.mark.parametrize("place", [ONE, *PLACES[:3], PLACES[4]], ids="/".join)
def test_the_mean_teacher_is_the_average_before_the_step(place):
    """By hand: the target is the average's output, without a gradient, and moves after the update."""
    problem = full(
        {"kd": (1.0, losses.on_logits(distill.kd, temperature=2.0)), "ce": (0.5, losses.cross_entropy_term())},
        teacher=None,
        ema=0.5,
        mean_teacher=True,
    )
    state, history = run(problem, place)
    close(history, by_hand_mean_teacher()[1])
    close(state.params["model"], by_hand_mean_teacher()[0])


@functools.cache
def by_hand_mean_teacher():
    batch = make_batch()
    params = start(full(PLAIN, teacher=None), ONE)[0].params["model"]
    average, trace, w = params, jax.tree.map(jnp.zeros_like, params), batch["weights"]

    def objective(params, average):
        logits, targets = (STUDENT.apply(p, {}, batch)[0].logits for p in (params, average))
        p, q = jax.nn.softmax(targets / 2), jax.nn.log_softmax(logits / 2)
        kd = jnp.sum(w * 4 * jnp.sum(p * (jnp.log(p) - q), -1)) / w.sum()
        ce = jnp.sum(w * -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][:, None], 1)[:, 0]) / w.sum()
        return kd + 0.5 * ce, {"kd": kd, "ce": ce}

    gradient, history = jax.jit(jax.value_and_grad(objective, has_aux=True)), []
    for _ in range(3):
        (loss, terms), g = gradient(params, average)
        trace = jax.tree.map(lambda t, g: 0.9 * t + g, trace, g)
        params = jax.tree.map(lambda p, t: p - 0.3 * t, params, trace)
        average = jax.tree.map(lambda a, p: 0.5 * a + 0.5 * p, average, params)
        history.append({"loss": loss, **terms})
    return jax.device_get(params), jax.device_get(history)
