"""Teachers: several as one, in fewer bits, each partitioned by its own rules; what a step of theirs costs."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, logsumexp, softmax

from bmjax import distill, losses, parallel, trees
from bmjax.distill.low_precision import Int8
from bmjax.models import Decoder, Plain, Residual, ResNet, adapters
from bmjax.train import Problem, cost, init_state, make_step
from bmjax.types import Outputs

B, D, C = 16, 6, 4
RNG = np.random.default_rng(0)
BATCH = {
    "inputs": RNG.normal(size=(B, D)).astype(np.float32),
    "targets": RNG.integers(0, C, B).astype(np.int32),
    "weights": np.where(np.arange(B) < 5, 0.0, RNG.uniform(0.1, 1.0, B)).astype(np.float32),  # whole shards of padding
    "id": np.arange(B, dtype=np.int32),
}
STUDENT = Plain((8,)).build((D,), C)
BIG, PLAIN = Residual(layers=3, width=16, neurons=32).build((D,), C), Plain((8, 8)).build((D,), C)


def drawn(model, batch=BATCH):
    """(parameters, state) drawn by NumPy: the compiler takes long over `init`, and eager operations do too."""
    rng = np.random.default_rng(1)
    params, state = jax.eval_shape(model.init, jax.random.key(0), batch)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / x.shape[-1] ** 0.5, jnp.float32), params)
    return params, jax.tree.map(lambda x: jnp.ones(x.shape), state)


class Constant:
    """A network whose logits are its parameters."""

    features = ("layers/0", "head")

    def init(self, key, batch):
        return {"z": jnp.zeros((B, C))}, {}

    def apply(self, params, model_state, batch, *, train=False, rngs=None, capture=()):
        return Outputs(params["z"], {name: params["z"] * (1 + self.features.index(name)) for name in capture}), model_state


def together(zs, batch=BATCH, capture=(), **how):
    model = distill.ensemble([Constant() for _ in zs], **how)
    params = {str(i): {"z": jnp.asarray(z)} for i, z in enumerate(zs)}
    return model.apply(params, {}, batch, capture=capture)[0]


Z = (3 * RNG.normal(size=(3, B, C))).astype(np.float32)
W = np.array([0.5, 0.0, 1.5])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weights", [None, W])
def test_the_average_of_probabilities_is_that_at_the_temperature(temperature, weights):
    found = together(Z, weights=weights, temperature=temperature).logits
    mean = np.average(softmax(Z.astype(np.float64) / temperature, -1), axis=0, weights=weights)
    np.testing.assert_allclose(softmax(np.asarray(found, np.float64) / temperature, -1), mean, rtol=1e-5)
    np.testing.assert_allclose(found, temperature * np.log(mean), rtol=1e-4, atol=1e-5)


def test_the_average_of_logits_is_the_geometric_mean():
    found = together(Z, weights=W, space="logits").logits
    np.testing.assert_allclose(found, np.average(Z.astype(np.float64), axis=0, weights=W), rtol=1e-5, atol=1e-6)


class Headed(Constant):
    """A network whose head is its parameters."""

    def apply(self, params, model_state, batch, *, train=False, rngs=None, capture=()):
        hidden, kernel, bias = params["head"]
        return Outputs(hidden @ kernel + (0 if bias is None else bias), {}, params["head"]), model_state


def test_averaged_logits_have_one_head_and_what_is_no_average_of_logits_has_none():
    draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    heads = [(draw(B, 3), draw(3, C), draw(C)), (draw(B, 5), draw(5, C), None), (draw(B, 2), draw(2, C), draw(C))]
    params = {str(i): {"head": head} for i, head in enumerate(heads)}
    run = lambda models, **how: distill.ensemble(models, **how).apply(params, {}, BATCH)[0]
    for weights in (None, W, [0, 1, 0]):
        found = run([Headed()] * 3, weights=weights, space="logits")
        hidden, kernel, bias = found.head
        assert len(kernel) == sum(len(head[1]) for head, used in zip(heads, [1, 1, 1] if weights is None else weights) if used)
        np.testing.assert_allclose(hidden @ kernel + (0 if bias is None else bias), found.logits, rtol=1e-4, atol=1e-5)
    assert run([Headed()] * 3).head is None
    assert run([Headed()] * 3, space="logits", choose="confident").head is None
    params["1"] = {"z": jnp.asarray(Z[0])}
    assert run([Headed(), Constant(), Headed()], space="logits").head is None


def test_extreme_and_masked_logits_stay_finite():
    z = np.stack([1e4 * Z[0], -1e4 * Z[1]])
    z[:, :, 1] = -np.inf
    kept = [0, 2, 3]
    found = np.asarray(together(z).logits)
    want = logsumexp(log_softmax(z[..., kept].astype(np.float64), -1), axis=0) - np.log(2)
    np.testing.assert_allclose(found[:, kept], want, rtol=1e-5, atol=1e-2)
    assert np.isneginf(found[:, 1]).all()
    z[0, :, 1] = 0.0  # of weight 0: a -inf in it must not count as NaN
    assert np.isfinite(together(z[::-1], weights=[0, 1], space="logits").logits).all()


def picked(index):
    return log_softmax(Z.astype(np.float64), -1)[index, np.arange(B)]


def test_each_item_has_the_teacher_that_is_chosen():
    index = RNG.integers(0, 3, B)
    found = together(Z, choose=lambda logits, batch: jnp.asarray(index)).logits
    np.testing.assert_allclose(found, picked(index), rtol=1e-5, atol=1e-5)
    p = softmax(Z.astype(np.float64), -1)
    found = together(Z, choose="confident").logits
    np.testing.assert_allclose(found, picked((p * np.log(p)).sum(-1).argmax(0)), rtol=1e-5, atol=1e-5)
    nll = -log_softmax(Z.astype(np.float64), -1)[:, np.arange(B), BATCH["targets"]]
    np.testing.assert_allclose(together(Z, choose="right").logits, picked(nll.argmin(0)), rtol=1e-5, atol=1e-5)
    other, mix = (BATCH["targets"] + 1) % C, np.linspace(0, 1, B, dtype=np.float32)
    mixed = {**BATCH, "targets_b": other, "mix": mix}
    both = mix * nll - (1 - mix) * log_softmax(Z.astype(np.float64), -1)[:, np.arange(B), other]
    np.testing.assert_allclose(together(Z, mixed, choose="right").logits, picked(both.argmin(0)), rtol=1e-5, atol=1e-5)


def test_weights_of_each_item_and_of_each_example_of_tokens():
    weights = RNG.uniform(0, 2, size=(B, 3))
    weights[0] = 0  # says nothing: all alike
    p = softmax(Z.astype(np.float64), -1)
    shares = np.where(weights.sum(-1, keepdims=True) > 0, weights / np.maximum(weights.sum(-1, keepdims=True), 1e-9), 1 / 3)
    found = together(Z, choose=lambda logits, batch: jnp.asarray(weights, jnp.float32)).logits
    np.testing.assert_allclose(np.exp(found), np.einsum("bn,nbc->bc", shares, p), rtol=1e-4)
    tokens = Z.reshape(3, B // 2, 2, C)
    found = together(tokens, choose=lambda logits, batch: jnp.asarray(weights[: B // 2], jnp.float32)).logits
    want = np.einsum("bn,nbtc->btc", shares[: B // 2], softmax(tokens.astype(np.float64), -1))
    np.testing.assert_allclose(np.exp(found), want, rtol=1e-4)
    one = together(tokens, choose=lambda logits, batch: jnp.argmax(logits[0], -1) % 3).logits  # an index for each position
    index = tokens[0].argmax(-1) % 3
    want = np.take_along_axis(log_softmax(tokens.astype(np.float64), -1), index[None, ..., None], 0)[0]
    np.testing.assert_allclose(one, want, rtol=1e-5, atol=1e-5)


def test_features_have_the_number_of_their_teacher():
    found = together(Z, capture=("0/layers/0", "2/head")).features
    assert set(found) == {"0/layers/0", "2/head"}
    np.testing.assert_array_equal(found["2/head"], 2 * Z[2])
    model = distill.ensemble([BIG, PLAIN])
    assert {"0/layers/1/mlp", "0/final", "1/hidden_1"} <= set(model.features)
    params, state = drawn(model)
    outputs, _ = model.apply(params, state, BATCH, capture=("0/layers/1", "1/hidden_1"))
    want = BIG.apply(params["0"], state["0"], BATCH, capture=("layers/1",))[0].features["layers/1"]
    np.testing.assert_allclose(outputs.features["0/layers/1"], want)
    assert outputs.features["1/hidden_1"].shape == (B, 8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: distill.ensemble([]), "no teachers"),
        (lambda: distill.ensemble([PLAIN], weights=[1, 2]), "2 weights for 1 teachers"),
        (lambda: distill.ensemble([PLAIN, BIG], weights=[0, 0]), "one of them above 0"),
        (lambda: distill.ensemble([PLAIN, BIG], weights=[1, -1]), "0 or more"),
        (lambda: distill.ensemble([PLAIN], weights=[1], choose="right"), "give one of them"),
        (lambda: distill.ensemble([PLAIN], space="logit"), "expected one of probability, logits"),
        (lambda: distill.ensemble([PLAIN], choose="best"), "expected one of confident, right"),
        (lambda: distill.ensemble([PLAIN], temperature=0), "temperature is 0"),
        (lambda: distill.ensemble([PLAIN]).resize({}), "cannot be resized"),
        (lambda: together([Z[0], Z[1][:, :3]]), r"logits are \[16, 4\], \[16, 3\]; they must agree"),
        (lambda: together(Z, capture=("3/head",)), "no feature '3/head'"),
        (lambda: together(Z, capture=("head",)), "no feature 'head'"),
        (lambda: together(Z, choose=lambda logits, batch: jnp.zeros(3)), r"choice of a teacher is float32 \[3\]"),
        (lambda: together(Z, {"inputs": BATCH["inputs"]}, choose="right"), "the batch has none"),
        (lambda: distill.low_precision(PLAIN, "int4"), "expected one of bfloat16, int8"),
        (lambda: distill.low_precision(PLAIN, "int8").apply(*drawn(PLAIN), BATCH), "are not int8"),
        (lambda: distill.low_precision(PLAIN, "bfloat16").apply(*drawn(PLAIN), BATCH), "not bfloat16"),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_each_teacher_is_partitioned_by_its_own_rules():
    mesh = parallel.make_mesh("data=2,fsdp=2,tensor=2")
    anchored = adapters.plain(
        lambda key, inputs: {"a": jnp.ones((8, 8)), "b": {"a": jnp.ones((8, 8))}},
        lambda params, inputs: inputs @ params["a"][:D, :C],
        rules=(("^a$", ("tensor",)), ("[^x]/a", ("fsdp", "tensor")), (".*", ())),
    )
    members = [BIG, anchored, distill.low_precision(BIG, "int8"), distill.ensemble([anchored, PLAIN])]
    model = distill.ensemble(members)
    shapes = jax.eval_shape(model.init, jax.random.key(0), BATCH)[0]
    found = parallel.partition(shapes, model.rules, mesh)
    for i, member in enumerate(members):
        want = parallel.partition(shapes[str(i)], member.rules, mesh)
        assert jax.tree.map(lambda s: s.spec, found[str(i)]) == jax.tree.map(lambda s: s.spec, want)
    assert found["1"]["a"].spec == found["3"]["0"]["a"].spec == jax.sharding.PartitionSpec("tensor")
    assert found["1"]["b"]["a"].spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    kernel = found["2"]["layers"]["up"]["kernel"]
    assert kernel.values.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert kernel.scale.spec == jax.sharding.PartitionSpec(None, None, "tensor")


NETWORKS = {
    "residual": (Residual(layers=6, width=64, neurons=128), (D,)),
    "decoder": (Decoder(layers=3, width=64, heads=4, kv_heads=2, neurons=128), (8,)),
    "resnet": (ResNet(depth=8, width=8), (4, 4, 3)),
}


@functools.cache
def network(name):
    """(model, params, state, batch)."""
    config, shape = NETWORKS[name]
    model = config.build(shape, 32)
    inputs = RNG.integers(0, 32, (4, *shape)).astype(np.int32) if name == "decoder" else RNG.normal(size=(4, *shape))
    batch = {"inputs": jnp.asarray(inputs, None if name == "decoder" else jnp.float32), "id": jnp.arange(4)}
    return model, *drawn(model, batch), batch


def compiled(model, params, state, batch):
    return jax.jit(lambda p, s, b: model.apply(p, s, b)[0].logits).lower(params, state, batch).compile()


@pytest.mark.parametrize("name", NETWORKS)
def test_int8_is_what_numpy_makes_of_it_and_stays_int8(name):
    model, params, state, batch = network(name)
    small = distill.low_precision(model, "int8")
    low = jax.jit(small.convert)(params, batch)
    exact, made = trees.paths(params), {path: leaf for path, leaf in _leaves(low).items() if isinstance(leaf, Int8)}
    assert {path for path in exact if path.split("/")[-1] in ("kernel", "embedding")} == set(made)
    for path, leaf in made.items():
        x, scale = np.asarray(exact[path], np.float64), np.asarray(leaf.scale, np.float64)
        (axis,) = [i for i, (a, b) in enumerate(zip(x.shape, scale.shape)) if a != b]
        np.testing.assert_allclose(scale, np.abs(x).max(axis, keepdims=True) / 127, rtol=1e-6)
        assert np.abs(x - np.asarray(leaf.values, np.float64) * scale).max() <= 0.5 * scale.max() * (1 + 1e-5)
    dense = jax.tree.map(lambda x: x.dense() if isinstance(x, Int8) else x, low, is_leaf=lambda x: isinstance(x, Int8))
    run = compiled(small, low, state, batch)
    found, want = run(low, state, batch), compiled(model, dense, state, batch)(dense, state, batch)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
    right = compiled(model, params, state, batch)
    gap = np.linalg.norm(found - right(params, state, batch)) / np.linalg.norm(right(params, state, batch))
    assert 1e-4 < gap < 0.05
    # A quarter of the kernels' bytes, and the scales; the program is given no more, and makes no second copy of a stack.
    kernels = sum(leaf.values.size for leaf in made.values())
    scales = sum(4 * leaf.scale.size for leaf in made.values())
    rest = trees.nbytes(params) - 4 * kernels
    assert trees.nbytes(low) == kernels + scales + rest
    assert scales < 0.11 * 4 * kernels
    memory, before = run.memory_analysis(), right.memory_analysis()
    saved = before.argument_size_in_bytes - memory.argument_size_in_bytes
    assert saved == pytest.approx(3 * kernels - scales, rel=0.02)
    if name == "decoder":  # a token that is none is as wrong as without int8
        outside = {**batch, "inputs": batch["inputs"].at[0, 0].set(99)}
        assert np.isnan(run(low, state, outside)[0, 0]).all()
    if name == "residual":
        assert memory.temp_size_in_bytes < before.temp_size_in_bytes + 4 * 64 * 128


def _leaves(low):
    found = jax.tree_util.tree_leaves_with_path(low, is_leaf=lambda x: isinstance(x, Int8))
    return {trees.path_str(path): leaf for path, leaf in found}


def test_bfloat16_is_half_the_bytes_and_near():
    model, params, state, batch = network("residual")
    small = distill.low_precision(model, "bfloat16")
    low = small.convert(params, batch)
    assert trees.nbytes(low) * 2 == trees.nbytes(params)
    run, right = compiled(small, low, state, batch), compiled(model, params, state, batch)
    saved = right.memory_analysis().argument_size_in_bytes - run.memory_analysis().argument_size_in_bytes
    assert saved == pytest.approx(trees.nbytes(low), rel=0.05)
    found, want = run(low, state, batch), right(params, state, batch)
    assert found.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(found - want) / np.linalg.norm(want) < 0.03


TEACHER = distill.ensemble([distill.low_precision(BIG, "int8"), PLAIN], weights=[3, 1], temperature=2.0)
TERMS = {
    "ce": (0.3, losses.cross_entropy_term()),
    "kd": (0.7, losses.on_logits(distill.kd, temperature=2.0)),
    "hint": (0.5, losses.on_features(distill.hint, {"hidden_0": "0/final"}, project="linear")),
}


@functools.cache
def frozen():
    params = {"0": TEACHER.models[0].convert(drawn(BIG)[0], BATCH), "1": drawn(PLAIN)[0]}
    return jax.device_get({"params": params, "model_state": {"0": {}, "1": {}}})


def problem(teacher=TEACHER, terms=None):
    return Problem(STUDENT, terms or TERMS, optax.sgd(0.2), teacher, loss_tx=optax.sgd(0.2))


def placed(teacher, held, mesh):
    return {**held, "params": jax.device_put(held["params"], parallel.partition(held["params"], teacher.rules, mesh))}


@functools.cache
def two_steps(spec, executor="auto"):
    mesh = parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None)
    held = placed(TEACHER, frozen(), mesh)
    state = init_state(problem(), mesh, STUDENT.rules, jax.random.key(0), BATCH, frozen=held)
    step, rows = make_step(problem(), mesh, state, executor), []
    start = jax.device_get(state.params["model"])
    for _ in range(2):
        state, metrics = step(state, held, BATCH)
        rows.append({name: float(value) for name, value in metrics.items()})
    return start, rows, jax.device_get(state.params)


def test_a_student_of_two_learns_their_weighted_average():
    start, rows, _ = two_steps("data=1")
    held, logits = frozen(), []
    for i, (model, params) in enumerate(zip(TEACHER.models, held["params"].values())):
        logits.append(np.asarray(model.apply(params, held["model_state"][str(i)], BATCH)[0].logits, np.float64))
    p = np.average(softmax(np.stack(logits) / 2, -1), axis=0, weights=[3, 1])
    log_q = log_softmax(np.asarray(STUDENT.apply(start, {}, BATCH)[0].logits, np.float64) / 2, -1)
    value = 4 * np.average((p * (np.log(p) - log_q)).sum(-1), weights=BATCH["weights"])
    assert rows[0]["kd"] == pytest.approx(value, rel=1e-4)
    assert rows[1]["kd"] < rows[0]["kd"]


@pytest.mark.parametrize(
    ("spec", "executor"), [("data=8", "replicated"), ("data=2,fsdp=2,tensor=2", "partitioned"), ("data=4,tensor=2", "hybrid")]
)
def test_every_executor_takes_several_teachers(spec, executor):
    (_, want_rows, want), (_, rows, params) = two_steps("data=1"), two_steps(spec, executor)
    for one, other in zip(want_rows, rows):
        assert other == pytest.approx(one, rel=2e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), want, params)


def test_a_split_teacher_is_born_split_and_never_gathered():
    wide, mesh = Residual(layers=4, width=64, neurons=128).build((D,), C), parallel.make_mesh("fsdp=8")
    shapes, model_state = jax.eval_shape(wide.init, jax.random.key(1), BATCH)
    placed = parallel.partition(shapes, wide.rules, mesh)
    params = jax.jit(lambda key: wide.init(key, BATCH)[0], out_shardings=placed)(jax.random.key(1))
    held, terms = {"params": params, "model_state": model_state}, {"kd": (1.0, losses.on_logits(distill.kd, temperature=2.0))}
    task = problem(wide, terms)
    state = init_state(task, mesh, STUDENT.rules, jax.random.key(0), BATCH, frozen=held)
    program = cost.compiled(make_step(task, mesh, state), state, held, BATCH)
    # The four stacks of kernels are split; on each device they are an eighth.
    kernels = sum(leaf.size for path, leaf in trees.paths(params).items() if re.search("layers/(up|down)/kernel", path))
    figures = cost.measure(program, task, state, held, BATCH)
    assert figures["argument_bytes"] < trees.nbytes(params) - 0.8 * 4 * kernels
    assert figures["temporary_bytes"] < 0.2 * 4 * kernels
    gathered = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", program.as_text())
    sizes = [int(np.prod([int(n) for n in shape.split(",")])) for shape in gathered if shape]
    assert max(sizes, default=0) < 64 * 128 / 2  # not even half of one layer's kernel
    _, metrics = program(state, held, BATCH)
    alone = wide.apply(jax.device_get(params), {}, BATCH)[0].logits
    fresh = init_state(task, mesh, STUDENT.rules, jax.random.key(0), BATCH, frozen=held).params["model"]
    value = distill.kd(STUDENT.apply(jax.device_get(fresh), {}, BATCH)[0].logits, alone, 2.0)
    assert float(metrics["kd"]) == pytest.approx(np.average(value, weights=BATCH["weights"]), rel=1e-4)


def test_what_a_step_costs_is_counted_by_hand(tmp_path):
    mesh = parallel.make_mesh("data=1", jax.devices()[:1])
    held = placed(PLAIN, dict(zip(("params", "model_state"), drawn(PLAIN))), mesh)
    task = problem(PLAIN, {name: TERMS[name] for name in ("ce", "kd")})
    state = init_state(task, mesh, STUDENT.rules, jax.random.key(0), BATCH, frozen=held)
    program = cost.compiled(make_step(task, mesh, state), state, held, BATCH)
    figures = cost.measure(program, task, state, held, BATCH)
    # The step reads no ids and never the key, which passes through; everything else is an argument.
    read = trees.nbytes(held["params"]) + trees.nbytes(state) + trees.nbytes({k: v for k, v in BATCH.items() if k != "id"})
    assert read - 64 <= figures["argument_bytes"] <= read + 64
    assert figures["aliased_bytes"] >= trees.nbytes(state.params)
    parts = [figures[f"{name}_bytes"] for name in ("argument", "temporary", "output", "aliased")]
    assert figures["peak_bytes"] == sum(parts[:3]) - parts[3]
    student, teacher = D * 8 + 8 * C, D * 8 + 8 * 8 + 8 * C
    assert figures["teacher_flops_share"] == pytest.approx(teacher / (3 * student + teacher))
    mean = Problem(STUDENT, {"ce": TERMS["ce"]}, optax.sgd(0.1), ema=0.9, mean_teacher=True)
    average = init_state(mean, mesh, STUDENT.rules, jax.random.key(0), BATCH)
    assert cost.measure(program, mean, average, None, BATCH)["teacher_flops_share"] == pytest.approx(0.25)
    share = cost.teacher_time_share(program, task, state, held, BATCH, mesh, pairs=3)
    assert 0 < share < 2
    assert jax.device_get(state.step) == 0  # the state that will be trained is still there
    for name in ("teacher", "student"):
        cost.note(tmp_path, name, figures)
    assert cost.noted(tmp_path) == {"teacher": figures, "student": figures} == json.loads((tmp_path / cost.FILE).read_text())


def test_consistency_is_the_mean_square_of_the_probabilities():
    p, q = softmax(Z[0].astype(np.float64) / 3, -1), softmax(Z[1].astype(np.float64) / 3, -1)
    np.testing.assert_allclose(distill.consistency(Z[0], Z[1], 3.0), ((p - q) ** 2).mean(-1), rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(distill.consistency(Z[0], Z[0]), np.zeros(B))
    slope = jax.grad(lambda s: distill.consistency(s, 1e4 * Z[1]).sum())(jnp.asarray(1e4 * Z[0]))
    assert np.isfinite(slope).all()
    with pytest.raises(ValueError, match="must agree"):
        distill.consistency(Z[0], Z[1][:1])
