"""Text classifiers against the same arithmetic in NumPy float64: what padding is, and that it changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoder import attention, close, layernorm, mlp, per_layer, project, rmsnorm

from bmjax import config, parallel, shrink, trace, trees
from bmjax.models import Encoder
from bmjax.models.block import BlockSpec
from bmjax.models.encoder import TextClassifier

B, T, V, C, L, W, N = 8, 6, 11, 4, 2, 8, 12
PAD = 3
BERT = Encoder(vocabulary=V, layers=L, width=W, heads=2, neurons=N, length=T + 2)
SIZES = {"vocabulary": V, "layers": L, "width": W, "heads": 4, "head_dim": 6, "neurons": N, "length": T}
GATED = Encoder(**SIZES, norm="rmsnorm", mlp="geglu", bias=False, qk_norm=True, pad=PAD, pool="first")
CONFIGS = {"bert": BERT, "gated": GATED}
MODELS = {name: made.build((T,), C) for name, made in CONFIGS.items()}


@functools.cache
def tokens():
    ids = np.random.default_rng(0).integers(4, V, (B, T)).astype(np.int32)
    ids[1::2, 4:] = PAD
    return ids


def batch():
    return {"inputs": tokens(), "id": np.arange(B, dtype=np.int32), "weights": np.ones(B, np.float32)}


@functools.cache
def random_params(name):
    shapes, _ = jax.eval_shape(MODELS[name].init, jax.random.key(0), batch())
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape)).astype(np.float32), shapes)


class Formula:
    """What the decoder's NumPy attention asks of a config."""

    def __init__(self, made):
        self.qk_norm, self.positions, self.mlp = made.qk_norm, "learned", made.mlp


def forward(p, made, ids, real):
    """(logits, features); `real` is [B, T]."""
    norm = {"rmsnorm": rmsnorm, "layernorm": layernorm}[made.norm]
    x = p["embed"]["embedding"][ids] + p["position"][: ids.shape[1]]
    found = {"embed": x}
    mask = np.broadcast_to(real[:, None, :], (*real.shape, real.shape[1]))
    for i in range(made.layers):
        layer = jax.tree.map(lambda stacked, i=i: stacked[i], p["layers"])
        branch = attention(norm(x, layer["norm_attention"]), layer["attention"], Formula(made), None, mask)
        found[f"layers/{i}/attention"], x = branch, x + branch
        branch = mlp(norm(x, layer["norm_mlp"]), layer, Formula(made))
        found[f"layers/{i}/mlp"], x = branch, x + branch
        found[f"layers/{i}"] = x
    x = norm(x, p["final_norm"])
    x = x[:, 0] if made.pool == "first" else (x * real[..., None]).sum(1) / real.sum(1, keepdims=True)
    found["final"] = x
    return project(x, p["head"], "bd,dc->bc"), found


@functools.cache
def reference(name):
    params = jax.tree.map(lambda x: x.astype(np.float64), random_params(name))
    real = np.ones((B, T), bool) if CONFIGS[name].pad is None else tokens() != PAD
    return forward(params, CONFIGS[name], tokens(), real)


@functools.cache
def compiled(name):
    model = MODELS[name]
    return jax.jit(lambda p, b: model.apply(p, {}, b)[0].logits)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spec", ["data=1", "data=8", "data=2,fsdp=2,tensor=2"])
def test_forward_and_every_feature_on_every_mesh(name, spec):
    model, (logits, features) = MODELS[name], reference(name)
    assert set(model.features) == set(features)
    mesh = parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None)
    params = jax.device_put(random_params(name), parallel.partition(random_params(name), model.rules, mesh))
    run = jax.jit(lambda p, b: model.apply(p, {}, b, capture=model.features)[0])
    found = jax.device_get(run(params, parallel.put_batch(batch(), mesh)))
    close(found.logits, logits)
    for feature in features:
        close(found.features[feature], features[feature])
    hidden, kernel, bias = found.head
    close(hidden @ kernel + bias, logits)


def test_padding_by_id_weights_or_segments_is_the_shorter_row():
    params, real = random_params("bert"), tokens() != PAD
    short = np.asarray(compiled("bert")(params, {"inputs": tokens()[1::2, :4]}))
    for extra in ({"weights": real.astype(np.float32)}, {"segments": real.astype(np.int32)}):
        close(compiled("bert")(params, {"inputs": tokens(), **extra})[1::2], short)
    by_id = Encoder(**{**vars(BERT), "pad": PAD}).build((T,), C)
    close(jax.jit(lambda p: by_id.apply(p, {}, {"inputs": tokens()})[0].logits)(params)[1::2], short)
    whole = compiled("bert")(params, {"inputs": tokens(), "weights": np.ones(B, np.float32)})  # [B] is no mask of tokens
    assert np.abs(whole[1::2] - short).max() > 1e-2


def test_attention_goes_both_ways_but_not_between_segments():
    segments = np.repeat([[1, 1, 1, 2, 2, 0]], B, axis=0).astype(np.int32)
    places = np.repeat([[0, 1, 2, 0, 1, 0]], B, axis=0).astype(np.int32)
    found = compiled("bert")(random_params("bert"), {"inputs": tokens(), "segments": segments, "positions": places})
    params = jax.tree.map(lambda x: x.astype(np.float64), random_params("bert"))
    alone = lambda part: forward(params, BERT, tokens()[:, part], np.ones((B, part.stop - part.start), bool))[1]["layers/1"]
    x = layernorm(np.concatenate([alone(slice(0, 3)), alone(slice(3, 5))], 1), params["final_norm"]).mean(1)
    close(found, project(x, params["head"], "bd,dc->bc"))
    changed = tokens().copy()
    changed[:, 5] = (changed[:, 5] + 1) % V
    inputs = {"inputs": changed, "segments": segments, "positions": places}
    np.testing.assert_array_equal(compiled("bert")(random_params("bert"), inputs), found)


def test_a_row_of_padding_only_is_finite():
    inputs = {"inputs": tokens(), "weights": np.zeros((B, T), np.float32)}
    slopes = jax.jit(jax.grad(lambda p: MODELS["bert"].apply(p, {}, inputs)[0].logits.sum()))(random_params("bert"))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_bfloat16_parameters_give_bfloat16_logits():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_params("bert"))
    found = compiled("bert")(half, {"inputs": tokens()})
    assert found.dtype == jnp.bfloat16
    logits = reference("bert")[0]
    assert np.abs(np.asarray(found, np.float64) - logits).max() < 0.1 * np.abs(logits).max()


COUNTS = {
    "bert": V * W + (T + 2) * W + L * (4 * W + 4 * (W + 1) * W + (W + 1) * N + (N + 1) * W) + 2 * W + (W + 1) * C,
    "gated": V * W + T * W + L * (2 * W + 4 * W * 24 + 2 * 6 + 3 * W * N) + W + (W + 1) * C,
}
PRODUCTS = {
    "bert": L * (4 * T * W * W + 2 * T * T * W + 2 * T * W * N) + W * C,
    "gated": L * (4 * T * W * 24 + 2 * T * T * 24 + 3 * T * W * N) + W * C,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_flops_have_their_closed_form(name):
    assert trees.size(random_params(name)) == COUNTS[name]
    run = lambda p, x: MODELS[name].apply(p, {}, {"inputs": x})[0].logits
    assert trace.flops(run, random_params(name), jax.ShapeDtypeStruct((B, T), jnp.int32)) == 2 * B * PRODUCTS[name]


@pytest.mark.parametrize("name", MODELS)
def test_masked_model_equals_the_resized_model(name):
    model, params = MODELS[name], random_params(name)
    logits = lambda model: jax.jit(lambda p, x: model.apply(p, {}, {"inputs": x})[0].logits)
    traced = trace.trace(logits(model), params, tokens(), names=model.axes)
    groups = {group.name: group for group in traced.groups}
    assert all(groups[size].note == "" for size in ("layers", "heads", "neurons"))
    heads = CONFIGS[name].heads
    keeps = {
        "layers": np.array([False, True]),
        "heads": per_layer(L, heads, heads // 2, 1),
        "neurons": per_layer(L, N, 5, 2),
    }
    mask = trace.masks(traced.groups, keeps, params)
    masked = jax.tree.map(lambda leaf, keep: np.where(keep, leaf, 0), params, mask)
    small = shrink.compact(params, traced.groups, keeps)
    smaller = model.resize(shrink.sizes(traced.groups, keeps))
    fresh = jax.eval_shape(lambda: smaller.init(jax.random.key(0), batch())[0])
    assert trees.first_difference(fresh, small) == ""
    assert shrink.verify(logits(model), masked, logits(smaller), small, tokens()) <= 1e-5
    assert set(model.axes) == set(smaller.axes) == {"layers", "heads", "neurons", "width"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Encoder(length=8).build((9,), C), "9 tokens are longer than the 8 learned positions; raise `length`"),
        (lambda: Encoder().build((8, 8, 1), C), r"needs sequences \[T\] of ints; the data has \[8, 8, 1\]"),
        (lambda: Encoder(width=60, heads=8).build((T,), C), "width 60 does not divide into 8 heads"),
        (lambda: Encoder(vocabulary=10, pad=10).build((T,), C), "pad is 10; expected an id below the vocabulary of 10"),
        (lambda: config.validate(Encoder(pad=-1)), "pad is -1"),
        (lambda: config.validate(Encoder(pool="max")), "pool is 'max'; expected one of mean, first"),
        (
            lambda: MODELS["gated"].apply(random_params("gated"), {}, {"inputs": np.zeros((2, T + 1), np.int32)}),
            f"{T + 1} tokens are longer than the {T} learned positions",
        ),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_configs_build_what_they_say():
    spec = BlockSpec(2, 2, 4, N, "layernorm", "gelu", bias=True)
    assert MODELS["bert"].module == TextClassifier(spec, L, W, V, C, T + 2)
    spec = BlockSpec(4, 4, 6, N, "rmsnorm", "geglu", qk_norm=True)
    assert MODELS["gated"].module == TextClassifier(spec, L, W, V, C, T, pad=PAD, pool="first")
