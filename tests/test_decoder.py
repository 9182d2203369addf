"""Causal language models against the same arithmetic in NumPy float64, packed and not, on one and on eight devices."""

import dataclasses
import functools

import formulas
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from formulas import check_outputs, check_slopes, close, cross_entropy, dense, per_layer, rotated, transformer, wide

from bmjax import config, losses, parallel, shrink, trace, trees
from bmjax.models import Decoder, LinenModel
from bmjax.models import attention as attend
from bmjax.models.block import BlockSpec
from bmjax.models.decoder import CausalLM
from bmjax.train import Problem, init_state, make_step

B, T, V, L, W, N = 8, 6, 11, 3, 8, 12
LLAMA = Decoder(layers=L, width=W, heads=4, kv_heads=2, head_dim=6, neurons=N, qk_norm=True)
GPT2 = Decoder(
    layers=L, width=W, heads=2, neurons=N, norm="layernorm", positions="learned", length=T, mlp="gelu", bias=True, tied=False
)
GEMMA = Decoder(layers=L, width=W, heads=4, kv_heads=1, head_dim=4, neurons=N, mlp="geglu", tied=False, rope_base=100.0)
CONFIGS = {"llama": LLAMA, "gpt2": GPT2, "gemma": GEMMA}
MODELS = {name: made.build((T,), V) for name, made in CONFIGS.items()}


@functools.cache
def tokens():
    return np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)


def batch():
    return {"inputs": tokens(), "id": np.arange(B, dtype=np.int32)}


@functools.cache
def random_params(name):
    return formulas.random_params(MODELS[name], batch())


def forward(p, made, ids, positions, mask):
    """(logits, features) of a language model; mask is [B, T, T]."""
    x = p["embed"]["embedding"][ids]
    base = made.rope_base if made.positions == "rope" else None
    if base is None:
        x = x + p["position"][positions]
    end, found = transformer(p, x, made.norm, made.mlp, mask, positions, base)
    logits = end @ p["embed"]["embedding"].T if made.tied else dense(end, p["head"])
    return logits, {"embed": x, **found, "final": end}


CAUSAL = np.tril(np.ones((T, T), bool))


@functools.cache
def reference(name):
    places = np.broadcast_to(np.arange(T), (B, T))
    return forward(wide(random_params(name)), CONFIGS[name], tokens(), places, np.broadcast_to(CAUSAL, (B, T, T)))


@functools.cache
def compiled(name):
    model = MODELS[name]
    return jax.jit(lambda p, b: model.apply(p, {}, b)[0].logits)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spec", ["data=1", "data=8", "data=2,fsdp=2,tensor=2"])
def test_forward_and_every_feature_on_every_mesh(name, spec):
    found = check_outputs(MODELS[name], random_params(name), batch(), spec, reference(name))
    assert (found.head[2] is None) == (name != "gpt2")


def test_the_rules_split_every_kernel_and_the_table():
    mesh = parallel.make_mesh("data=2,fsdp=2,tensor=2")
    for name, model in MODELS.items():
        shardings = trees.paths(parallel.partition(random_params(name), model.rules, mesh))
        split = {path for path, sharding in shardings.items() if any(sharding.spec)}
        assert split == {path for path in shardings if path.endswith(("kernel", "embedding"))}


def step_once(spec, data):
    """The parameters after one step of SGD, which shows gradients that are N times too large."""
    model, mesh = MODELS["llama"], parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None)
    problem = Problem(model, {"ce": (1.0, losses.cross_entropy_term())}, optax.sgd(0.1))
    state = init_state(problem, mesh, model.rules, jax.random.key(0), data, params=random_params("llama"))
    state, metrics = make_step(problem, mesh, state)(state, None, data)
    return jax.device_get(state.params["model"]), float(metrics["ce"])


def test_a_packed_step_is_the_same_on_every_mesh():
    rng = np.random.default_rng(4)
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
    weights = rng.integers(0, 2, (B, T)).astype(np.float32)
    data = {**batch(), "targets": rng.integers(0, V, (B, T)).astype(np.int32), "weights": weights, "segments": segments}
    params, loss = step_once("data=1", data)
    mask = CAUSAL & (segments[:, :, None] == segments[:, None, :])
    places = np.stack([[i - list(row).index(row[i]) for i in range(T)] for row in segments])
    logits, _ = forward(wide(random_params("llama")), LLAMA, tokens(), places, mask)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    hit = np.take_along_axis(log_p, data["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, -(weights * hit).sum() / weights.sum(), rtol=1e-5)
    for spec in ("data=8", "data=2,fsdp=2,tensor=2"):
        others, other_loss = step_once(spec, data)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), others, params)


@pytest.mark.parametrize("name", MODELS)
def test_later_tokens_do_not_matter(name):
    changed = tokens().copy()
    changed[:, 4:] = (changed[:, 4:] + 1) % V
    before, after = (np.asarray(compiled(name)(random_params(name), {"inputs": x})) for x in (tokens(), changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max(axis=(0, 2)).min() > 1e-3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("given", [True, False])
def test_two_segments_in_one_row_are_two_rows(name, given):
    """Positions may be given or follow from the segments; padding behind them is of segment 0."""
    segments = np.repeat([[1, 1, 2, 2, 2, 0]], B, axis=0).astype(np.int32)
    packed = {"inputs": tokens(), "segments": segments}
    if given:
        packed["positions"] = np.repeat([[0, 1, 0, 1, 2, 0]], B, axis=0).astype(np.int32)
    params = random_params(name)
    logits = compiled(name)(params, packed)
    close(logits[:, :2], reference(name)[0][:, :2])
    second = np.roll(tokens(), -2, axis=1)  # the causal mask hides what is rolled to the end
    close(logits[:, 2:5], compiled(name)(params, {"inputs": second})[:, :3])
    assert np.isfinite(logits).all()


def test_positions_within_segments():
    segments = jnp.array([[1, 1, 1, 2, 3, 3], [5, 5, 0, 0, 0, 0], [1, 2, 1, 1, 2, 2]])
    expected = [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3], [0, 0, 0, 1, 0, 1]]
    np.testing.assert_array_equal(attend.segment_positions(segments), expected)


def test_rope_against_complex_numbers_and_only_distances_matter():
    rng = np.random.default_rng(5)
    q, k = rng.normal(size=(2, 2, 5, 3, 8))
    positions = rng.integers(0, 1000, (2, 5))
    turned = lambda x, shift: attend.rotate(jnp.asarray(x, jnp.float32), attend.rope(jnp.asarray(positions + shift), 8, 500.0))
    np.testing.assert_allclose(turned(q, 0), rotated(q, positions, 500.0), atol=3e-4)  # angles up to 1000 in float32
    scores = lambda shift: jnp.einsum("bthk,bshk->bhts", turned(q, shift), turned(k, shift))
    np.testing.assert_allclose(scores(0), scores(37), atol=2e-3)
    half = attend.rotate(jnp.asarray(q, jnp.bfloat16), attend.rope(jnp.asarray(positions), 8))
    assert half.dtype == jnp.bfloat16


def test_compute_follows_the_parameters_and_statistics_stay_float32():
    """In bfloat16 everything of a layer's size is bfloat16, and every exponential, square root and sine is not."""
    model = MODELS["llama"]
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_params("llama"))
    run = lambda p, x: model.apply(p, {}, {"inputs": x}, capture=model.features)[0]
    outputs = jax.jit(run)(half, tokens())
    dtypes = {name: x.dtype for name, x in trees.paths(outputs).items()}
    assert {name for name in dtypes if dtypes[name] == jnp.float32} == {name for name in dtypes if name.endswith("scores")}
    assert set(dtypes.values()) == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}
    logits = reference("llama")[0]
    assert np.abs(np.asarray(outputs.logits, np.float64) - logits).max() < 0.1 * np.abs(logits).max()
    text = str(jax.make_jaxpr(run)(half, tokens()))
    for operation in ("exp", "rsqrt", "sin", "cos"):
        lines = [line for line in text.splitlines() if f" = {operation} " in line or f" = {operation}[" in line]
        assert lines, operation
        assert all(":f32[" in line.split("=")[0] for line in lines), lines


@pytest.mark.parametrize("name", MODELS)
def test_gradients_against_finite_differences(name):
    """Along a random direction in each parameter: the slope of the NumPy model's loss."""
    params, made, targets = wide(random_params(name)), CONFIGS[name], np.roll(tokens(), -1, 1)
    places, mask = np.broadcast_to(np.arange(T), (B, T)), np.broadcast_to(CAUSAL, (B, T, T))
    value = lambda p: cross_entropy(forward(p, made, tokens(), places, mask)[0], targets)
    logits = lambda p: MODELS[name].apply(p, {}, {"inputs": tokens()})[0].logits
    loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(logits(p), targets).mean()
    with jax.enable_x64(True):  # but for the softmax of attention and the angles, which are float32 whatever they are given
        slopes = jax.device_get(jax.jit(jax.grad(loss))(params))
    check_slopes(value, slopes, params, step=1e-4, rtol=1e-5, atol=1e-6)


COUNTS = {
    "llama": V * W + L * (2 * W + W * 24 + 2 * W * 12 + 24 * W + 2 * 6 + 3 * W * N) + W,
    "gpt2": V * W + T * W + L * (4 * W + 4 * (W + 1) * W + (W + 1) * N + (N + 1) * W) + 2 * W + (W + 1) * V,
    "gemma": V * W + L * (2 * W + W * 16 + 2 * W * 4 + 16 * W + 3 * W * N) + W + W * V,
}
PRODUCTS = {  # multiply-adds of one row: projections, scores and sums over T x T, the MLP, the head
    "llama": L * (T * W * (24 + 12 + 12 + 24) + 2 * T * T * 24 + 3 * T * W * N) + T * W * V,
    "gpt2": L * (4 * T * W * W + 2 * T * T * W + 2 * T * W * N) + T * W * V,
    "gemma": L * (T * W * (16 + 4 + 4 + 16) + 2 * T * T * 16 + 3 * T * W * N) + T * W * V,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_flops_have_their_closed_form(name):
    assert trees.size(random_params(name)) == COUNTS[name]
    run = lambda p, x: MODELS[name].apply(p, {}, {"inputs": x})[0].logits
    assert trace.flops(run, random_params(name), jax.ShapeDtypeStruct((B, T), jnp.int32)) == 2 * B * PRODUCTS[name]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_masked_model_equals_the_resized_model_and_the_replay(name):
    model, params = MODELS[name], random_params(name)
    logits = lambda model: jax.jit(lambda p, x: model.apply(p, {}, {"inputs": x})[0].logits)
    traced = trace.trace(logits(model), params, tokens(), names=model.axes)
    groups = {group.name: group for group in traced.groups}
    assert traced.report == ()
    assert {size: groups[size].note for size in ("layers", "kv_heads", "neurons")} == dict.fromkeys(
        ("layers", "kv_heads", "neurons"), ""
    )
    assert (groups["kv_heads"].stack, groups["neurons"].stack) == (L, L)
    assert "statistics" in groups["width"].note
    keeps = {
        "layers": np.array([True, False, True]),
        "kv_heads": per_layer(L, 2, 1, 1),
        "neurons": per_layer(L, N, 5, 2),
    }
    mask = trace.masks(traced.groups, keeps, params)
    masked = jax.tree.map(lambda leaf, keep: np.where(keep, leaf, 0), params, mask)
    small = shrink.compact(params, traced.groups, keeps)
    smaller = model.resize(shrink.sizes(traced.groups, keeps))
    assert smaller.module.block.heads == model.module.block.heads // 2
    fresh = jax.eval_shape(lambda: smaller.init(jax.random.key(0), batch())[0])
    assert trees.first_difference(fresh, small) == ""
    assert shrink.verify(logits(model), masked, logits(smaller), small, tokens()) <= 1e-5
    assert shrink.verify(logits(model), masked, jax.jit(traced.replay(keeps)), small, tokens()) <= 1e-5


def test_every_size_can_change_and_names_its_axis():
    for name, model in MODELS.items():
        now = {size: trees.paths(random_params(name))[path].shape[axis] for size, (path, axis) in model.axes.items()}
        assert set(now) == {"layers", "kv_heads", "neurons", "width"}
        fewer = {size: max(value - 1, 1) for size, value in now.items()}
        small = model.resize(fewer)
        shapes = trees.paths(jax.eval_shape(small.init, jax.random.key(0), batch())[0])
        assert {size: shapes[path].shape[axis] for size, (path, axis) in small.axes.items()} == fewer
        assert model.resize({}) == model
        assert hash(small) != hash(model)


def wetter(name, dropout):
    module = MODELS[name].module
    return LinenModel(module.clone(block=dataclasses.replace(module.block, dropout=dropout)))


def test_dropout_follows_the_example_and_not_its_place():
    model = wetter("gpt2", 0.5)
    run = jax.jit(lambda b: model.apply(random_params("gpt2"), {}, b, train=True, rngs={"dropout": jax.random.key(0)})[0].logits)
    order = np.random.default_rng(3).permutation(B)
    here, there = run(batch()), run({key: value[order] for key, value in batch().items()})
    close(there, np.asarray(here)[order])
    assert np.abs(np.asarray(here) - reference("gpt2")[0]).max() > 1e-2


def too_long():
    """Packed: the positions follow from the segments, and no take may fall outside the table."""
    return {"inputs": np.zeros((2, T + 1), np.int32), "segments": np.ones((2, T + 1), np.int32)}


def apply_cudnn():
    model = Decoder(layers=1, width=8, heads=1, neurons=8, attention="cudnn").build((T,), V)
    return model.init(jax.random.key(0), batch())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Decoder(positions="learned", length=8).build((9,), V), "9 tokens are longer than the 8 learned positions"),
        (lambda: Decoder().build((8, 8, 1), V), r"needs sequences \[T\] of ints; the data has \[8, 8, 1\]"),
        (lambda: Decoder(width=60, heads=8).build((T,), V), "width 60 does not divide into 8 heads; .* as 56"),
        (lambda: Decoder(heads=4, kv_heads=3).build((T,), V), "kv_heads 3 does not divide 4 heads"),
        (lambda: Decoder(head_dim=3).build((T,), V), "rotary positions need heads of an even size; head_dim is 3"),
        (
            lambda: Decoder(length=64).build((T,), V),
            "length is 64, and positions are rope, which do not look at it; leave it out",
        ),
        (lambda: Decoder(positions="learned", rope_base=5e5).build((T,), V), "rope_base is 500000.0, and positions are learned"),
        (lambda: config.validate(Decoder(norm="batchnorm")), "norm is 'batchnorm'; expected one of rmsnorm, layernorm"),
        (lambda: config.validate(Decoder(remat="some")), "remat is 'some'; expected one of none, full, dots, dots_no_batch"),
        (lambda: config.validate(Decoder(kv_heads=0)), "kv_heads"),
        (lambda: MODELS["llama"].resize({"heads": 2}), "no size 'heads'; it has layers, kv_heads, neurons, width"),
        (
            lambda: MODELS["gpt2"].apply(random_params("gpt2"), {}, {"inputs": np.zeros((2, T + 1), np.int32)}),
            f"{T + 1} tokens are longer than the {T} learned positions",
        ),
        (
            lambda: MODELS["gpt2"].apply(random_params("gpt2"), {}, too_long()),
            f"{T + 1} tokens are longer than the {T} learned positions",
        ),
        (
            lambda: MODELS["llama"].apply(random_params("llama"), {}, {"inputs": np.zeros((2, T, 1), np.int32)}),
            r"needs sequences \[T\] of ints; the data has \[6, 1\]",
        ),
        (apply_cudnn, "'cudnn', which needs an NVIDIA GPU; this is a cpu: set attention to 'xla'"),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("dtype", "head_dim", "words"),
    [(jnp.float32, 64, "needs bfloat16 or float16; got float32"), (jnp.bfloat16, 12, "multiple of 8, 256 at most; got 12")],
)
def test_what_cudnn_refuses_on_a_gpu(monkeypatch, dtype, head_dim, words):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attend.check_cudnn(jnp.dtype(jnp.bfloat16), 64)
    with pytest.raises(ValueError, match=words):
        attend.check_cudnn(jnp.dtype(dtype), head_dim)


def test_configs_build_what_they_say():
    spec = BlockSpec(4, 2, 6, N, "rmsnorm", "swiglu", qk_norm=True, causal=True)
    assert MODELS["llama"].module == CausalLM(spec, L, W, V)
    spec = BlockSpec(2, 2, 4, N, "layernorm", "gelu", bias=True, causal=True)
    assert MODELS["gpt2"].module == CausalLM(spec, L, W, V, length=T, tied=False)
