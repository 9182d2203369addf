import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bmjax import shrink, trace, trees
from bmjax.models.linen import LinenModel
from bmjax.models.mlp import ResidualMLP
from bmjax.models.resnet import ResNetModule, Stage
from bmjax.models.vit import ViT
from bmjax.shrink import depth
from bmjax.types import Group, Member


def line(path, axis, size):
    return Member(path, axis, np.arange(size)[:, None])


LAYERS = Group("layers", 3, 0, (line("up", 0, 3), line("down", 0, 3)))
NEURONS = Group("neurons", 4, 3, (line("up", 2, 4), line("down", 1, 4)))
WIDTH = Group("width", 2, 0, (Member("up", 1, np.array([[0, 2], [1, 3]])), Member("out", 0, np.array([[0, 2], [1, 3]]))))
PARAMS = {
    "up": np.arange(3 * 4 * 4, dtype=np.float32).reshape(3, 4, 4),
    "down": np.arange(3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5),
    "out": np.arange(4.0, dtype=np.float32),
}
KEEPS = {
    "layers": np.array([True, False, True]),
    "neurons": np.array([[1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 1, 0]], bool),
    "width": np.array([False, True]),
}


def expected():
    return {
        "up": np.stack([PARAMS["up"][0][[1, 3]][:, [0, 2]], PARAMS["up"][2][[1, 3]][:, [1, 2]]]),
        "down": np.stack([PARAMS["down"][0][[0, 2]], PARAMS["down"][2][[1, 2]]]),
        "out": PARAMS["out"][[1, 3]],
    }


def test_layers_per_layer_neurons_and_strided_blocks_compose_on_one_array():
    small = shrink.compact(PARAMS, (LAYERS, NEURONS, WIDTH), KEEPS)
    jax.tree.map(np.testing.assert_array_equal, small, expected())


def test_compact_of_parameters_on_eight_devices():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = {"up": PartitionSpec(None, "fsdp", "tensor"), "down": PartitionSpec(None, "tensor"), "out": PartitionSpec("fsdp")}
    params = {name: jax.device_put(PARAMS[name], NamedSharding(mesh, spec[name])) for name in PARAMS}
    small = shrink.compact(params, (LAYERS, NEURONS, WIDTH), KEEPS)
    jax.tree.map(np.testing.assert_array_equal, small, expected())


def test_sizes_are_the_kept_counts():
    assert shrink.sizes((LAYERS, NEURONS, WIDTH), KEEPS) == {"layers": 2, "neurons": 2, "width": 1}
    assert shrink.sizes((LAYERS, NEURONS, WIDTH), {"width": np.ones(2, bool)}) == {"width": 2}


@pytest.mark.parametrize(
    ("keeps", "message"),
    [
        ({"neurons": KEEPS["neurons"]}, "'neurons' keeps 2 to 4 elements; every layer must keep as many"),
        ({"width": np.zeros(2, bool)}, "nothing would be left of group 'width'"),
        ({"layers": np.zeros(3, bool), "neurons": KEEPS["neurons"]}, "nothing would be left of group 'layers'"),
        ({"heads": np.ones(2, bool)}, "no group is called 'heads'"),
        ({"neurons": np.ones(4, bool)}, r"shape \[4\], expected \[3, 4\]"),
    ],
)
def test_keeps_that_do_not_fit(keeps, message):
    with pytest.raises(ValueError, match=message):
        shrink.compact(PARAMS, (LAYERS, NEURONS, WIDTH), keeps)


def per_layer(layers, size, kept, seed):
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(size), (layers, 1)), axis=1)
    return order < kept


@pytest.mark.parametrize(
    ("module", "shape", "keeps"),
    [
        (
            ResidualMLP(3, 8, 12, 5),
            (4, 7),
            {"layers": np.array([True, False, True]), "neurons": per_layer(3, 12, 5, 0)},
        ),
        (
            ViT(2, 3, 8, 4, 2, 6, 5),
            (2, 4, 4, 1),
            {"layers": np.array([False, True, True]), "heads": per_layer(3, 4, 3, 1), "neurons": per_layer(3, 6, 2, 2)},
        ),
    ],
)
def test_masked_model_equals_the_resized_model_and_the_replay(module, shape, keeps):
    model, rng = LinenModel(module), np.random.default_rng(3)
    x = rng.normal(size=shape).astype(np.float32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), {"inputs": x})[0])
    params = jax.tree.map(lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(np.float32), params)

    def logits(model):
        return jax.jit(lambda p, x: model.apply(p, {}, {"inputs": x})[0].logits)

    traced = trace.trace(logits(model), params, x, names=model.axes)
    mask = trace.masks(traced.groups, keeps, params)
    masked = jax.tree.map(lambda leaf, keep: np.where(keep, leaf, 0), params, mask)
    small = shrink.compact(params, traced.groups, keeps)
    smaller = model.resize(shrink.sizes(traced.groups, keeps))
    fresh = jax.eval_shape(lambda: smaller.init(jax.random.key(0), {"inputs": x})[0])
    assert trees.first_difference(fresh, small) == ""
    assert shrink.verify(logits(model), masked, logits(smaller), small, x) <= 1e-5
    assert shrink.verify(logits(model), masked, jax.jit(traced.replay(keeps)), small, x) <= 1e-5


RESNET = (Stage(4, 3, 2, 5), Stage(6, 4, 0, 0), Stage(8, 4, 3, 4))
CHANNELS = {
    "stage_0/first_inner": np.array([0, 1, 1], bool),
    "stage_0/inner": per_layer(2, 5, 2, 4),
    "stage_1/first_inner": np.array([1, 0, 0, 1], bool),
    "stage_2/inner": per_layer(3, 4, 3, 5),
    "stage_2/blocks": np.array([1, 0, 1], bool),
}
WIDTHS = {"stage_0/width": np.arange(4) > 0, "stage_1/width": np.arange(6) % 2 == 0, "stage_2/width": np.arange(8) < 3}


@pytest.mark.parametrize(
    ("module", "keeps", "stages"),
    [
        (ResNetModule(RESNET, 5), CHANNELS | WIDTHS, (Stage(3, 2, 2, 2), Stage(3, 2, 0, 0), Stage(3, 4, 2, 3))),
        (ResNetModule(RESNET, 5, project=False), CHANNELS, (Stage(4, 2, 2, 2), Stage(6, 2, 0, 0), Stage(8, 4, 2, 3))),
        (ResNetModule(RESNET, 5, group=2), CHANNELS | WIDTHS, (Stage(3, 2, 2, 2), Stage(3, 2, 0, 0), Stage(3, 4, 2, 3))),
    ],
)
def test_masked_resnet_equals_the_resized_resnet_and_the_replay(module, keeps, stages):
    """Only parameters are masked: the statistics of a dropped channel are any numbers and do not matter."""
    model, rng = LinenModel(module), np.random.default_rng(6)
    x = rng.normal(size=(3, 6, 6, 2)).astype(np.float32)
    params, state = jax.eval_shape(lambda: model.init(jax.random.key(0), {"inputs": x}))
    params = jax.tree.map(lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(np.float32), params)
    state = jax.tree.map(lambda leaf: rng.uniform(0.2, 2, leaf.shape).astype(np.float32), state)

    def logits(model):
        return jax.jit(lambda p, s, x: model.apply(p, s, {"inputs": x})[0].logits)

    traced = trace.trace(logits(model), params, x, names=model.axes, state=state)
    mask = trace.masks(traced.groups, keeps, params)
    masked = jax.tree.map(lambda leaf, keep: np.where(keep, leaf, 0), params, mask)
    small, cut = shrink.compact(params, traced.groups, keeps), shrink.compact_state(state, traced.groups, keeps)
    smaller = model.resize(shrink.sizes(traced.groups, keeps))
    assert smaller.module.stages == stages
    assert trees.first_difference(jax.eval_shape(lambda: smaller.init(jax.random.key(0), {"inputs": x})), (small, cut)) == ""
    expected = np.asarray(logits(model)(masked, state, x))
    for found in (logits(smaller)(small, cut, x), jax.jit(traced.replay(keeps))(small, cut, x)):
        assert np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
    assert np.abs(logits(model)(params, state, x) - expected).max() > 0.1  # what was dropped mattered


def test_a_state_is_cut_like_the_parameters_and_must_have_its_members():
    group = NEURONS._replace(state=(line("mean", 1, 4),))
    mean = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    keeps = {"neurons": np.array([[1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0]], bool)}
    found = shrink.compact_state({"mean": mean}, (LAYERS, group), keeps)
    np.testing.assert_array_equal(found["mean"], [[0, 2], [4, 5], [9, 10]])
    assert shrink.compact_state({}, (LAYERS, NEURONS), keeps) == {}
    with pytest.raises(ValueError, match="'neurons' has the member 'mean', which is no part of the state"):
        shrink.compact_state({"var": mean}, (LAYERS, group), keeps)


def test_verify_refuses_what_differs():
    fn = lambda params, x: params * x
    assert shrink.verify(fn, 2.0, fn, 2.0, jnp.ones(3)) == 0
    # Relative to the largest output, 4: |4 - 4.1| / 4.
    assert shrink.verify(fn, 2.0, fn, 2.05, jnp.full(3, 2.0), tolerance=0.03) == pytest.approx(0.025, rel=1e-5)
    with pytest.raises(ValueError, match=r"differ by 0\.025 where 0\.01 is allowed"):
        shrink.verify(fn, 2.0, fn, 2.05, jnp.full(3, 2.0), tolerance=0.01)
    with pytest.raises(ValueError, match="differ by nan"):
        shrink.verify(fn, 2.0, fn, jnp.nan, jnp.ones(3))
    with pytest.raises(ValueError, match="does not look like"):
        shrink.verify(fn, 2.0, lambda params, x: x[:2], 2.0, jnp.ones(3))


def test_importance_is_one_minus_the_mean_cosine_of_the_weighted_examples():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(4, 3, 5, 6)).astype(np.float32)
    hidden[2] = 3 * hidden[1]  # layer 1 turns nothing
    weights = np.array([1.0, 1.0, 0.0], np.float32)
    x = hidden[:, :2].astype(np.float64)
    cosine = (x[:-1] * x[1:]).sum(-1) / np.linalg.norm(x[:-1], axis=-1) / np.linalg.norm(x[1:], axis=-1)
    hidden[:, 2] = np.nan  # padding cannot poison it
    found = depth.importance(list(hidden), weights)
    np.testing.assert_allclose(found, 1 - cosine.mean(axis=(1, 2)), atol=1e-6)
    assert abs(float(found[1])) < 1e-6


def test_importance_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"L \+ 1"):
        depth.importance([jnp.ones((2, 3))], jnp.ones(2))
    with pytest.raises(ValueError, match="one shape"):
        depth.importance([jnp.ones((2, 3)), jnp.ones((2, 4))], jnp.ones(2))
