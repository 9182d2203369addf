"""The networks against the same arithmetic in NumPy float64, on one and on eight devices."""

import functools

import formulas
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from formulas import check_outputs, check_slopes, close, cross_entropy, dense, layernorm, layers_of, mlp, transformer, wide

from bmjax import config, parallel, trace, trees
from bmjax.models import LinenModel, Plain, Residual, Transformer
from bmjax.models.mlp import PlainMLP, ResidualMLP
from bmjax.models.vit import ViT

B = 8
SHAPE = (4, 4, 3)
MODELS = {
    "plain": LinenModel(PlainMLP((8, 6, 4), classes=4)),
    "residual": LinenModel(ResidualMLP(layers=3, width=8, neurons=12, classes=4)),
    "vit": LinenModel(ViT(patch=2, layers=3, width=8, heads=2, head_dim=6, neurons=12, classes=4)),
}
MESHES = ["data=1", "data=8", "data=2,fsdp=2,tensor=2", "fsdp=8"]


@functools.cache
def inputs():
    return np.random.default_rng(0).normal(size=(B, *SHAPE)).astype(np.float32)


def batch():
    return {"inputs": inputs(), "id": np.arange(B, dtype=np.int32)}


@functools.cache
def random_params(name):
    return formulas.random_params(MODELS[name], batch())


def plain(p, x):
    x, found = x.reshape(B, -1), {}
    for i in range(3):
        x = found[f"hidden_{i}"] = np.maximum(dense(x, p[f"hidden_{i}"]), 0)
    return dense(x, p["head"]), found


def residual(p, x):
    x = dense(x.reshape(B, -1), p["embed"])
    found = {"embed": x}
    for i, layer in enumerate(layers_of(p)):
        branch = found[f"layers/{i}/mlp"] = mlp(layernorm(x, layer["norm"]), layer, "gelu")
        x = found[f"layers/{i}"] = x + branch
    x = found["final"] = layernorm(x, p["final_norm"])
    return dense(x, p["head"]), found


def vit(p, x):
    tiles = [x[:, i : i + 2, j : j + 2].reshape(B, 1, -1) for i in (0, 2) for j in (0, 2)]
    embed = dense(np.concatenate(tiles, 1), p["embed"]) + p["position"]
    x, found = transformer(p, embed, "layernorm", "gelu", np.ones((B, 4, 4), bool))
    return dense(x.mean(1), p["head"]), {"embed": embed, **found, "final": x.mean(1)}


FORWARD = {"plain": plain, "residual": residual, "vit": vit}


@functools.cache
def reference(name):
    """(logits, features) in float64."""
    return FORWARD[name](wide(random_params(name)), inputs().astype(np.float64))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spec", MESHES)
def test_forward_and_every_feature_on_every_mesh(name, spec):
    check_outputs(MODELS[name], random_params(name), batch(), spec, reference(name))


@pytest.mark.parametrize("name", MODELS)
def test_the_rules_split_the_big_kernels_and_leave_vectors_whole(name):
    mesh = parallel.make_mesh("data=2,fsdp=2,tensor=2")
    shardings = trees.paths(parallel.partition(random_params(name), MODELS[name].rules, mesh))
    split = {path for path, sharding in shardings.items() if any(sharding.spec)}
    assert split
    assert all(path.endswith("kernel") for path in split)
    assert {path for path in shardings if "/up/" in path or "/down/" in path or "hidden_0" in path} & split


@pytest.mark.parametrize("name", MODELS)
def test_only_what_is_asked_for_is_captured(name):
    model = MODELS[name]
    last = model.features[-2]
    apply = lambda **kwargs: jax.eval_shape(lambda p: model.apply(p, {}, batch(), **kwargs), random_params(name))
    outputs, model_state = apply(capture=(last,))
    assert (set(outputs.features), model_state) == ({last}, {})
    assert apply()[0].features == {}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_against_finite_differences(name):
    """Along a random direction in each parameter: the slope of the NumPy model's loss."""
    params, x, targets = wide(random_params(name)), inputs().astype(np.float64), np.arange(B) % 4
    value = lambda p: cross_entropy(FORWARD[name](p, x)[0], targets)
    logits = lambda p: MODELS[name].apply(p, {}, {"inputs": x})[0].logits
    loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(logits(p), targets).mean()
    with jax.enable_x64(True):  # but for the softmax of attention, which is float32 whatever it is given
        slopes = jax.device_get(jax.jit(jax.grad(loss))(params))
    check_slopes(value, slopes, params, step=1e-4, rtol=1e-5, atol=1e-6 if name == "vit" else 1e-9)


D, W, N, C, L, T, HK = 48, 8, 12, 4, 3, 4, 12
COUNTS = {
    "plain": (D + 1) * 8 + (8 + 1) * 6 + (6 + 1) * 4 + (4 + 1) * C,
    "residual": (D + 1) * W + L * (2 * W + (W + 1) * N + (N + 1) * W) + 2 * W + (W + 1) * C,
    "vit": (12 + 1) * W + T * W + L * (4 * W + 3 * (W + 1) * HK + (HK + 1) * W + (W + 1) * N + (N + 1) * W) + 2 * W + (W + 1) * C,
}
PRODUCTS = {  # multiply-adds of one example
    "plain": D * 8 + 8 * 6 + 6 * 4 + 4 * C,
    "residual": D * W + L * 2 * W * N + W * C,
    "vit": T * 12 * W + L * (4 * T * W * HK + 2 * T * T * HK + 2 * T * W * N) + W * C,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_flops_have_their_closed_form(name):
    assert trees.size(random_params(name)) == COUNTS[name]
    shape = jax.ShapeDtypeStruct((B, *SHAPE), jnp.float32)
    forward = lambda p, x: MODELS[name].apply(p, {}, {"inputs": x})[0].logits
    assert trace.flops(forward, random_params(name), shape) == 2 * B * PRODUCTS[name]


@pytest.mark.parametrize("name", MODELS)
def test_every_size_can_change_and_names_its_axis(name):
    model = MODELS[name]
    now = {size: trees.paths(random_params(name))[path].shape[axis] for size, (path, axis) in model.axes.items()}
    small = model.resize({size: value - 1 for size, value in now.items()})
    shapes = trees.paths(jax.eval_shape(small.init, jax.random.key(0), batch())[0])
    assert {size: shapes[path].shape[axis] for size, (path, axis) in small.axes.items()} == {s: n - 1 for s, n in now.items()}
    assert model.resize({}) == model
    assert hash(small) != hash(model)  # jitted functions are kept by model


def test_sizes_that_resize_changes():
    assert {name: set(model.axes) for name, model in MODELS.items()} == {
        "plain": {"hidden_0", "hidden_1", "hidden_2"},
        "residual": {"layers", "neurons", "width"},
        "vit": {"layers", "heads", "neurons", "width"},
    }


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MODELS["vit"].resize({"tokens": 2}), "no size 'tokens'; it has layers, heads, neurons, width"),
        (lambda: MODELS["residual"].resize({"layers": 0}), "the size 'layers' cannot be 0; at least 1 must stay"),
        (
            lambda: MODELS["vit"].apply(random_params("vit"), {}, batch(), capture=("layers/3",)),
            r"no feature 'layers/3'; the nearest of \d+ are layers/\d",
        ),
        (lambda: Transformer(patch=3).build((8, 8, 1), 10), r"patches of 3 pixels need images .* the data has \[8, 8, 1\]"),
        (lambda: Transformer(patch=2).build((64,), 10), r"patches of 2 pixels need images .* the data has \[64\]"),
        (lambda: config.validate(Transformer(width=60, heads=8)), "width 60 does not divide into 8 heads; .* for example 56"),
        (lambda: config.validate(Residual(layers=0)), "layers"),
        (lambda: config.validate(Residual(dropout=1.0)), "dropout"),
        (lambda: config.validate(Plain(hidden=())), "hidden"),
        (lambda: config.validate(Plain(hidden=(4, 0))), "hidden"),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_configs_build_what_they_say():
    assert Plain().build((64,), 10).module == PlainMLP((128, 64, 32), 10)
    assert Residual(layers=2, width=8, neurons=16, dropout=0.1).build(SHAPE, 5).module == ResidualMLP(2, 8, 16, 5, 0.1)
    built = Transformer(patch=2, layers=2, width=12, heads=3, neurons=16, dropout=0.1).build(SHAPE, 5).module
    assert built == ViT(2, 2, 12, 3, 4, 16, 5, 0.1)


WET = {
    "residual": LinenModel(MODELS["residual"].module.clone(dropout=0.5)),
    "vit": LinenModel(MODELS["vit"].module.clone(dropout=0.5)),
}


@pytest.mark.parametrize("name", WET)
def test_dropout_follows_the_example_and_not_its_place(name):
    model, params = WET[name], random_params(name)
    forward = jax.jit(lambda b, key: model.apply(params, {}, b, train=True, rngs={"dropout": key}, capture=model.features)[0])
    here = forward(batch(), jax.random.key(0))
    order = np.random.default_rng(3).permutation(B)
    there = forward({key: value[order] for key, value in batch().items()}, jax.random.key(0))
    close(there.logits, np.asarray(here.logits)[order])
    branches = [f"layers/{i}/{part}" for i in range(3) for part in ("mlp", "attention") if f"layers/{i}/{part}" in here.features]
    masks = [np.asarray(here.features[branch] == 0) for branch in branches]
    for i, mask in enumerate(masks):  # half is dropped, and no two branches or examples are alike
        assert 0.3 < mask.mean() < 0.7
        assert not any((mask == other).all() for other in masks[:i])
    assert len(np.unique(np.concatenate([mask.reshape(B, -1) for mask in masks], 1), axis=0)) == B
    other = forward(batch(), jax.random.key(1))
    assert np.abs(np.asarray(other.logits) - np.asarray(here.logits)).max() > 1e-2


def test_dropped_activations_keep_their_mean_and_evaluation_drops_nothing():
    from bmjax.models.linen import Dropout

    ones, ids = jnp.ones((4, 4000)), jnp.arange(4)
    found = Dropout(0.25).apply({}, ones, ids, True, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(found)) == {0.0, np.float32(1 / 0.75)}
    np.testing.assert_allclose(found.mean(1), 1, atol=5 * np.sqrt(0.25 / 0.75 / 4000))  # five standard errors
    for name, model in WET.items():
        forward = jax.jit(lambda p, model=model: model.apply(p, {}, batch())[0].logits)
        close(forward(random_params(name)), reference(name)[0])


def test_dropout_without_ids_says_what_it_needs():
    with pytest.raises(ValueError, match=r"dropout needs batch\['id'\]"):
        WET["vit"].apply(random_params("vit"), {}, {"inputs": inputs()}, train=True, rngs={"dropout": jax.random.key(0)})
