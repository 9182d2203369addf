"""Zeros that stay zero and moments that start at zero, in every optimiser, for a thousand steps, over a restart, in any tree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bmjax import parallel, prune, trees
from bmjax.train.checkpoint import Checkpoints

SHAPE = (8, 6)
OPTIMIZERS = {
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "lion": optax.lion(0.003, weight_decay=0.1),
    "momentum": optax.sgd(0.01, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop(0.01, momentum=0.5),
    "adafactor": optax.adafactor(0.01, momentum=0.9, weight_decay_rate=1e-3),
    "muon": optax.contrib.muon(0.01, weight_decay=0.1),
    "multi_steps": optax.MultiSteps(optax.adamw(0.01), 3).gradient_transformation(),
    "finite": optax.apply_if_finite(optax.adamw(0.01), 3),
    "inject": optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(0.02, 0.01, 500)),
    "partition": optax.partition({"x": optax.adamw(0.01)}, lambda tree: jax.tree.map(lambda _: "x", tree)),
    "schedule_free": optax.contrib.schedule_free_adamw(0.01, weight_decay=0.1),
}
# Of the parameter's shape: moments, accumulated gradients, a second copy of the weights.
HELD = {"lion": 1, "momentum": 1, "muon": 1, "multi_steps": 3}


def kernels(seed=0, names=tuple(OPTIMIZERS)):
    rng = np.random.default_rng(seed)
    return {name: {"kernel": jnp.asarray(rng.normal(size=SHAPE), jnp.float32)} for name in names}


def each_its_own(names=tuple(OPTIMIZERS), optimizers=OPTIMIZERS):
    """One optimiser in which every kernel has an optimiser of its own, called like it."""
    return optax.partition({name: optimizers[name] for name in names}, {name: {"kernel": name} for name in names})


def count(hit):
    """{kernel: how many are True}."""
    return {name: jnp.sum(leaf["kernel"], dtype=jnp.int32) for name, leaf in hit.items()}


def held(inner):
    """{path: leaf} of all in an optimiser's state that holds one number a weight."""
    leaves = trees.paths(inner).items()
    return {path: leaf for path, leaf in leaves if path.endswith("/kernel") and np.shape(leaf) == SHAPE}


def train(tx, tree, steps, moments=False):
    """(weights, state, weights that are not zero where a mask drops them {kernel: [steps]}, masks after each step, moments).

    Weights are pulled to what is not zero, so that what is dropped wants to come back. The moments: {path: [steps] how many are
    not zero where weights are dropped, or have just grown}.
    """

    def step(carry, key):
        tree, state, before = carry
        noise = jax.random.normal(key, SHAPE)
        updates, state = tx.update(jax.tree.map(lambda p: p - 1 + noise, tree), state, tree)
        tree, mask = optax.apply_updates(tree, updates), prune.masks(state, tree)
        revived = count(jax.tree.map(lambda p, m: (p != 0) & ~m, tree, mask))
        # What has just grown starts with nothing but the 1e-30 that adafactor adds to every squared gradient.
        least = {name: jnp.where(mask[name]["kernel"], 1e-29, 0) for name in tree}
        empty = {name: ~(mask[name]["kernel"] & before[name]["kernel"]) for name in tree}
        stale = {}
        if moments:
            of = lambda path, leaf: (abs(leaf) > least[path.split("/")[-2]]) & empty[path.split("/")[-2]]
            stale = {path: jnp.sum(of(path, leaf)) for path, leaf in held(state.inner).items()}
        return (tree, state, mask), (revived, mask, stale)

    @jax.jit
    def run(tree):
        state = tx.init(tree)
        carry = tree, state, prune.masks(state, tree)
        return jax.lax.scan(step, carry, jax.random.split(jax.random.key(0), steps))

    (tree, state, _), (revived, masks, stale) = run(tree)
    return jax.device_get((tree, state, revived, masks, stale))


HALF = {"pattern": prune.n_m(1, 2), "schedule": prune.linear(100, 101)}
LATER = {"sparsity": 0.5, "end": 500, "every": 50, "allocation": prune.uniform()}
METHODS = {
    "sparsify": lambda names: optax.chain(each_its_own(names), prune.sparsify(**HALF)),
    "around": lambda names: prune.around(each_its_own(names), **HALF),
    "static_sparse": lambda names: prune.static_sparse(each_its_own(names), masks=half_of(names)),
    "rigl": lambda names: prune.rigl(each_its_own(names), **LATER),
    "sparse_evolution": lambda names: prune.sparse_evolution(each_its_own(names), **LATER, packed=True),
}


def half_of(names):
    rng = np.random.default_rng(8)
    return {name: {"kernel": rng.permutation(np.arange(48) < 24).reshape(SHAPE)} for name in names}


def check_thousand(method, names):
    moments = method != "sparsify"
    tree, state, revived, masks, stale = train(METHODS[method](names), kernels(names=names), 1000, moments)
    for name, start in kernels(names=names).items():
        assert not revived[name].any(), name
        mask, weights = masks[name]["kernel"], tree[name]["kernel"]
        assert (mask[-1].sum(), mask[500].sum()) == (24, 24)
        assert (weights[mask[-1]] != 0).all(), name  # and what is kept learns
        assert (weights != start["kernel"])[mask[-1]].all(), name
        changes = (mask[1:] != mask[:-1]).any((1, 2)).sum()
        if method in ("rigl", "sparse_evolution"):  # the cosine leaves less than one weight to move from step 400 on
            assert 1 < changes <= 7
        else:
            assert changes == (0 if method == "static_sparse" else 1)
        if moments:
            mine = [path for path in stale if f"/{name}/kernel" in path]
            assert len(mine) >= HELD.get(name, 2), mine
            for path in mine:
                assert not stale[path].any(), (path, np.flatnonzero(stale[path])[:5])
    if moments:  # what is kept has its own; MultiSteps has just emptied its sum, or not
        assert all(leaf.any() for path, leaf in held(state.inner).items() if "acc_grads" not in path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sparsify", "around", "static_sparse"])
def test_a_thousand_steps_of_any_optimiser_keep_every_zero(method):
    check_thousand(method, tuple(OPTIMIZERS))


def test_a_thousand_steps_of_rigl_keep_every_zero_and_grow_without_moments():
    check_thousand("rigl", ("multi_steps", "muon", "schedule_free"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rigl", "sparse_evolution"])
def test_a_thousand_steps_of_sparse_training_in_any_optimiser(method):
    check_thousand(method, tuple(OPTIMIZERS))


def test_pruning_inside_wrappers_keeps_every_zero():
    last = lambda rate=0.01: optax.chain(optax.adamw(rate, weight_decay=0.1), prune.sparsify(**HALF))
    nested = {
        "multi_steps": optax.MultiSteps(last(), 2).gradient_transformation(),
        "finite": optax.apply_if_finite(last(), 3),
        "inject": optax.inject_hyperparams(last)(rate=optax.linear_schedule(0.02, 0.01, 500)),
        "partition": optax.partition({"x": last()}, lambda tree: jax.tree.map(lambda _: "x", tree)),
        "masked": optax.masked(last(), lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)),
    }
    tree, _, revived, masks, _ = train(each_its_own(tuple(nested), nested), kernels(names=tuple(nested)), 1000)
    for name in nested:
        assert not revived[name].any(), name
        assert masks[name]["kernel"][-1].sum() == 24
        np.testing.assert_array_equal(tree[name]["kernel"] != 0, masks[name]["kernel"][-1])
    dense = [int(masks[name]["kernel"].all((1, 2)).sum()) for name in ("multi_steps", "finite")]
    assert dense == [203, 101]  # MultiSteps counts updates, of 2 steps each


def test_adam_with_decay_keeps_every_zero_of_its_average():
    # The average as `bmjax.train.step` keeps it, from the dense weights on, and from when masks are made for the last time.
    tx = prune.around(optax.adamw(0.01, weight_decay=0.1), sparsity=0.5, schedule=prune.cubic(10, 200), every=20)

    @jax.jit
    def run(tree):
        def step(carry, key):
            tree, state, average, late = carry
            grads = jax.tree.map(lambda p: p - 1 + jax.random.normal(key, SHAPE), tree)
            updates, state = tx.update(grads, state, tree)
            tree = optax.apply_updates(tree, updates)
            average = jax.tree.map(lambda old, new: 0.999 * old + 0.001 * new, average, tree)
            old = state.pruning.count > 201
            late = jax.tree.map(lambda old_, new: jnp.where(old, 0.999 * old_ + 0.001 * new, new), late, tree)
            return (tree, state, average, late), None

        carry, _ = jax.lax.scan(step, (tree, tx.init(tree), tree, tree), jax.random.split(jax.random.key(0), 1000))
        return carry

    tree, state, average, late = run(kernels(names=("x",)))
    mask = np.asarray(prune.masks(state)["x"]["kernel"])
    assert mask.sum() == 24
    np.testing.assert_array_equal(np.asarray(late["x"]["kernel"]) != 0, mask)
    shown = np.where(np.asarray(tree["x"]["kernel"]) == 0, 0, average["x"]["kernel"])
    np.testing.assert_array_equal(shown != 0, mask)


def test_schedule_free_weights_for_evaluation_are_sparse_inside_around():
    tx = prune.around(optax.contrib.schedule_free_adamw(0.01), pattern=prune.n_m(1, 2))
    tree, state, *_ = train(tx, kernels(names=("x",)), 50)
    shown = optax.contrib.schedule_free_eval_params(state.inner, tree)
    np.testing.assert_array_equal(np.asarray(shown["x"]["kernel"]) != 0, prune.masks(state)["x"]["kernel"])


def test_what_is_not_finite_under_a_mask_skips_no_update():
    tx = prune.around(optax.apply_if_finite(optax.sgd(0.1), 3), pattern=prune.n_m(1, 2))
    tree = kernels(names=("x",))
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, tree), tx.init(tree), tree)
    tree, mask = optax.apply_updates(tree, updates), prune.masks(state)["x"]["kernel"]
    updates, state = tx.update({"x": {"kernel": jnp.where(mask, 1.0, jnp.nan)}}, state, tree)
    after = optax.apply_updates(tree, updates)["x"]["kernel"]
    np.testing.assert_array_equal(after, jnp.where(mask, tree["x"]["kernel"] - np.float32(0.1), 0))
    assert int(state.inner.total_notfinite) == 0


# ---- a restart on another mesh ----

RULES = (("kernel", ("fsdp", "tensor")), (".*", ()))
GIVEN = {"a": {"kernel": (64, 32), "bias": (32,)}, "b": {"kernel": (32, 64)}}


def given(seed):
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)
    return jax.tree.map(draw, GIVEN, is_leaf=lambda node: isinstance(node, tuple))


def placed(tree, mesh):
    """Shardings of anything that holds the weights, or copies of them."""
    return parallel.like_params(tree, given(0), parallel.partition(given(0), RULES, mesh), mesh)


def trainer(tx, mesh):
    """(weights, state, steps) -> (weights, state, masks after each step) on a mesh; gradients are given by step."""
    of_tree, of_state = placed(given(0), mesh), placed(jax.eval_shape(tx.init, given(0)), mesh)

    @functools.partial(jax.jit, out_shardings=(of_tree, of_state))
    def update(grads, state, tree):
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    def run(tree, state, steps):
        tree, state, found = jax.device_put(tree, of_tree), jax.device_put(state, of_state), []
        for step in steps:
            tree, state = update(jax.device_put(given(100 + step), of_tree), state, tree)
            found.append(jax.device_get(prune.masks(state, tree)))
        return tree, state, found

    return run


LONG = {
    "around": lambda: prune.around(
        optax.adamw(0.01), sparsity=0.7, allocation=prune.global_threshold(), schedule=prune.cubic(0, 8), every=2, packed=True
    ),
    "rigl": lambda: prune.rigl(optax.adamw(0.01), sparsity=0.7, end=9, every=2),
}


MESHES = {"2x4": lambda: parallel.make_mesh("fsdp=2,tensor=4"), "1": lambda: parallel.make_mesh("data=1", jax.devices()[:1])}


@pytest.mark.parametrize(("method", "meshes"), [("around", ("2x4", "1")), ("rigl", ("2x4",))])
def test_a_restart_on_another_mesh_goes_on_with_the_same_masks(method, meshes, tmp_path):
    tx, tree = LONG[method](), given(0)
    run = trainer(tx, parallel.make_mesh("fsdp=8"))
    tree, state, _ = run(tree, tx.init(tree), range(4))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, {"params": tree, "opt_state": state})
    expected_tree, _, expected = run(tree, state, range(4, 10))
    saved = jax.device_get(prune.masks(state, tree))
    assert saved["a"]["kernel"].sum() < 64 * 32
    assert any((later["a"]["kernel"] != saved["a"]["kernel"]).any() for later in expected)
    for mesh in (MESHES[name]() for name in meshes):
        abstract = jax.eval_shape(lambda: {"params": given(0), "opt_state": tx.init(given(0))})
        at = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        abstract = jax.tree.map(at, abstract, placed(abstract, mesh))
        with Checkpoints(tmp_path) as checkpoints:
            restored = checkpoints.restore(abstract).state
        jax.tree.map(np.testing.assert_array_equal, restored, {"params": tree, "opt_state": state})
        assert restored["params"]["a"]["kernel"].sharding == placed(given(0), mesh)["a"]["kernel"]
        after, _, found = trainer(tx, mesh)(restored["params"], restored["opt_state"], range(4, 10))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        jax.tree.map(np.testing.assert_array_equal, after, expected_tree)


# ---- any tree ----


class Small(nnx.Module):
    def __init__(self, rngs):
        self.up, self.norm, self.down = nnx.Linear(6, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.relu(self.norm(self.up(x))))


def matrices():
    rng = np.random.default_rng(3)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((8, 6), (6, 8), (6,))]


TREES = {
    "dict": lambda: dict(zip("abc", matrices())),
    "list": matrices,
    "tuple": lambda: (matrices()[0], tuple(matrices()[1:])),
    "list of dicts": lambda: [{"kernel": leaf} for leaf in matrices()],
    "nnx": lambda: nnx.state(Small(nnx.Rngs(0)), nnx.Param),
}


@pytest.mark.parametrize("kind", TREES)
def test_clipping_inside_around_sees_kept_gradients_only_in_any_tree(kind):
    tree = TREES[kind]()
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.trace(0.5), optax.scale(-1.0))
    tx = prune.around(optimizer, sparsity=0.5)
    state, update, momentum = tx.init(tree), jax.jit(tx.update), None
    assert sum(leaf.ndim > 0 for leaf in jax.tree.leaves(prune.masks(state))) == 2  # both matrices
    for seed in range(3):
        rng = np.random.default_rng(seed)
        grads = jax.tree.map(lambda p, rng=rng: rng.normal(size=p.shape).astype(np.float32), tree)
        updates, state = update(grads, state, tree)
        before, tree = tree, optax.apply_updates(tree, updates)
        masks = [np.broadcast_to(mask, p.shape) for mask, p in zip(*map(jax.tree.leaves, (prune.masks(state), tree)))]
        assert jax.tree.structure(prune.masks(state)) == jax.tree.structure(tree)
        seen = [g.astype(np.float64) * mask for g, mask in zip(jax.tree.leaves(grads), masks)]
        norm = np.sqrt(sum((g**2).sum() for g in seen))
        assert norm > 0.5
        momentum = [g * 0.5 / norm + 0.5 * m for g, m in zip(seen, momentum or [0.0] * len(seen))]
        for p, new, m, mask in zip(*map(jax.tree.leaves, (before, tree)), momentum, masks):
            np.testing.assert_allclose(new, np.where(mask, p - m, 0), rtol=1e-5, atol=1e-6)
        for m, mask in zip(jax.tree.leaves(state.inner), masks, strict=True):
            assert not np.asarray(m)[~mask].any()
    assert [int((~mask).sum()) for mask in masks if mask.ndim > 1] == [24, 24]


def test_an_nnx_model_is_pruned_by_its_optimiser():
    model = Small(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(optax.adam(0.01), prune.sparsify(sparsity=0.5)), wrt=nnx.Param)
    loss = lambda model, x: (model(x) ** 2).mean()
    step = nnx.jit(lambda model, optimizer, x: optimizer.update(model, nnx.grad(loss)(model, x)))
    for _ in range(3):
        step(model, optimizer, jnp.ones((4, 6)))
    assert [int((layer.kernel[...] == 0).sum()) for layer in (model.up, model.down)] == [24, 24]
