"""Sparse training: what goes and what grows, against NumPy, and zeros that stay zero in any optimiser."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bmjax import prune

SHAPES = {"a": (12, 20), "b": (20, 8)}


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {name: {"kernel": rng.normal(size=shape).astype(np.float32)} for name, shape in SHAPES.items()}


def top(scores, k):
    flat = np.asarray(scores, np.float64).ravel()
    mask = np.zeros(flat.size, bool)
    mask[np.lexsort((np.arange(flat.size), -flat))[:k]] = True
    return mask.reshape(np.shape(scores))


def run(tx, steps, tree=None):
    """(params, state, [(params, gradients, masks before)] of each step)."""
    tree = params() if tree is None else tree
    state, seen, update = tx.init(tree), [], jax.jit(tx.update)
    for i in range(steps):
        grads = params(100 + i)
        seen.append(jax.device_get((tree, grads, prune.masks(state, tree))))
        updates, state = update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
    return jax.device_get(tree), state, seen


def density(allocation_total=0.3):
    raw = {name: sum(shape) / math.prod(shape) for name, shape in SHAPES.items()}
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    epsilon = allocation_total * sum(sizes.values()) / sum(raw[name] * sizes[name] for name in raw)
    return {name: sizes[name] - round((1 - epsilon * raw[name]) * sizes[name]) for name in raw}


def test_static_masks_are_random_by_erdos_renyi_and_never_change():
    make = lambda seed: prune.static_sparse(optax.adam(0.1), sparsity=0.7, seed=seed)
    after, state, seen = run(make(0), 5)
    for name, live in density().items():
        mask = np.asarray(prune.masks(state)[name]["kernel"])
        assert mask.sum() == live
        np.testing.assert_array_equal(mask, seen[0][2][name]["kernel"])
        np.testing.assert_array_equal(after[name]["kernel"] != 0, mask)
    other = make(1).init(params())
    assert (np.asarray(prune.masks(other)["a"]["kernel"]) != seen[0][2]["a"]["kernel"]).any()


def test_rigl_drops_small_weights_and_grows_where_gradients_are_large():
    end, every, drop = 12, 4, 0.5
    tx = prune.rigl(optax.sgd(0.1), sparsity=0.7, end=end, every=every, drop=drop)
    _, state, seen = run(tx, 14)
    masks = [*(mask for _, _, mask in seen), jax.device_get(prune.masks(state))]
    for step, (tree, grads, before) in enumerate(seen):
        for name, live in density().items():
            now = masks[step + 1][name]["kernel"]
            assert now.sum() == live
            if step == 0 or step % every or step > end:
                np.testing.assert_array_equal(now, before[name]["kernel"])
                continue
            moved = int(live * 0.5 * drop * (1 + math.cos(math.pi * step / end)) + 1e-3)
            weights = np.where(before[name]["kernel"], abs(tree[name]["kernel"]), -np.inf)
            kept = top(weights, live - moved)
            grown = top(np.where(kept, -np.inf, abs(grads[name]["kernel"])), moved)
            np.testing.assert_array_equal(now, kept | grown)
            fresh = now & ~before[name]["kernel"]
            if step + 1 < len(seen):
                assert fresh.any() == (moved > 0)
                assert not seen[step + 1][0][name]["kernel"][fresh].any()  # what grows starts at zero


def test_set_grows_at_random_by_its_seed():
    found = []
    for seed in (0, 0, 1):
        tx = prune.sparse_evolution(optax.adam(0.1), sparsity=0.7, end=20, every=3, seed=seed)
        _, state, seen = run(tx, 7)
        found.append(np.asarray(prune.masks(state)["a"]["kernel"]))
        assert found[-1].sum() == density()["a"]
        assert (found[-1] != seen[0][2]["a"]["kernel"]).any()
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


def test_ac_dc_alternates_and_ends_sparse():
    tx = prune.ac_dc(optax.sgd(0.1), sparsity=0.5, begin=2, phase=3, end=11)
    after, state, seen = run(tx, 14)
    dropped = [int((~mask["a"]["kernel"]).sum()) for _, _, mask in seen[1:]]
    sparse = [2 <= step < 5 or step >= 8 for step in range(13)]
    assert dropped == [120 if on else 0 for on in sparse]
    np.testing.assert_array_equal(np.asarray(prune.masks(state)["a"]["kernel"]), after["a"]["kernel"] != 0)
    np.testing.assert_array_equal(seen[3][2]["a"]["kernel"], top(abs(seen[2][0]["a"]["kernel"]), 120))


def test_a_lottery_ticket_starts_from_early_weights():
    early = params(7)
    _, state, _ = run(optax.chain(optax.sgd(0.1), prune.sparsify(sparsity=0.6)), 3)
    masks = prune.masks(state)
    ticket = prune.rewind(early, masks)
    np.testing.assert_array_equal(ticket["a"]["kernel"], np.where(masks["a"]["kernel"], early["a"]["kernel"], 0))
    after, state, _ = run(prune.static_sparse(optax.adamw(0.1), masks=masks), 5, ticket)
    np.testing.assert_array_equal(np.asarray(after["b"]["kernel"]) != 0, masks["b"]["kernel"])


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adafactor": lambda: optax.adafactor(0.05, momentum=0.9),
    "lion": lambda: optax.lion(0.01),
    "muon": lambda: optax.contrib.muon(0.02),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), 2),
    "finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(0.05),
    "partition": lambda: optax.partition(
        {"x": optax.adam(0.1), "y": optax.sgd(0.1)}, {"a": {"kernel": "x"}, "b": {"kernel": "y"}}
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rigl_in_any_optimiser_keeps_dropped_weights_at_zero(name):
    tx = prune.rigl(OPTIMIZERS[name](), sparsity=0.7, end=10, every=2)
    tree, state, _ = run(tx, 8)
    for kernel, live in density().items():
        mask = np.asarray(prune.masks(state)[kernel]["kernel"])
        assert mask.sum() == live
        assert not tree[kernel]["kernel"][~mask].any()
        assert tree[kernel]["kernel"].any()


def test_a_thousand_adam_steps_with_decay_and_an_average_keep_every_zero():
    tx = prune.rigl(optax.adamw(0.01, weight_decay=0.1), sparsity=0.7, end=500, every=50)

    @jax.jit
    def train(tree):
        def step(carry, key):
            tree, state, average = carry
            grads = jax.tree.map(lambda p: p + jax.random.normal(key, p.shape), tree)
            updates, state = tx.update(grads, state, tree)
            tree = optax.apply_updates(tree, updates)
            mask = prune.masks(state)
            revived = sum(jnp.sum((p != 0) & ~m) for p, m in zip(jax.tree.leaves(tree), jax.tree.leaves(mask)))
            average = jax.tree.map(lambda a, p, m: jnp.where(m, 0.99 * a + 0.01 * p, 0), average, tree, mask)
            return (tree, state, average), revived

        return jax.lax.scan(step, (tree, tx.init(tree), tree), jax.random.split(jax.random.key(0), 1000))

    (_, state, _), revived = train(params())
    assert int(revived.sum()) == 0
    assert int(prune.masks(state)["a"]["kernel"].sum()) == density()["a"]


def test_bad_values_are_one_line():
    adam = optax.adam(0.1)
    for make, message in (
        (lambda: prune.rigl(adam, sparsity=0.5, end=10, drop=1.5), "drop 1.5"),
        (lambda: prune.sparse_evolution(adam, sparsity=0.5, end=0), "begin 0, end 0"),
        (lambda: prune.ac_dc(adam, sparsity=0.5, phase=0, end=10), "phase 0"),
        (lambda: prune.rigl(adam, sparsity=0.5, end=9, allocation=prune.global_threshold()), "goes by scores"),
        (lambda: prune.static_sparse(adam, sparsity=0.5, masks=params()), "leave one of them out"),
        (lambda: prune.static_sparse(adam, masks=params()).init(params()), "a/kernel is float32"),
        (lambda: prune.rewind(params(), {"a": {"kernel": np.ones((12, 20), bool)}}), "b/kernel is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
