"""Sums over the shards of the batch, for code that does not know which executor runs it.

Where an executor splits the batch by hand, each device sees its own rows, and these are real collectives; where the compiler
splits the arrays itself, the code sees the whole batch and they are the identity.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

_axis: contextvars.ContextVar[str | None] = contextvars.ContextVar("batch axis", default=None)
_inner: contextvars.ContextVar[str | None] = contextvars.ContextVar("inner axis", default=None)
_split: contextvars.ContextVar[tuple[int, int]] = contextvars.ContextVar("automatic parts", default=(1, 1))

_SMALL = 1 << 15  # elements; an array more in an all-reduce costs two CPU devices 60 us, as much as copying this many


@contextlib.contextmanager
def over(axis: str | None, inner: str | None = None, split: tuple[int, int] = (1, 1)) -> Iterator[None]:
    """While tracing inside, the collectives run over this manual mesh axis (None: they are the identity).

    Args:
        axis: splits the batch by hand.
        inner: an automatic axis that splits each shard's rows further; see `rows`.
        split: see `automatic`.
    """
    tokens = _axis.set(axis), _inner.set(inner), _split.set(split)
    try:
        yield
    finally:
        _axis.reset(tokens[0])
        _inner.reset(tokens[1])
        _split.reset(tokens[2])


def automatic() -> tuple[int, int]:
    """In how many parts the compiler splits the batch that is seen here, and in how many a kernel that is split over tensor."""
    return _split.get()


def split_by_compiler() -> bool:
    """Whether the batch that is seen here is whole, and the compiler splits it over devices."""
    return _axis.get() is None and _split.get()[0] > 1


def shards() -> int:
    """In how many parts the batch is split by hand."""
    axis = _axis.get()
    return 1 if axis is None else lax.axis_size(axis)


def rows(tree: Any) -> Any:
    """Arrays [B, ...] split over their rows and nothing else, where the mesh has automatic axes beside a manual one.

    There the compiler aborts on indexing along an axis that it has split (the label's logit out of a head over `tensor`).
    """
    inner = _inner.get()
    if inner is None:
        return tree
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, PartitionSpec(inner)), tree)


def _manual_axes(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which it may hold different values."""
    kind: Any = jax.typeof(x)
    # The attribute was called vma up to jax 0.9.
    return frozenset(kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma)


def _varies(x: jax.Array, axis: str) -> bool:
    return axis in _manual_axes(x)


def differs(x: jax.Array) -> bool:
    """True if the shards of the batch may hold different values of it."""
    axis = _axis.get()
    return axis is not None and _varies(x, axis)


def psum(tree: Any) -> Any:
    """Sum over all shards of the batch, of bfloat16 in float32. The result is the same on every shard."""
    axis = _axis.get()
    if axis is None:
        return tree
    tree = jax.tree.map(jnp.asarray, tree)
    # Besides what rounding loses: a bfloat16 all-reduce beside automatic axes aborts the CPU compiler.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, vary(tree))
    return jax.tree.map(lambda total, x: total.astype(x.dtype), _bucketed(lambda arrays: lax.psum(arrays, axis), wide), tree)


def _bucketed(total: Callable[[list[jax.Array]], list[jax.Array]], tree: Any) -> Any:
    """Applies an elementwise collective to a tree, small arrays of one dtype together as one vector."""
    leaves, treedef = jax.tree.flatten(tree)
    largest = _SMALL if _inner.get() is None else 1  # an automatic axis may split an array, and a vector of it would gather it
    buckets: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        buckets.setdefault(leaf.dtype if leaf.size <= largest else i, []).append(i)
    packed = [leaves[at[0]] if len(at) == 1 else jnp.concatenate([leaves[i].ravel() for i in at]) for at in buckets.values()]
    for at, result in zip(buckets.values(), total(packed)):
        ends = np.cumsum([leaves[i].size for i in at])[:-1]
        parts = [result] if len(at) == 1 else jnp.split(result, ends)
        for i, part in zip(at, parts):
            leaves[i] = part.reshape(leaves[i].shape)
    return jax.tree.unflatten(treedef, leaves)


def pmean(tree: Any) -> Any:
    """Mean over the shards of the batch."""
    axis = _axis.get()
    return tree if axis is None else lax.pmean(vary(tree), axis)


def all_gather(tree: Any) -> Any:
    """All shards of the batch, concatenated along axis 0 in the global order. The result is the same on every shard."""
    axis = _axis.get()
    if axis is None:
        return tree

    def gather(x: jax.Array) -> jax.Array:
        # `pmap` does not track what varies; there only the varying kind has the right gradient.
        return lax.all_gather(x, axis, tiled=True, to="invarying" if _varies(x, axis) else "varying")

    return jax.tree.map(gather, vary(tree))


def vary(tree: Any) -> Any:
    """Marks replicated values as each shard's own, so that autodiff does not sum their gradients by itself."""
    axis = _axis.get()
    if axis is None:
        return tree
    return jax.tree.map(lambda x: x if _varies(x, axis) else lax.pcast(x, axis, to="varying"), tree)


def vary_as(tree: Any, like: Any) -> Any:
    """Marks the values as varying over each manual mesh axis that a value in `like` varies over, as a loop's carry must be."""
    axes = sorted(set().union(*(_manual_axes(leaf) for leaf in jax.tree.leaves(like))))
    missing = lambda x: tuple(axis for axis in axes if axis not in _manual_axes(x))
    return jax.tree.map(lambda x: lax.pcast(x, missing(x), to="varying") if missing(x) else x, tree)


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

    # Padding may hold anything, NaN included. Chosen inside each sum, where it can fuse.
    kept = lambda values: jnp.where(weights > 0, values, 0)
    count = psum(jnp.sum(jnp.broadcast_to(weights, (*x.shape[:-1], 1))))
    count = jnp.where(count > 0, count, 1)
    mean = psum(jnp.sum(weights * kept(x), axes)) / count
    return mean, psum(jnp.sum(weights * jnp.square(kept(x - mean)), axes)) / count
