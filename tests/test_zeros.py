import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from bmjax import prune, trees
from bmjax.trace.zeros import zero_where

PARAMS = {"a": {"kernel": jnp.arange(1.0, 13).reshape(3, 4)}, "b": {"kernel": jnp.ones((4, 2))}}
MASKS = {"a": {"kernel": jnp.arange(12).reshape(3, 4) % 3 > 0}, "b": {"kernel": jnp.arange(8).reshape(4, 2) % 2 > 0}}


def optimizers():
    adam = optax.adam(0.1)
    return {
        "momentum": (optax.sgd(0.1, momentum=0.9, nesterov=True), 2),
        "adam": (adam, 4),
        "adamw behind clipping": (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), 4),
        "amsgrad": (optax.amsgrad(0.1), 6),
        "lion": (optax.lion(0.1), 2),
        "rmsprop": (optax.rmsprop(0.1), 2),
        "injected": (optax.inject_hyperparams(optax.adam)(0.1), 4),
        "accumulating": (optax.MultiSteps(adam, 2), 6),
        "if finite": (optax.apply_if_finite(adam, 3), 4),
        "muon": (optax.contrib.muon(0.1), None),
        "adafactor": (optax.adafactor(0.1, min_dim_size_to_factor=128), None),
        "adadelta": (optax.adadelta(0.1), None),
    }


@pytest.mark.parametrize("name", optimizers())
def test_state_that_is_said_to_stay_zero_does(name):
    tx, wanted = optimizers()[name]
    state = tx.init(PARAMS)
    drop = lambda tree: jax.tree.map(lambda mask, leaf: jnp.where(mask, leaf, 0.0), MASKS, tree)
    gradients = drop(jax.tree.map(jnp.sin, PARAMS))
    names = {path: next((p for p in trees.paths(PARAMS) if path.endswith(p)), None) for path in trees.paths(state)}
    names = {path: at if trees.paths(state)[path].shape == (trees.paths(PARAMS)[at].shape if at else ()) else None
             for path, at in names.items()}  # fmt: skip
    update = lambda gradients, state: tx.update(gradients, state, PARAMS)[1]
    found = dict(zip(names, zero_where(update, (gradients, state), [*trees.paths(PARAMS), *names.values()])))
    for _ in range(3):
        state = update(gradients, state)
    said = 0
    for path, leaf in trees.paths(state).items():
        if found[path] is not None:
            assert found[path] == names[path]
            dropped = np.asarray(leaf)[~np.asarray(trees.paths(MASKS)[names[path]])]
            np.testing.assert_array_equal(dropped, 0)
            said += 1
    if wanted is not None:
        assert said == wanted


X = jnp.array([[0.0, 2.0], [3.0, 0.0]])


@pytest.mark.parametrize(
    ("fn", "kept"),
    [
        (lambda x, s: 3 * x - s * jnp.abs(x), True),
        (lambda x, s: jnp.where(x > s, x, 0.0), True),
        (lambda x, s: jnp.maximum(x, -x) ** 2 / (s + 1), True),
        (lambda x, s: jax.lax.cond(s > 0, lambda: x, lambda: 2 * x), True),
        (lambda x, s: jax.jit(jnp.sqrt)(x) + 0, True),
        (lambda x, s: x + s, False),
        (lambda x, s: x.T, False),
        (lambda x, s: x * jnp.log(x), False),
        (lambda x, s: jnp.where(x > s, x, 1.0), False),
        (lambda x, s: x / x, False),
        (lambda x, s: jax.lax.cond(s > 0, lambda: x, lambda: x + 1), False),
        (lambda x, s: jax.lax.fori_loop(0, 2, lambda i, y: y + 1, x), False),
        (lambda x, s: jnp.cos(x), False),
        (lambda x, s: x**0, False),
    ],
)
def test_rules(fn, kept):
    assert zero_where(fn, (X, jnp.float32(1)), ["x", None]) == ["x" if kept else None]
    result = np.asarray(fn(X, jnp.float32(1)))
    if kept:
        np.testing.assert_array_equal(result[np.asarray(X) == 0], 0)


def test_zeros_of_different_places_are_no_zeros_of_a_sum():
    assert zero_where(lambda x, y: (x + y, x * 2, x * y), (X, X), ["x", "y"]) == [None, "x", None]


KERNELS = {f"layer_{i}": {"kernel": jnp.ones((64, 64 + 64 * i))} for i in range(2)}


def methods():
    adam, how = optax.adamw(0.1), {"sparsity": 0.5, "schedule": prune.cubic(0, 100), "every": 10}
    straight = prune.straight_through(sparsity=0.5)
    return {
        "sparsify": (optax.chain(adam, prune.sparsify(**how)), None),
        "global": (optax.chain(adam, prune.sparsify(allocation=prune.global_threshold(), **how)), None),
        "around": (prune.around(adam, prune.saliency(), **how), None),
        "rigl": (prune.rigl(adam, sparsity=0.5, end=100, every=10), None),
        "set": (prune.sparse_evolution(adam, sparsity=0.5, end=100, every=10), None),
        "ac_dc": (prune.ac_dc(adam, sparsity=0.5, phase=10, end=100), None),
        "straight_through": (optax.chain(adam, straight.tx), straight.view),
    }


def copies(tx, view=None):
    """How often the steps that make no masks copy something as large as a parameter."""

    def step(params, state, x):
        def loss(params):
            shown = view(params, state) if view else params
            return jnp.sum(jnp.square(jnp.tanh(x @ shown["layer_0"]["kernel"]) @ shown["layer_1"]["kernel"]))

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(KERNELS, jax.eval_shape(tx.init, KERNELS), jnp.ones((8, 64)))
    text = lowered.compile().as_text()
    return len(re.findall(r"= (?:f32|pred)\[64,(?:64|128)\]\S* copy\(", text[text.index("ENTRY ") :]))


@pytest.mark.parametrize("name", methods())
def test_a_quiet_step_copies_no_parameter_no_moment_and_no_mask(name):
    assert copies(*methods()[name]) <= copies(optax.adamw(0.1))
