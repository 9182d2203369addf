"""Sums over the shards of the batch, for code that does not know which executor runs it.

Inside the replicated executor each device sees its own rows, and these are real collectives; where the compiler splits
the arrays itself, the code sees the whole batch and they are the identity.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_axis: contextvars.ContextVar[str | None] = contextvars.ContextVar("batch axis", default=None)


@contextlib.contextmanager
def over(axis: str | None) -> Iterator[None]:
    """While tracing inside, the collectives run over this manual mesh axis (None: they are the identity)."""
    token = _axis.set(axis)
    try:
        yield
    finally:
        _axis.reset(token)


def _varies(x: jax.Array, axis: str) -> bool:
    kind: Any = jax.typeof(x)
    # The attribute was called vma up to jax 0.9.
    return axis in (kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma)


def psum(tree: Any) -> Any:
    """Sum over all shards of the batch. The result is the same on every shard."""
    axis = _axis.get()
    return tree if axis is None else lax.psum(vary(tree), axis)


def pmean(tree: Any) -> Any:
    """Mean over the shards of the batch."""
    axis = _axis.get()
    return tree if axis is None else lax.pmean(vary(tree), axis)


def all_gather(tree: Any) -> Any:
    """All shards of the batch, concatenated along axis 0 in the global order."""
    axis = _axis.get()
    return tree if axis is None else jax.tree.map(lambda x: lax.all_gather(x, axis, tiled=True), vary(tree))


def vary(tree: Any) -> Any:
    """Marks replicated values as each shard's own, so that autodiff does not sum their gradients by itself."""
    axis = _axis.get()
    if axis is None:
        return tree
    return jax.tree.map(lambda x: x if _varies(x, axis) else lax.pcast(x, axis, to="varying"), tree)


def invariant(tree: Any) -> Any:
    """Marks values that every shard computed alike (from gathered or summed inputs) as replicated."""
    axis = _axis.get()
    if axis is None:
        return tree

    def same(x: jax.Array) -> jax.Array:
        if not _varies(x, axis):
            return x
        # The largest of equal values is that value, exactly, in every dtype.
        return lax.pmax(x.astype(jnp.int8), axis).astype(bool) if x.dtype == bool else lax.pmax(x, axis)

    return jax.tree.map(same, tree)


def moments(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted mean and variance over all axes but the last, over the global batch.

    Sums and counts are added over the shards before dividing: a mean of the shards' means is wrong as soon as padding is
    uneven. The variance is taken about the global mean (two passes), which float32 survives.

    Args:
        x: [B, ..., C].
        weights: [B], or any shape that broadcasts against x's leading axes from the left.

    Returns:
        mean [C] and variance [C], float32.
    """
    x = x.astype(jnp.float32)
    weights = weights.reshape(weights.shape + (1,) * (x.ndim - weights.ndim)).astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    count = jnp.maximum(psum(jnp.sum(jnp.broadcast_to(weights, (*x.shape[:-1], 1)))), 1)
    mean = psum(jnp.sum(weights * x, axes)) / count
    return mean, psum(jnp.sum(weights * jnp.square(x - mean), axes)) / count
