"""Sensitivity: curves against NumPy in float64, the sparsities that follow against closed forms and against trying everything."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bmjax import prune, trees
from bmjax.prune.allocation import Part
from bmjax.prune.curves import curve
from bmjax.prune.sensitivity import Sensitivity
from bmjax.types import Group, Member

UP, DOWN, OUT = "layers/up/kernel", "layers/down/kernel", "out/kernel"
NEURONS = Group("neurons", 6, 2, (Member(UP, 2, np.arange(6)[:, None]), Member(DOWN, 1, np.arange(6)[:, None])))
LAYERS = Group("layers", 2, 0, tuple(Member(path, 0, np.arange(2)[:, None]) for path in (UP, DOWN)))
SPARSITIES = (0.0, 0.3, 0.5, 0.9)


def weights(seed=0):
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: rng.normal(size=shape).astype(np.float32)
    layers = {"up": {"kernel": leaf(2, 8, 6)}, "down": {"kernel": leaf(2, 6, 8)}}
    return {"embed": {"kernel": leaf(4, 8)}, "layers": layers, "out": {"kernel": leaf(8, 4)}}


X = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)


def outputs(np_, params):
    h = X @ params["embed"]["kernel"]
    for i in range(2):
        h = h + np_.maximum(h @ params["layers"]["up"]["kernel"][i], 0) @ params["layers"]["down"]["kernel"][i]
    return h @ params["out"]["kernel"]


DENSE = outputs(np, jax.tree.map(np.float64, weights()))


def on_host(params):
    """Minus the mean squared change of the outputs, in float64."""
    return -np.mean(np.square(outputs(np, jax.tree.map(np.float64, params)) - DENSE))


@jax.jit
def quality(params):
    return -jnp.mean(jnp.square(outputs(jnp, params) - DENSE.astype(np.float32)))


def without_smallest(x, count):
    """The array with the `count` smallest magnitudes at zero."""
    flat = x.astype(np.float64).ravel().copy()
    flat[np.argsort(np.abs(flat))[:count]] = 0
    return flat.reshape(x.shape)


def with_layer(params, path, layer, value):
    leaf = np.float64(trees.paths(params)[path])
    leaf[() if layer is None else layer] = value
    return trees.replace(params, {path: leaf})


def test_each_layer_alone_against_numpy():
    params = weights()
    found = prune.analyse(quality, params, sparsities=SPARSITIES, stacked="layers/")
    places = {f"layers/{i}/{name}/kernel": (f"layers/{name}/kernel", i) for name in ("down", "up") for i in range(2)}
    places[OUT] = (OUT, None)
    assert found.names == tuple(places)
    assert found.units == found.weights == (48, 48, 48, 48, 32)
    assert found.dense == pytest.approx(0.0, abs=1e-9)
    for row, (path, layer) in enumerate(places.values()):
        whole = trees.paths(params)[path]
        whole = whole if layer is None else whole[layer]
        for point, sparsity in enumerate(SPARSITIES):
            count = round(sparsity * whole.size)
            assert found.sparsities[row, point] == count / whole.size
            expected = on_host(with_layer(params, path, layer, without_smallest(whole, count)))
            assert found.quality[row, point] == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert len(np.unique(found.quality[:, 1:])) == 15


def test_masks_are_compiled_once_and_nothing_is_measured_twice():
    traced, seen = [], []

    def scores(seen):
        traced.append(0)
        return jax.tree.map(jnp.abs, seen.params)

    def host(params):
        seen.append(jax.tree.map(np.asarray, params))
        return on_host(params)

    found = prune.analyse(host, weights(), sparsities=(0.0, 0.01, 0.3, 0.31, 0.6), criterion=prune.per_weight(scores))
    assert len(traced) == 1
    # 0.01 of 32 is none; of 96 weights 0.3 and 0.31 are 29 and 30, of 32 they are 10 both.
    np.testing.assert_array_equal(found.sparsities[0] * 96, [0, 1, 29, 30, 58])
    np.testing.assert_array_equal(found.sparsities[2] * 32, [0, 0, 10, 10, 19])
    assert len(seen) == 1 + 4 + 4 + 2
    for params in seen[1:]:  # the others stay whole
        changed = [path for path, leaf in trees.paths(params).items() if (leaf != trees.paths(weights())[path]).any()]
        assert len(changed) == 1


@pytest.mark.slow
def test_groups_and_the_elements_of_each_layer():
    params = weights()
    pattern = prune.groups([NEURONS, LAYERS])
    found = prune.analyse(quality, params, sparsities=(0.4, 0.95), pattern=pattern)
    assert found.names == ("neurons", "neurons/0", "neurons/1", "layers")
    assert found.units == (6, 6, 6, 2)
    assert found.weights == (192, 96, 96, 192)  # 2 layers of 8 x 6 and 6 x 8
    np.testing.assert_allclose(found.sparsities, [[2 / 6, 5 / 6]] * 3 + [[0.5, 0.5]])  # one element stays

    def less(drop):
        """{layer: neurons that go} -> quality."""
        up, down = (np.float64(trees.paths(params)[path]) for path in (UP, DOWN))
        for layer, gone in drop.items():
            worth = (up[layer] ** 2).sum(0) + (down[layer] ** 2).sum(1)
            chosen = np.argsort(worth)[:gone]
            up[layer, :, chosen], down[layer, chosen] = 0, 0
        return on_host(trees.replace(params, {UP: up, DOWN: down}))

    sums = sum((trees.paths(params)[path].astype(np.float64) ** 2).sum((1, 2)) for path in (UP, DOWN))
    expected = [[less(dict.fromkeys(layers, gone)) for gone in (2, 5)] for layers in ((0, 1), (0,), (1,))]
    expected.append([less({int(np.argmin(sums)): 6})] * 2)
    np.testing.assert_allclose(found.quality, expected, rtol=1e-4)


def test_blocks_are_the_units_and_what_chooses_by_itself_is_left_out():
    pattern = {"layers/up": prune.block(2, 3), "layers/down": prune.n_m(2, 4), OUT: prune.channel()}
    seen = []
    host = lambda params: seen.append(np.asarray(params["layers"]["up"]["kernel"])) or 0.0
    params = {"layers": {"up": {"kernel": np.ones((2, 8, 6))}, "down": {"kernel": np.ones((2, 8, 8))}}, "out": weights()["out"]}
    found = prune.analyse(host, params, sparsities=(0.3,), pattern=pattern, stacked="layers/")
    assert dict(zip(found.names, found.units)) == {"layers/0/up/kernel": 8, "layers/1/up/kernel": 8, OUT: 4}
    assert dict(zip(found.names, found.weights)) == {"layers/0/up/kernel": 48, "layers/1/up/kernel": 48, OUT: 32}
    np.testing.assert_allclose(found.sparsities[:, 0], [2 / 8, 2 / 8, 1 / 4])
    assert [int((leaf == 0).sum()) for leaf in seen] == [0, 12, 12, 0]


@pytest.mark.slow
def test_partitioned_parameters_give_the_same_and_stay_partitioned():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    split = jax.tree.map(lambda p: NamedSharding(mesh, P(*[None] * (p.ndim - 2), "fsdp", "tensor")), weights())

    def host(params):
        for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(split)):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        return on_host(params)

    for how in ({"stacked": "layers/"}, {"pattern": prune.groups([NEURONS, LAYERS])}):
        alone = prune.analyse(on_host, weights(), sparsities=SPARSITIES, **how)
        spread = prune.analyse(host, jax.device_put(weights(), split), sparsities=SPARSITIES, **how)
        assert spread.names == alone.names
        np.testing.assert_array_equal(spread.quality, alone.quality)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsities": (0.5, 0.3)}, r"\(0.5, 0.3\); expected rising ones"),
        ({"sparsities": (0.5, 1.0)}, "point 1' is 1.0; expected a fraction to drop"),
        ({"sparsities": ()}, "empty"),
        ({"criterion": prune.saliency()}, "saliency needs gradients, which the analysis does not take"),
        ({"pattern": prune.n_m(1, 2)}, "the pattern is the same everywhere"),
        ({"where": "nowhere"}, "matches none of the parameters"),
    ],
)
def test_what_cannot_be_analysed_is_said_first(options, message):
    with pytest.raises(ValueError, match=message):
        prune.analyse(lambda params: pytest.fail("measured"), weights(), **options)


def test_a_quality_that_is_no_scalar_is_named():
    with pytest.raises(ValueError, match=r"the quality has shape \[8, 4\]; expected a scalar"):
        prune.analyse(lambda params: params["out"]["kernel"], weights())


def test_json_keeps_every_bit(tmp_path):
    rng = np.random.default_rng(2)
    known = Sensitivity(("a", "b"), np.sort(rng.random((2, 5))), rng.normal(size=(2, 5)), 0.1 + 0.2, (7, 8), (14, 8))
    known.quality[1, 2] = np.nan
    known.save(tmp_path / "curves.json")
    found = Sensitivity.load(tmp_path / "curves.json")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.json"]
    for one, other in zip(found, known):
        np.testing.assert_array_equal(one, other)
    content = known.as_dict()
    with pytest.raises(ValueError, match="the sensitivity has no 'units'"):
        Sensitivity.from_dict({key: value for key, value in content.items() if key != "units"})
    with pytest.raises(ValueError, match="has 1 names, 2 units"):
        Sensitivity.from_dict({**content, "names": ["a"]})


def curves_of(drops, sizes, points=(0.0, 0.25, 0.5, 0.75, 0.9)):
    """Curves of layers a, b, c ... whose quality is 1 - drop(sparsity)."""
    points = np.broadcast_to(points, (len(drops), len(points)))
    lost = np.array([[drop(s) for s in line] for drop, line in zip(drops, points)])
    return Sensitivity(tuple("abcdefgh"[: len(drops)]), points, 1 - lost, 1.0, tuple(sizes), tuple(sizes))


def spread(sensitivity, sparsity, **how):
    """{layer: sparsity}, from single arrays."""
    parts = [Part(name, (size,), 0, size, (name,)) for name, size in zip(sensitivity.names, sensitivity.units)]
    return {name: float(target) for name, target in prune.from_sensitivity(sensitivity, **how).targets(parts, sparsity).items()}


def dropped(found, sensitivity):
    counts = np.array([found[name] * size for name, size in zip(sensitivity.names, sensitivity.units)])
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-6)  # whole weights
    return np.round(counts).astype(int)


def test_straight_curves_have_a_closed_form():
    slopes, sizes = np.array([0.1, 0.2, 0.4]), np.array([4000, 3000, 1000])
    curves = curves_of([lambda s, a=a: a * s for a in slopes], sizes)
    drop = 0.4 * sizes.sum() / (sizes / slopes).sum()  # a s = drop in each, and sum of n s = 0.4 of all
    found = spread(curves, 0.4)
    np.testing.assert_allclose(list(found.values()), drop / slopes, atol=1e-3)
    assert dropped(found, curves).sum() == 3200


def test_a_layer_at_its_end_leaves_the_rest_to_the_others():
    curves = curves_of([lambda s: 0.01 * s, lambda s: s], (1000, 1000))
    assert spread(curves, 0.6) == {"a": 0.9, "b": pytest.approx(0.3)}
    assert spread(curves, 0.6, floor=0.3) == {"a": 0.7, "b": pytest.approx(0.5)}


def test_bumps_are_evened_out_and_flat_parts_shared():
    bump = lambda s: {0.0: 0.0, 0.25: 0.2, 0.5: -0.1, 0.75: 0.1, 0.9: 0.4}[s]
    curves = curves_of([bump, lambda s: 0.4 * s], (1000, 1000))
    np.testing.assert_allclose(curve(curves, "a").drops, [0, 0.2, 0.2, 0.2, 0.4])  # the worst up to each sparsity
    # A drop of 0.2 is a sparsity of 0.25 to 0.75 in a, and 0.5 in b; one third of the way along the flat part makes 0.9167.
    assert spread(curves, (0.25 + 0.5 / 3 + 0.5) / 2) == {"a": pytest.approx(0.4167, abs=1e-3), "b": pytest.approx(0.5, abs=1e-3)}
    free = curves_of([lambda s: max(0.0, s - 0.5), lambda s: max(0.0, s - 0.25)], (1000, 1000))
    assert spread(free, 0.15) == {"a": pytest.approx(0.2), "b": pytest.approx(0.1)}  # nothing is lost up to 0.5 and 0.25


def worst(curves, counts, sizes):
    return max(line.drop(k / n) for line, k, n in zip(curves, counts, sizes))


@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_has_a_smaller_worst_drop(seed):
    rng = np.random.default_rng(seed)
    sizes = (11, 7, 9)
    lost = [np.concatenate([[0.0], rng.normal(0.1, 0.2, 4).cumsum()]) for _ in sizes]
    curves = curves_of([dict(zip((0.0, 0.25, 0.5, 0.75, 0.9), line)).get for line in lost], sizes)
    for sparsity in (0.2, 0.5, 0.8):
        counts = dropped(spread(curves, sparsity), curves)
        assert counts.sum() == round(sparsity * 27)
        expected = [curve(curves, name) for name in "abc"]
        choices = itertools.product(*(range(int(0.9 * n) + 1) for n in sizes))
        best = min(worst(expected, choice, sizes) for choice in choices if sum(choice) == counts.sum())
        assert worst(expected, np.maximum(counts - 1, 0), sizes) <= best + 1e-12  # but for rounding to whole weights


@pytest.fixture(scope="module")
def stacked_curves():
    return prune.analyse(quality, weights(), stacked="layers/")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sparsify", "around", "straight through"])
def test_the_whole_is_as_sparse_as_asked(stacked_curves, method):
    params, curves = jax.tree.map(jnp.asarray, weights()), stacked_curves
    how = {"sparsity": 0.61, "allocation": prune.from_sensitivity(curves), "stacked": "layers/"}
    if method == "straight through":
        chosen = prune.straight_through(schedule=prune.constant(), **how)
        tx = optax.chain(chosen.tx, optax.sgd(0.0))
    else:
        tx = prune.around(optax.sgd(0.0), **how) if method == "around" else optax.chain(optax.sgd(0.0), prune.sparsify(**how))
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    masks = trees.paths(prune.masks(state))
    gone = {path: np.sum(~np.asarray(masks[path]), axis=(-2, -1)) for path in (DOWN, UP, OUT)}
    assert sum(int(np.sum(count)) for count in gone.values()) == round(0.61 * 224)
    names = {
        DOWN: ("layers/0/down/kernel", "layers/1/down/kernel"),
        UP: ("layers/0/up/kernel", "layers/1/up/kernel"),
        OUT: (OUT,),
    }
    lost = [
        [curve(curves, name).drop((count + step) / np.prod(weights_of(path))) for step in (-1, 1)]
        for path in names
        for name, count in zip(names[path], np.atleast_1d(gone[path]))
    ]
    assert max(low for low, _ in lost) <= min(high for _, high in lost)  # equal but for one weight
    assert len({int(count) for line in gone.values() for count in np.atleast_1d(line)}) > 2


def weights_of(path):
    return trees.paths(weights())[path].shape[-2:]


def test_groups_take_the_curve_of_all_their_layers():
    params, pattern = jax.tree.map(jnp.asarray, weights()), prune.groups([NEURONS, LAYERS])
    curves = prune.analyse(quality, params, sparsities=(0.2, 0.4, 0.6, 0.95), pattern=pattern)
    flat = curves._replace(quality=np.where(np.array(curves.names)[:, None] == "layers", -1e6, curves.quality))
    tx = prune.sparsify(sparsity=0.25, pattern=pattern, allocation=prune.from_sensitivity(flat))
    _, state = tx.update(params, tx.init(params), params)
    kept = jax.tree.map(np.asarray, prune.keeps(state))
    assert kept["layers"].all()  # losing one costs a million
    np.testing.assert_array_equal(kept["neurons"].sum(-1), [3, 3])  # a quarter of 384 weights is half of the neurons' 192


@pytest.mark.parametrize(
    ("change", "how", "options", "message"),
    [
        ({}, {"floor": 1.0}, {}, "the floor of from_sensitivity is 1.0"),
        ({"quality": np.full((3, 7), np.nan)}, {}, {}, f"the quality of {DOWN} is not finite"),
        ({"dense": np.inf}, {}, {}, f"the quality of {DOWN} is not finite"),
        ({}, {}, {"sparsity": None}, "spreads one sparsity over all weights, and none is given"),
        ({}, {}, {"sparsity": 0.97}, r"0.97 is asked for, and the curves end, or the floor begins, at 0.946"),
        ({}, {"floor": 0.5}, {"sparsity": 0.6}, "0.6 is asked for, and the curves end, or the floor begins, at 0.5"),
        ({}, {}, {"where": "kernel"}, "embed/kernel has no curve; analyse with the same pattern"),
        ({}, {}, {"stacked": "layers/"}, "layers/0/down/kernel has no curve"),
        ({}, {}, {"pattern": prune.block(2, 2)}, f"the curve of {DOWN} is of 96 units and there are 24"),
    ],
)
def test_curves_that_do_not_fit_are_refused(change, how, options, message):
    params = weights()
    curves = prune.analyse(on_host, params)._replace(**change)
    with pytest.raises(ValueError, match=message):
        prune.sparsify(**({"sparsity": 0.5, "allocation": prune.from_sensitivity(curves, **how)} | options)).init(params)
