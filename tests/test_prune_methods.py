"""Criteria, patterns, allocations and schedules: each against NumPy, and all together."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bmjax import prune, trace, trees
from bmjax.parallel.rules import like_params
from bmjax.prune import packing
from bmjax.types import Group, Member

A, B = "layers/a/kernel", "b/kernel"
UNITS = Group("units", 8, 2, (Member(A, 2, np.arange(8)[:, None]), Member("layers/a/bias", 1, np.arange(8)[:, None])))


def params(seed=0):
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return {"b": {"kernel": leaf(16, 24)}, "layers": {"a": {"kernel": leaf(2, 16, 8), "bias": leaf(2, 8)}}, "head": leaf(3)}


def gradients(seed):
    return jax.tree.map(np.asarray, params(1000 + seed))


def run(tx, tree, steps, view=None):
    """(params, state, [(params, gradients) that each step saw])."""

    @jax.jit
    def step(tree, state, grads):
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    state, seen = tx.init(tree), []
    for i in range(steps):
        seen.append((jax.device_get(tree), gradients(i)))
        tree, state = step(tree, state, gradients(i))
    return jax.device_get(tree), state, seen


def leaf(tree, path):
    for part in path.split("/"):
        tree = tree[part]
    return np.asarray(tree, np.float64)


def top(scores, sparsity):
    """Mask of all but the round(sparsity n) smallest, the lower index first among ties."""
    flat = np.asarray(scores, np.float64).ravel()
    mask = np.ones(flat.size, bool)
    mask[np.lexsort((-np.arange(flat.size), flat))[: round(sparsity * flat.size)]] = False
    return mask.reshape(np.shape(scores))


def by_hand(name, seen, path):
    """The score of every weight after these steps, in float64."""
    pairs = [(leaf(p, path), leaf(g, path)) for p, g in seen]
    w, g = pairs[-1]
    running = lambda values, decay: sum((1 - decay) * decay ** (len(values) - 1 - i) * v for i, v in enumerate(values))
    return {
        "saliency": lambda: abs(w * g),
        "saliency(0.9)": lambda: running([abs(w * g) for w, g in pairs], 0.9),
        "movement": lambda: -sum(w * g for w, g in pairs),
        "fisher": lambda: 0.5 * w**2 * running([g**2 for _, g in pairs], 0.99),
        "taylor": lambda: (w * running([g for _, g in pairs], 0.9)) ** 2,
    }[name]()


GRADIENTS = {
    "saliency": prune.saliency,
    "saliency(0.9)": lambda: prune.saliency(0.9),
    "movement": prune.movement,
    "fisher": prune.fisher,
    "taylor": prune.taylor,
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_criteria_of_gradients(name):
    tx = prune.around(optax.sgd(0.1), GRADIENTS[name](), sparsity=0.6, schedule=prune.one_shot(3))
    _, state, seen = run(tx, params(), 4)
    for path in (A, B):
        expected = top(by_hand(name, seen, path).astype(np.float32), 0.6)
        got = np.asarray(leaf(prune.masks(state), path), bool)
        assert (got != expected).mean() < 0.01, path  # float32 against float64 at the threshold
        assert (~got).sum() == round(0.6 * got.size)


def test_elements_of_signed_scores():
    tx = prune.around(optax.sgd(0.1), prune.taylor(0.0), sparsity=0.5, pattern=prune.groups([UNITS]))
    _, state, seen = run(tx, params(), 1)
    (p, g), expected = seen[0], []
    for layer in range(2):
        change = (leaf(p, A) * leaf(g, A))[layer].sum(0) + (leaf(p, "layers/a/bias") * leaf(g, "layers/a/bias"))[layer]
        expected.append(top(change**2, 0.5))
    np.testing.assert_array_equal(prune.keeps(state)["units"], expected)


def test_random_follows_its_seed_and_nothing_else():
    found = []
    for seed, tree in ((0, params(1)), (0, params(2)), (1, params(1))):
        _, state, _ = run(optax.chain(optax.sgd(0.1), prune.sparsify(prune.random(seed), sparsity=0.5)), tree, 1)
        found.append(leaf(prune.masks(state), B))
    np.testing.assert_array_equal(found[0], found[1])
    assert 0.3 < (found[0] != found[2]).mean() < 0.7
    assert (found[0] == 0).sum() == 192


def masks_of(tree=None, criterion=None, **how):
    tree = params() if tree is None else tree
    tx = prune.sparsify(criterion, **how)
    _, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, tree), tx.init(tree), tree)
    return jax.device_get(prune.masks(state))


def test_n_m_keeps_n_of_m_along_its_axis():
    for axis in (-2, -1):
        masks = masks_of(pattern=prune.n_m(2, 4, axis))
        for path in (A, B):
            scores, mask = (np.moveaxis(leaf(tree, path), axis, -1) for tree in (params(), masks))
            scores, mask = scores.reshape(-1, 4), mask.reshape(-1, 4)
            np.testing.assert_array_equal(mask, [top(abs(row), 0.5) for row in scores])


def test_n_m_axis_by_path_and_gradually():
    masks = masks_of(pattern=prune.n_m(1, 4, {"^b/": -1, "layers": -2}))
    assert (leaf(masks, B).reshape(-1, 4).sum(1) == 1).all()
    assert (np.moveaxis(leaf(masks, A), -2, -1).reshape(-1, 4).sum(1) == 1).all()
    tx = optax.chain(optax.sgd(0.0), prune.sparsify(pattern=prune.n_m(1, 4), schedule=prune.linear(0, 3)))
    kept = []
    for steps in range(1, 5):
        _, state, _ = run(tx, params(), steps)
        kept.append(set(leaf(prune.masks(state), A).transpose(0, 2, 1).reshape(-1, 4).sum(1)))
    assert kept == [{4}, {3}, {2}, {1}]


def test_blocks_and_channels():
    masks = masks_of(sparsity=0.5, pattern={"^b/": prune.block(4, 2), "layers": prune.channel()}, stacked="layers/")
    blocks = abs(leaf(params(), B)).reshape(4, 4, 12, 2).sum((1, 3))
    np.testing.assert_array_equal(leaf(masks, B), top(blocks, 0.5).repeat(4, 0).repeat(2, 1))
    channels = [top(row, 0.5) for row in abs(leaf(params(), A)).sum(1)]
    np.testing.assert_array_equal(leaf(masks, A), np.broadcast_to(np.array(channels)[:, None], (2, 16, 8)))


def test_stacked_layers_have_a_sparsity_each():
    masks = masks_of(sparsity=0.7, stacked="layers/", where="kernel")
    np.testing.assert_array_equal(leaf(masks, A), [top(abs(layer), 0.7) for layer in leaf(params(), A)])
    masks = masks_of(allocation=prune.by_layer({"layers/1/": 0.25}, otherwise=0.5), stacked="layers/")
    assert [int((layer == 0).sum()) for layer in leaf(masks, A)] == [64, 32]
    assert (leaf(masks, B) == 0).sum() == 192


def shares(masks):
    return {path: 1 - leaf(masks, path).mean() for path in (A, B)}


ATTENTION = {  # kernels [width, heads, dim] and [heads, dim, width] of two layers, and what they are as matrices [layer, in, out]
    "layers/query/kernel": (trace.Sides((), (-3,), (-2, -1)), (2, 8, 12)),
    "layers/out/kernel": (trace.Sides((), (-3, -2), (-1,)), (2, 12, 8)),
}


def attention():
    rng = np.random.default_rng(5)
    return {
        "layers": {
            "query": {"kernel": rng.normal(size=(2, 8, 3, 4)).astype(np.float32)},
            "out": {"kernel": rng.normal(size=(2, 3, 4, 8)).astype(np.float32)},
        }
    }


@pytest.mark.parametrize("pattern", ["block", "channel"])
def test_attention_kernels_are_pruned_as_matrices(pattern):
    plain, pool = {
        "block": (prune.block(4, 2), lambda x: x.reshape(2, x.shape[1] // 4, 4, x.shape[2] // 2, 2).sum((2, 4))),
        "channel": (prune.channel(), lambda x: x.sum(1)),
    }[pattern]
    patterns = {f"^{path}$": prune.matrix(plain, sides) for path, (sides, _) in ATTENTION.items()}
    masks = trees.paths(masks_of(attention(), sparsity=0.5, pattern=patterns, stacked="layers/"))
    for path, (_, shape) in ATTENTION.items():
        scores = np.abs(np.float64(trees.paths(attention())[path])).reshape(shape)
        found = np.asarray(masks[path]).reshape(shape)
        units, kept = pool(scores).reshape(2, -1), pool(found.astype(float)).reshape(2, -1)
        whole = scores[0].size / units[0].size
        assert set(np.unique(kept)) == {0.0, whole}
        for layer in range(2):  # the larger half of the units stays
            assert kept[layer].sum() / whole == round(units.shape[1] / 2)
            assert units[layer][kept[layer] > 0].min() > units[layer][kept[layer] == 0].max()


def test_erdos_renyi_of_attention_goes_by_inputs_and_outputs():
    sides = {path: sides for path, (sides, _) in ATTENTION.items()}
    tree = attention() | {"a": {"kernel": np.ones((40, 30), np.float32)}}
    for allocation in (prune.erdos_renyi(sides), prune.erdos_renyi_kernel(sides)):
        masks = trees.paths(masks_of(tree, sparsity=0.6, allocation=allocation, stacked="layers/"))
        density = {path: np.asarray(mask).mean() for path, mask in masks.items()}
        raw = {"a/kernel": 70 / 1200} | dict.fromkeys(ATTENTION, 20 / 96)
        scale = 0.4 * (1200 + 2 * 2 * 96) / (70 + 2 * 2 * 20)
        assert density == pytest.approx({path: scale * value for path, value in raw.items()}, abs=0.01)


def test_erdos_renyi_by_its_formula():
    found = shares(masks_of(sparsity=0.8, allocation=prune.erdos_renyi(), stacked="layers/"))
    raw = {A: (16 + 8) / (16 * 8), B: (16 + 24) / (16 * 24)}
    epsilon = 0.2 * (256 + 384) / (raw[A] * 256 + raw[B] * 384)
    for path, size in ((A, 128), (B, 384)):
        assert found[path] == pytest.approx(1 - epsilon * raw[path], abs=1 / size)


def test_erdos_renyi_kernel_counts_all_axes_and_leaves_full_layers_dense():
    tree = {"small": {"kernel": jnp.ones((2, 2))}, "conv": {"kernel": jnp.arange(3 * 3 * 8 * 16.0).reshape(3, 3, 8, 16)}}
    masks = masks_of(tree, sparsity=0.5, allocation=prune.erdos_renyi_kernel())
    assert leaf(masks, "small/kernel").all()
    assert (leaf(masks, "conv/kernel") == 0).sum() == pytest.approx(0.5 * (4 + 1152), abs=1)


def test_global_with_a_floor_and_normalised():
    tree = params()
    tree["b"]["kernel"] = tree["b"]["kernel"] * 1e-6
    bare = masks_of(tree, sparsity=0.6, allocation=prune.global_threshold())
    assert not leaf(bare, B).any()  # all that is dropped, 384 of 640, is in the array of small weights
    floored = masks_of(tree, sparsity=0.6, allocation=prune.global_threshold(floor=0.25))
    assert leaf(floored, B).sum() == 96
    assert leaf(floored, A).sum() + 96 == 256
    scaled = masks_of(tree, sparsity=0.6, allocation=prune.global_threshold(normalise=True))
    whole = np.concatenate([(abs(leaf(tree, p)) / np.sqrt((leaf(tree, p) ** 2).mean())).ravel() for p in (B, A)])
    got = np.concatenate([leaf(scaled, p).ravel() for p in (B, A)])
    np.testing.assert_array_equal(got, top(whole, 0.6))


def test_owl_spares_layers_with_outliers_at_the_same_mean():
    tree = params()
    tree["layers"]["a"]["kernel"][1, :2] *= 40
    masks = masks_of(tree, sparsity=0.5, allocation=prune.owl(spread=0.1), stacked="layers/")
    dropped = [(layer == 0).mean() for layer in leaf(masks, A)]
    assert dropped[1] == pytest.approx(0.4, abs=0.01)  # the layer that differs most differs by the spread
    assert dropped[0] > 0.5
    total = sum((leaf(masks, path) == 0).sum() for path in (A, B))
    assert total == pytest.approx(0.5 * 640, abs=2)


SCHEDULES = {
    "polynomial": (lambda: prune.polynomial(2, 11, 2, initial=0.2), lambda t: 0.8 - 0.6 * (1 - t) ** 2),
    "cubic": (lambda: prune.cubic(0.1, 0.55, steps=20), lambda t: 0.8 - 0.8 * (1 - t) ** 3),
    "linear": (lambda: prune.linear(2, 11), lambda t: 0.8 * t),
    "iterative": (lambda: prune.iterative(2, 11, 4), lambda t: 1 - 0.2 ** ((math.floor(t * 3 + 1e-6) + 1) / 4)),
    "one_shot": (lambda: prune.one_shot(11), lambda t: 0.8 * (t >= 1)),
    "periodic": (lambda: prune.periodic(2, 11), lambda t: 0.8),
}


@pytest.mark.parametrize(("name", "every"), itertools.product(SCHEDULES, (1, 4)))
def test_schedules_follow_their_formula_and_land_exactly(name, every):
    schedule, formula = SCHEDULES[name]
    tx = prune.sparsify(sparsity=0.8, schedule=schedule(), every=every, where=B)
    tree, state = params(), None
    state = tx.init(tree)
    update = jax.jit(tx.update)
    begin = schedule().begin
    for step in range(14):
        _, state = update(jax.tree.map(jnp.zeros_like, tree), state, tree)
        dropped = (leaf(prune.masks(state), B) == 0).sum()
        if step < begin:
            assert dropped == 0
        elif step >= 11:
            assert dropped == round(0.8 * 384)
        elif (step - begin) % every == 0 and name != "one_shot":
            assert dropped == pytest.approx(formula((step - 2) / 9) * 384, abs=2)  # the target is rounded, then its share


def test_packed_masks_are_the_same_at_an_eighth():
    wide = lambda tree: {**tree, "b": {"kernel": np.tile(tree["b"]["kernel"], (4, 1)) * np.linspace(1, 2, 64)[:, None]}}
    tree = jax.tree.map(lambda leaf: leaf.astype(np.float32), wide(params()))
    tx = lambda packed: prune.sparsify(sparsity=0.7, schedule=prune.cubic(0, 4), packed=packed)
    found = []
    for packed in (False, True):
        chain, now = optax.chain(optax.adam(0.1), tx(packed)), tree
        state, update = chain.init(now), jax.jit(chain.update)
        for i in range(6):
            grads = jax.tree.map(lambda leaf: leaf.astype(np.float32), wide(gradients(i)))
            updates, state = update(grads, state, now)
            now = optax.apply_updates(now, updates)
        found.append((now, state))
    (plain, state), (now, small) = found
    jax.tree.map(np.testing.assert_array_equal, plain, now)
    jax.tree.map(np.testing.assert_array_equal, prune.masks(state), prune.masks(small, tree))
    stored = small[1].masks["b"]["kernel"]
    assert (stored.dtype, stored.size) == (jnp.uint8, 64 * 24 // 8)
    with pytest.raises(ValueError, match="masks are packed"):
        prune.masks(small)
    assert prune.sparsity_report(now, small).total.zeros == round(0.7 * 1536) + round(0.7 * 256)


@pytest.mark.parametrize(
    ("shape", "stored"),
    [
        ((1024, 64), (128, 64)),
        ((64, 64, 3), (8, 64, 3)),
        ((32, 64), (32, 8)),
        ((32, 12), (8, 12)),  # 4 weights a word, so that 8 devices have whole words
        ((32, 48), (32, 8)),
        ((3, 3, 16, 48), (3, 3, 16, 8)),
        ((96, 3), (16, 3)),
        ((1000, 3), (128, 3)),
        ((2, 24, 6), None),
        ((5, 7), (5, 1)),
        ((8, 8), None),
        ((3,), None),
        ((), None),
        ((0, 64), (0, 8)),
    ],
)
def test_packing_and_back(shape, stored):
    mask = np.random.default_rng(1).random(shape) > 0.5
    packed = packing.pack(jnp.asarray(mask))
    assert (packed.shape, packed.dtype) == ((shape, jnp.bool_) if stored is None else (stored, jnp.uint8))
    np.testing.assert_array_equal(packing.unpack(packed, shape), mask)


@pytest.mark.parametrize("shape", [(32, 12), (32, 48), (32, 24), (3, 3, 16, 48), (32, 64), (64, 64, 3)])
def test_packed_masks_are_packed_where_they_are(shape):
    """Axes over 2, 4 and 8 devices, and two at a time: words are made without a word between devices."""
    mask = jnp.asarray(np.random.default_rng(2).random(shape) > 0.5)
    whole = jax.ShapeDtypeStruct(packing.pack(mask).shape, packing.pack(mask).dtype)

    def there_and_back(mask, at):
        packed = jax.lax.with_sharding_constraint(packing.pack(mask), at)
        return packed, packing.unpack(packed, shape)

    for parts in (2, 4, 8):
        mesh = jax.make_mesh((parts, 8 // parts), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        alone = [(axis,) for axis in range(len(shape))]
        for axes in [*alone, *((i, j) for i, *_ in alone for j, *_ in alone if i != j)]:
            spec = P(*({axes[0]: "a", axes[-1]: "b" if len(axes) > 1 else "a"}.get(axis) for axis in range(len(shape))))
            sharding = NamedSharding(mesh, spec)
            if any(shape[axis] % size for axis, size in zip(axes, (parts, 8 // parts))):
                continue
            stored = like_params({"x": whole}, {"x": mask}, {"x": sharding}, mesh)["x"]
            assert stored.spec == spec, (parts, axes)
            both = jax.jit(lambda x, at=stored: there_and_back(x, at), in_shardings=sharding, out_shardings=(stored, sharding))
            program = both.lower(jax.ShapeDtypeStruct(shape, bool)).compile()
            for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
                assert word not in program.as_text(), (parts, axes, word)
            np.testing.assert_array_equal(program(jax.device_put(mask, sharding))[1], mask)


def test_straight_through_hides_weights_that_keep_learning():
    st = prune.straight_through(sparsity=0.5, every=3)
    tx = optax.chain(optax.sgd(0.5), st.tx)
    tree, state = params(), tx.init(params())
    update = jax.jit(tx.update)
    for i in range(7):
        updates, state = update(gradients(i), state, tree)
        np.testing.assert_array_equal(updates["b"]["kernel"], -0.5 * gradients(i)["b"]["kernel"])
        tree = optax.apply_updates(tree, updates)
        if i % 3 == 0:  # masks of the weights as they are now, whatever was hidden before
            np.testing.assert_array_equal(leaf(prune.masks(state), B), top(abs(leaf(tree, B)), 0.5))
    mask = leaf(prune.masks(state), B).astype(bool)
    shown = leaf(st.view(tree, state), B)
    np.testing.assert_array_equal(shown, np.where(mask, leaf(tree, B), 0))
    slope = jax.grad(lambda p: (jnp.asarray(gradients(9)["b"]["kernel"]) * st.view(p, state)["b"]["kernel"]).sum())(tree)
    np.testing.assert_array_equal(slope["b"]["kernel"], gradients(9)["b"]["kernel"])
    tree["b"]["kernel"] = jnp.where(mask, tree["b"]["kernel"], jnp.nan)
    assert np.isfinite(leaf(st.view(tree, state), B)).all()


def test_models_under_vmap_each_get_their_own_masks():
    tx = optax.chain(optax.sgd(0.1), prune.sparsify(sparsity=0.6, schedule=prune.cubic(0, 4), every=2))
    trees = [params(seed) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    state = jax.vmap(tx.init)(stack)
    update = jax.jit(jax.vmap(tx.update))
    for i in range(6):
        grads = jax.tree.map(lambda g: jnp.stack([jnp.asarray(g)] * 3), gradients(i))
        updates, state = update(grads, state, stack)
        stack = optax.apply_updates(stack, updates)
    for i, tree in enumerate(trees):
        alone, _, _ = run(tx, tree, 6)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5), stack, alone)


def test_masks_that_would_differ_between_devices_are_an_error():
    tx = prune.around(optax.sgd(0.1), prune.saliency(), sparsity=0.5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def step(tree, state, x):
        grads = jax.tree.map(lambda p: p * x.sum(), jax.lax.pcast(tree, "data", to="varying"))
        return tx.update(grads, state, tree)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    with pytest.raises(ValueError, match=r"differs between the devices along data.*pmean"):
        jax.eval_shape(mapped, params(), tx.init(params()), jnp.ones(8))


CRITERIA = {"magnitude": prune.magnitude, "random": prune.random, **GRADIENTS}
PATTERNS = {
    "unstructured": prune.unstructured,
    "2:4": lambda: prune.n_m(2, 4, -2),
    "block": lambda: prune.block(4, 2),
    "channel": prune.channel,
    "groups": lambda: prune.groups([UNITS]),
}
ALLOCATIONS = {
    "uniform": prune.uniform,
    "global": prune.global_threshold,
    "erdos_renyi": prune.erdos_renyi,
    "erdos_renyi_kernel": prune.erdos_renyi_kernel,
    "owl": prune.owl,
    "by_layer": lambda: prune.by_layer({".*": 0.5}),
}
REFUSED = {("2:4", name) for name in ALLOCATIONS if name != "uniform"} | {
    ("groups", name) for name in ("global", "erdos_renyi", "erdos_renyi_kernel")
}


def shape_of(kind, tree):
    return {"dict": tree, "list": [tree["b"], [tree["layers"]], tree["head"]], "tuple": (tree["b"], (tree["layers"],))}[kind]


def reaches_half(tx, tree, slack):
    """Two updates drop half of all that is pruned, as close as units allow."""
    state = tx.init(tree)
    for seed in range(2):
        grads = jax.tree.map(lambda p, s=seed: np.random.default_rng(s).normal(size=p.shape).astype(np.float32), tree)
        updates, state = tx.update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
    found = jax.tree.leaves(prune.masks(state, tree))
    pruned = [mask for mask in found if mask.ndim > 0]
    assert sum(int((~mask).sum()) for mask in pruned) == pytest.approx(sum(mask.size for mask in pruned) / 2, rel=slack)
    return state


@pytest.mark.parametrize(("pattern", "allocation"), itertools.product(PATTERNS, ALLOCATIONS))
def test_every_combination_works_or_is_refused_before_the_first_step(pattern, allocation):
    kinds = itertools.cycle(("dict",) if pattern == "groups" else ("dict", "list", "tuple"))
    for i, criterion in enumerate(CRITERIA):
        how = {"pattern": PATTERNS[pattern](), "allocation": ALLOCATIONS[allocation](), "packed": bool(i % 2)}
        how["sparsity"] = None if pattern == "2:4" or allocation == "by_layer" else 0.5
        tree = shape_of(next(kinds), params())
        if (pattern, allocation) in REFUSED:
            with pytest.raises(ValueError, match=r"allocation|compare|global threshold|needs inputs") as error:
                prune.around(optax.sgd(0.1), CRITERIA[criterion](), **how).init(tree)
            assert "\n" not in str(error.value)
            continue
        tx = prune.around(optax.sgd(0.1), CRITERIA[criterion](), **how)
        if i < 2 or (i - len(pattern)) % 3 == 0:  # init has traced the scores; the steps of some are run
            reaches_half(tx, tree, 0.25 if pattern == "channel" else 0.05)
        else:
            jax.eval_shape(lambda t, tx=tx: tx.update(t, tx.init(t), t), tree)


@pytest.mark.parametrize("name", GRADIENTS)
def test_criteria_of_gradients_are_refused_at_the_end_of_a_chain(name):
    with pytest.raises(ValueError, match=r"needs raw gradients.*around"):
        prune.sparsify(GRADIENTS[name](), sparsity=0.5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"pattern": prune.n_m(2, 4), "sparsity": 0.7}, "0.5 sparse everywhere; leave both out"),
        ({"pattern": prune.n_m(2, 5)}, "16 entries, which 5 does not divide"),
        ({"pattern": prune.n_m(2, 4), "where": "bias|head"}, "needs an axis to contract"),
        (
            {"pattern": prune.n_m(2, 4), "where": "layers.*kernel", "stacked": "head"},
            r"which axis of .* \[2, 16, 8\].*axis=\{path",
        ),
        ({"pattern": prune.n_m(2, 4, -3), "where": "^b"}, "is to run along axis -3"),
        ({"pattern": prune.n_m(2, 4, {"x": -1})}, "none of x is found in"),
        ({"pattern": prune.block(5, 2), "sparsity": 0.5}, r"do not divide b/kernel \[16, 24\]"),
        ({"pattern": prune.channel(), "sparsity": 0.5, "where": "head"}, "which has none"),
        ({"sparsity": 0.3, "schedule": prune.cubic(0, 5, initial=0.4)}, "starts at sparsity 0.4, above the target 0.3"),
        ({"sparsity": 0.5, "stacked": "blocks"}, "stacked='blocks' matches none"),
        ({"sparsity": 0.5, "pattern": {"b/": prune.channel(), "x": prune.channel()}}, "pattern of 'x' matches none"),
        ({}, "no sparsity is given"),
        ({"allocation": prune.erdos_renyi()}, "and none is given"),
        ({"sparsity": 0.95, "allocation": prune.global_threshold(floor=0.1)}, "keeps more than the sparsity"),
        ({"sparsity": 0.05, "allocation": prune.owl()}, "not within"),
        ({"allocation": prune.by_layer({"zz": 0.5})}, "'zz' matches none"),
    ],
)
def test_bad_choices_are_one_line_at_init(how, message):
    with pytest.raises(ValueError, match=message) as error:
        prune.sparsify(**how).init(params())
    assert "\n" not in str(error.value)


def test_bad_choices_are_one_line_at_once():
    for make, message in (
        (lambda: prune.n_m(5, 4), "5:4 is given"),
        (lambda: prune.block(0, 2), "0 x 2"),
        (lambda: prune.channel(0), "count from the last"),
        (lambda: prune.cubic(0.2, 0.7), "give its length too"),
        (lambda: prune.cubic(0.2, 1.7, steps=10), "expected 0 to 1"),
        (lambda: prune.polynomial(0, 5, 0), "power 0"),
        (lambda: prune.iterative(0, 5, 1), "1 rounds"),
        (lambda: prune.fisher(1.0), "decay of a running mean is 1.0"),
        (lambda: prune.movement(0), "decay of movement is 0"),
        (lambda: prune.random(-1), "seed of random pruning is -1"),
        (lambda: prune.global_threshold(floor=1.0), "floor of a global threshold is 1.0"),
        (lambda: prune.sparsify(sparsity=0.5, pattern={"a": prune.groups([UNITS])}), "spans arrays"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize(
    ("criterion", "pattern"), itertools.product(("magnitude", "fisher"), ("unstructured", "2:4", "block", "channel"))
)
def test_partitioned_choices_equal_those_of_one_device_without_a_gather(criterion, pattern):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    packed = criterion == "fisher"
    # Bits are packed along 64 rows, of which each of four devices has 16: whole words.
    widen = lambda t: jax.tree.map(
        lambda p: np.concatenate([p, 2 * p, 3 * p, 4 * p], axis=-2) if p.shape[-2:-1] == (16,) else p, t
    )
    tree, gradients = (widen(params()), lambda i: widen(params(1000 + i))) if packed else (params(), lambda i: params(1000 + i))
    how = {"sparsity": None if pattern == "2:4" else 0.6, "stacked": "layers/", "packed": packed}
    tx = prune.around(optax.sgd(0.1), CRITERIA[criterion](), pattern=PATTERNS[pattern](), **how)
    spec = lambda p: NamedSharding(
        mesh, P(*(None,) * (p.ndim - 2), "fsdp", "tensor") if p.shape[-2:-1] in ((16,), (64,)) else P()
    )
    split = lambda t: jax.tree.map(lambda p: jax.device_put(p, spec(p)), t)
    update = jax.jit(tx.update)
    state, alone = tx.init(split(tree)), tx.init(tree)
    compiled = update.lower(split(gradients(0)), state, split(tree)).compile().as_text()
    assert "all-gather" not in compiled
    for i in range(2):
        _, state = update(split(gradients(i)), state, split(tree))
        _, alone = update(gradients(i), alone, tree)
    jax.tree.map(np.testing.assert_array_equal, prune.masks(state, tree), prune.masks(alone, tree))


def test_a_target_below_the_zeros_that_are_there_is_refused():
    sparse = {"a": {"kernel": jnp.where(jnp.arange(40).reshape(8, 5) < 30, 0.0, 1.0)}}
    with pytest.raises(ValueError, match=r"a/kernel: 0.75 of the weights are zero already, and the target is 0.5"):
        prune.sparsify(sparsity=0.5).init(sparse)
    with pytest.raises(ValueError, match=r"all weights together: 0.75 of the weights are zero already"):
        prune.around(optax.adam(0.1), sparsity=0.5, allocation=prune.global_threshold()).init(sparse)
    prune.sparsify(sparsity=0.75).init(sparse)
    prune.straight_through(sparsity=0.5).tx.init(sparse)  # where nothing is dropped for good
    prune.sparsify(sparsity=0.5).init({"a": {"kernel": jnp.zeros((8, 5))}})
    jax.eval_shape(prune.sparsify(sparsity=0.5).init, sparse)


@pytest.mark.parametrize("pattern", [prune.n_m(2, 4), prune.unstructured()])
def test_no_schedule_starts_above_its_target(pattern):
    kernel = {"a": {"kernel": jnp.ones((8, 4))}}
    given = None if pattern.implied else 0.5
    with pytest.raises(ValueError, match=r"the schedule starts at sparsity 0.9, above the target 0.5"):
        prune.sparsify(sparsity=given, pattern=pattern, schedule=prune.cubic(0, 5, initial=0.9)).init(kernel)
    with pytest.raises(ValueError, match=r"starts at sparsity 0.48, above the target 0.42"):
        prune.sparsify(sparsity=0.5, allocation=prune.owl(), schedule=prune.cubic(0, 5, initial=0.48)).init(kernel)


@pytest.mark.parametrize("every", [1, 10, 7])
@pytest.mark.parametrize(
    "schedule",
    [
        prune.one_shot(1.0, steps=20),
        prune.linear(0.2, 1.0, steps=20),
        prune.cubic(0.2, 1.0, steps=20),
        prune.iterative(0.2, 1.0, 3, steps=20),
        prune.periodic(0.2, 1.0, steps=20),
    ],
)
def test_the_end_of_a_run_is_its_last_update(schedule, every):
    params = {"a": {"kernel": jnp.arange(1.0, 41).reshape(8, 5)}}
    tx = prune.sparsify(sparsity=0.8, schedule=schedule, every=every)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=20)
    assert int((params["a"]["kernel"] == 0).sum()) == 32


def test_a_run_of_no_steps_has_no_fractions():
    with pytest.raises(ValueError, match="a run of -10 steps; expected 1 or more"):
        prune.one_shot(0.5, steps=-10)


def test_the_report_counts_what_masks_drop_and_something_revives():
    kernel = {"a": {"kernel": jnp.arange(1.0, 41).reshape(8, 5)}}
    tx = optax.chain(prune.sparsify(sparsity=0.5), optax.sgd(0.1))  # the wrong way round
    updates, state = tx.update(jax.tree.map(jnp.ones_like, kernel), tx.init(kernel), kernel)
    report = prune.sparsity_report(optax.apply_updates(kernel, updates), state)
    assert report.total.alive == 20
    right = optax.chain(optax.sgd(0.1), prune.sparsify(sparsity=0.5))
    updates, state = right.update(jax.tree.map(jnp.ones_like, kernel), right.init(kernel), kernel)
    assert prune.sparsity_report(optax.apply_updates(kernel, updates), state).total.alive == 0
