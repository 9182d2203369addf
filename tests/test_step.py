"""The step gives the same numbers on every mesh, and those of a loss written by hand over the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from vit_pair import STUDENT, TEACHER, frozen, make_batch

from bmjax import distill, losses, parallel
from bmjax.models.linen import LinenModel
from bmjax.parallel import collectives
from bmjax.train import Problem, init_state, make_step
from bmjax.types import Mean, Outputs, Term

CLASS_WEIGHTS = (1.0, 2.0, 0.5, 1.5)
MESHES = ["data=8", "data=4,fsdp=2", "data=2,fsdp=2,tensor=2", "fsdp=8"]


def five_classes():
    params, _ = jax.jit(LinenModel(TEACHER.module.clone(classes=5)).init)(jax.random.key(0), make_batch())
    return {"params": params, "model_state": {}}


TERMS = {
    "ce": (0.7, losses.cross_entropy_term(label_smoothing=0.1, class_weights=CLASS_WEIGHTS)),
    "kd": (0.3, losses.on_logits(distill.kd, temperature=2.0)),
    "hint": (0.5, losses.on_features(distill.hint, {"layers/0": "layers/1/mlp"}, project="linear")),
}


def problem(terms=TERMS, accumulate=1, model=STUDENT, tx=None, teacher=TEACHER):
    tx = tx or optax.sgd(0.5, momentum=0.9)
    return Problem(model, terms, tx, teacher=teacher, loss_tx=optax.sgd(0.5), accumulate=accumulate)


def mesh_of(spec):
    return parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None)


def run(spec, problem, steps=5, frozen_params=None, batch=None):
    mesh = mesh_of(spec)
    batch = batch or make_batch()
    teacher = frozen_params if frozen_params is not None else frozen()
    state = init_state(problem, mesh, problem.model.rules, jax.random.key(0), batch, frozen=teacher)
    step = make_step(problem, mesh, state)
    placed, teacher = parallel.put_batch(batch, mesh), jax.device_put(teacher, parallel.replicated(mesh))
    history = []
    for _ in range(steps):
        state, metrics = step(state, teacher, placed)
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


def by_hand(params, loss_params, teacher, batch):
    """The whole objective over the whole batch, written out."""
    student, _ = STUDENT.apply(params, {}, batch, capture=("layers/0",))
    target, _ = TEACHER.apply(teacher["params"], {}, batch, capture=("layers/1/mlp",))
    w = batch["weights"]
    wc = w * jnp.asarray(CLASS_WEIGHTS)[batch["targets"]]
    smooth = 0.9 * jax.nn.one_hot(batch["targets"], 4) + 0.1 / 4
    ce = jnp.sum(wc * -jnp.sum(smooth * jax.nn.log_softmax(student.logits), -1)) / jnp.sum(wc)
    p, q = jax.nn.softmax(target.logits / 2), jax.nn.log_softmax(student.logits / 2)
    kd = jnp.sum(w * 4 * jnp.sum(p * (jnp.log(p) - q), -1)) / jnp.sum(w)
    linear = loss_params["hint"]["project"]["0"]
    projected = student.features["layers/0"] @ linear["kernel"] + linear["bias"]
    hint = jnp.sum(w * jnp.mean((projected - target.features["layers/1/mlp"]) ** 2, (1, 2))) / jnp.sum(w)
    return 0.7 * ce + 0.3 * kd + 0.5 * hint, {"ce": ce, "kd": kd, "hint": hint}


@pytest.fixture(scope="module")
def reference():
    """Five steps of SGD with momentum by hand."""
    batch, teacher = make_batch(), frozen()
    state = init_state(problem(), mesh_of("data=1"), STUDENT.rules, jax.random.key(0), batch, frozen=teacher)
    params, trace = state.params, jax.tree.map(jnp.zeros_like, state.params["model"])
    grad = jax.jit(jax.value_and_grad(lambda p: by_hand(p["model"], p["loss"], teacher, batch), has_aux=True))
    history = []
    for _ in range(5):
        (loss, terms), g = grad(params)
        trace = jax.tree.map(lambda t, g: 0.9 * t + g, trace, g["model"])
        params = {
            "model": jax.tree.map(lambda p, t: p - 0.5 * t, params["model"], trace),
            "loss": jax.tree.map(lambda p, g: p - 0.5 * g, params["loss"], g["loss"]),
        }
        history.append({"loss": loss, **terms})
    return jax.device_get(params), jax.device_get(history)


@pytest.mark.parametrize("spec", ["data=1", *MESHES])
def test_every_mesh_matches_the_hand_written_loop(spec, reference):
    params, history = reference
    state, got = run(spec, problem())
    for want, have in zip(history, got):
        for name in want:
            np.testing.assert_allclose(have[name], want[name], rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), state.params, params)
    assert int(state.step) == 5


@pytest.mark.parametrize("spec", ["data=1", "data=4,fsdp=2"])
def test_microbatches_equal_one_batch(spec, reference):
    params, history = reference
    state, got = run(spec, problem(accumulate=2))
    np.testing.assert_allclose([h["loss"] for h in got], [h["loss"] for h in history], rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), state.params, params)


def test_parameters_are_created_partitioned():
    mesh = mesh_of("data=2,fsdp=2,tensor=2")
    batch = make_batch()
    tx = optax.adam(1e-3)
    state = init_state(problem(tx=tx), mesh, STUDENT.rules, jax.random.key(0), batch, frozen=frozen())
    kernel = state.params["model"]["layers"]["up"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (2, 4, 8)
    assert state.opt_state["model"][0].mu["layers"]["up"]["kernel"].sharding == kernel.sharding
    one = init_state(problem(tx=tx), mesh_of("data=1"), STUDENT.rules, jax.random.key(0), batch, frozen=frozen())
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), jax.device_get(one.params))


def test_the_teacher_is_frozen_and_not_donated():
    teacher = frozen()
    before = jax.device_get(teacher)
    state, _ = run("data=8", problem(), steps=2, frozen_params=teacher)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(teacher), before)
    assert set(state.params["loss"]) == {"hint"}


@pytest.mark.parametrize("spec", MESHES[:2])
def test_dropout_agrees_on_every_mesh(spec):
    model = LinenModel(STUDENT.module.clone(dropout=0.3))
    p = problem({"ce": TERMS["ce"]}, model=model, teacher=None)
    one, first = run("data=1", p, steps=2, frozen_params={})
    many, got = run(spec, p, steps=2, frozen_params={})
    plain, without = run("data=1", problem({"ce": TERMS["ce"]}, teacher=None), steps=2, frozen_params={})
    assert abs(first[0]["loss"] - without[0]["loss"]) > 1e-3
    assert first[0]["loss"] != first[1]["loss"]
    np.testing.assert_allclose([h["loss"] for h in got], [h["loss"] for h in first], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), many.params, one.params)
    del plain


def test_views_change_what_the_forward_pass_sees_and_not_what_is_kept():
    zero_head = lambda params, opt_state, step: {**params, "head": jax.tree.map(jnp.zeros_like, params["head"])}
    p = Problem(STUDENT, {"ce": (1.0, losses.cross_entropy_term())}, optax.sgd(0.1), views=(zero_head,))
    state, history = run("data=8", p, steps=1, frozen_params={})
    np.testing.assert_allclose(history[0]["loss"], np.log(4), rtol=1e-6)
    assert np.abs(state.params["model"]["head"]["kernel"]).max() > 0


@pytest.mark.parametrize("spec", ["data=1", "data=8", "data=4,fsdp=2"])
def test_a_term_with_state_and_collectives(spec):
    """A running mean of the logits over the global batch, kept in `extra`."""

    def init(key, student, teacher):
        return {}, {"mean": jnp.zeros(student.logits.shape[-1])}

    def apply(ctx, student, teacher, batch):
        gathered = ctx.all_gather(student.logits * batch["weights"][:, None])
        total = ctx.psum(jnp.sum(batch["weights"]))
        mean = gathered.sum(0) / total
        centred = jnp.sum((student.logits - mean) ** 2, -1)
        return Mean.of(centred, batch["weights"]), {"mean": ctx.state["mean"] * 0.5 + mean}

    p = problem({"centre": (1.0, Term(init, apply, relates_examples=True))}, teacher=None)
    state, history = run(spec, p, steps=1, frozen_params={})
    batch = make_batch()
    start = init_state(p, mesh_of("data=1"), STUDENT.rules, jax.random.key(0), batch)
    w = batch["weights"][:, None]

    def loss(params):
        logits = STUDENT.apply(params, {}, batch)[0].logits
        mean = (logits * w).sum(0) / w.sum()
        return jnp.sum(w * (logits - mean) ** 2) / w.sum(), mean

    (value, mean), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(start.params["model"])
    np.testing.assert_allclose(history[0]["centre"], value, rtol=1e-5)
    np.testing.assert_allclose(state.extra["centre"]["mean"], mean, atol=1e-5)
    want = jax.tree.map(lambda p, g: p - 0.5 * g, start.params["model"], grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params["model"], jax.device_get(want))


def test_moments_are_of_the_global_batch():
    rng = np.random.default_rng(1)
    x, w = rng.normal(3, 2, (16, 5, 3)).astype(np.float32), (rng.uniform(size=16) < 0.4).astype(np.float32)
    w[:4] = 0  # two shards with nothing but padding
    x[0], w = np.nan, w * 0.01  # padding may hold anything, and weights may add up to less than 1

    def body(x, w):
        with collectives.over("data"):
            return collectives.moments(x, w)

    mesh = parallel.make_mesh("data=8")
    spec = PartitionSpec("data")
    mean, var = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(spec, spec), out_specs=PartitionSpec()))(x, w)
    kept = x.astype(np.float64)[w > 0].reshape(-1, 3)
    np.testing.assert_allclose(mean, kept.mean(0), rtol=1e-5)
    np.testing.assert_allclose(var, kept.var(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: problem({}), "at least one loss term"),
        (lambda: problem({"ce": (float("nan"), TERMS["ce"][1])}), "weight of the loss term 'ce' is nan"),
        (lambda: problem(accumulate=0), "accumulate is 0"),
        (lambda: problem({"x": (1.0, Term(None, None, relates_examples=True))}, accumulate=2), "relates examples"),
        (lambda: run("data=8", problem(teacher=None)), "needs a teacher"),
        (
            lambda: run(
                "data=8",
                problem({"kd": (1.0, losses.on_logits(distill.kd))}, teacher=LinenModel(TEACHER.module.clone(classes=5))),
                frozen_params=dict(
                    zip(
                        ("params", "model_state"),
                        LinenModel(TEACHER.module.clone(classes=5)).init(jax.random.key(0), make_batch()),
                    )
                ),
            ),
            "4 classes and the teacher 5",
        ),
        (lambda: run("data=8", Problem(STUDENT, TERMS, optax.sgd(0.1), teacher=TEACHER)), "give the problem a loss_tx"),
        (lambda: run("data=8", problem({"x": (1.0, lambda s, t, b: s.logits.mean())})), "loss term 'x' returned no Mean"),
        (lambda: run("data=8", problem(), batch={k: v[:12] for k, v in make_batch().items()}), "does not divide over 8 devices"),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_outputs_are_pytrees():
    outputs = Outputs(jnp.ones(2), {"a": jnp.ones(3)})
    assert len(jax.tree.leaves(outputs)) == 2
