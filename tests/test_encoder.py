"""Text classifiers against the same arithmetic in NumPy float64: what padding is, and that it changes nothing."""

import functools

import formulas
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from formulas import check_outputs, check_slopes, close, cross_entropy, dense, layernorm, per_layer, transformer, wide

from bmjax import config, data, shrink, trace, trees
from bmjax.jobs import architecture
from bmjax.models import Decoder, Encoder, Plain
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
    return formulas.random_params(MODELS[name], batch())


def forward(p, made, ids, real):
    """(logits, features); `real` is [B, T]."""
    embed = p["embed"]["embedding"][ids] + p["position"][: ids.shape[1]]
    mask = np.broadcast_to(real[:, None, :], (*real.shape, real.shape[1]))
    x, found = transformer(p, embed, made.norm, made.mlp, mask)
    x = x[:, 0] if made.pool == "first" else (x * real[..., None]).sum(1) / real.sum(1, keepdims=True)
    return dense(x, p["head"]), {"embed": embed, **found, "final": x}


def real(name):
    return np.ones((B, T), bool) if CONFIGS[name].pad is None else tokens() != PAD


@functools.cache
def reference(name):
    return forward(wide(random_params(name)), CONFIGS[name], tokens(), real(name))


@functools.cache
def compiled(name):
    model = MODELS[name]
    return jax.jit(lambda p, b: model.apply(p, {}, b)[0].logits)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spec", ["data=1", "data=8", "data=2,fsdp=2,tensor=2"])
def test_forward_and_every_feature_on_every_mesh(name, spec):
    check_outputs(MODELS[name], random_params(name), batch(), spec, reference(name))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_against_finite_differences(name):
    """Along a random direction in each parameter: the slope of the NumPy model's loss."""
    params, targets = wide(random_params(name)), np.arange(B) % C
    value = lambda p: cross_entropy(forward(p, CONFIGS[name], tokens(), real(name))[0], targets)
    logits = lambda p: MODELS[name].apply(p, {}, {"inputs": tokens()})[0].logits
    loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(logits(p), targets).mean()
    with jax.enable_x64(True):  # but for the softmax of attention, which is float32 whatever it is given
        slopes = jax.device_get(jax.jit(jax.grad(loss))(params))
    check_slopes(value, slopes, params, step=1e-4, rtol=1e-5, atol=1e-6)


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
    params = wide(random_params("bert"))
    alone = lambda part: forward(params, BERT, tokens()[:, part], np.ones((B, part.stop - part.start), bool))[1]["layers/1"]
    x = layernorm(np.concatenate([alone(slice(0, 3)), alone(slice(3, 5))], 1), params["final_norm"]).mean(1)
    close(found, dense(x, params["head"]))
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
        (
            lambda: jax.eval_shape(compiled("gated"), random_params("gated"), {"inputs": np.zeros((2, T + 1), np.int32)}),
            f"{T + 1} tokens are longer than the {T} learned positions",
        ),
        (
            lambda: MODELS["bert"].init(jax.random.key(0), {"inputs": np.zeros((2, T + 3), np.int32)}),
            f"{T + 3} tokens are longer than the {T + 2} learned positions",
        ),
        (
            lambda: MODELS["bert"].apply(random_params("bert"), {}, {"inputs": np.zeros((2, T), np.float32)}),
            "needs sequences .* of ints; the inputs are float32",
        ),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def dataset(name, inputs, **more):
    rows = {"train": np.arange(20), "valid": np.arange(20, 25), "test": np.arange(25, 30)}
    return data.build(name, inputs, np.arange(30) % C, rows, class_names=["a", "b", "c", "d"], **more)


def texts(length=T, ids=V):
    """A dataset of token ids with a class each, the largest id in it."""
    inputs = np.arange(30 * length).reshape(30, length) % ids
    return dataset("made", inputs.astype(np.int32), vocabulary=ids)


def rebuilt(made, dataset):
    """As an evaluation and a pretrained teacher do it."""
    return architecture.rebuild({"model": config.to_dict(made)}, dataset)


@pytest.mark.parametrize("entry", [architecture.build, rebuilt])
def test_the_datas_vocabulary_and_length_are_compared_with_the_models(entry, monkeypatch):
    assert entry(Encoder(vocabulary=V), texts()).vocabulary == V
    assert entry(Encoder(vocabulary=V + 1), texts()).vocabulary == V + 1
    monkeypatch.setattr(jax, "jit", lambda *args, **kwargs: pytest.fail("something was compiled"))
    with pytest.raises(ValueError, match=f"a vocabulary of {V - 1} ids and made one of {V}; give .* at least as many"):
        entry(Encoder(vocabulary=V - 1), texts())
    with pytest.raises(ValueError, match=r"a vocabulary of 4 ids and made one of 11; .* or take a model for these data"):
        entry(Decoder(), texts())  # a language model's vocabulary is its number of classes
    with pytest.raises(ValueError, match="9 tokens are longer than the 8 learned positions"):
        entry(Encoder(vocabulary=V, length=8), texts(9))
    with pytest.raises(ValueError, match="the model takes token ids and the inputs of real are none"):
        entry(Encoder(), dataset("real", np.random.default_rng(0).normal(size=(30, T))))
    with pytest.raises(
        ValueError, match="the inputs of made are token ids and Plain takes numbers; take a Decoder or an Encoder"
    ):
        entry(Plain(), texts())


def test_configs_build_what_they_say():
    spec = BlockSpec(2, 2, 4, N, "layernorm", "gelu", bias=True)
    assert MODELS["bert"].module == TextClassifier(spec, L, W, V, C, T + 2)
    spec = BlockSpec(4, 4, 6, N, "rmsnorm", "geglu", qk_norm=True)
    assert MODELS["gated"].module == TextClassifier(spec, L, W, V, C, T, pad=PAD, pool="first")
