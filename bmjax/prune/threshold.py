"""Masks of the largest scores. All are exact, and gather nothing when the scores are partitioned.

Rules: scores are compared as float32; -0.0 equals 0.0; among equal scores the lower flat index (in the tree's order) is the
larger; NaN is below everything, -inf included. Functions of scores refuse NaN outside jit. Under jit, where values are not known,
NaN is the lowest, and what prunes in training counts it (`SparsifyState.nans`). `rank` and `largest` never look.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.prune import counting, ranking
from bmjax.prune.kinds import number, whole
from bmjax.prune.ranking import Ranked, rank
from bmjax.prune.words import Words, remaining, words

__all__ = ["Ranked", "Words", "block_mask", "block_sums", "kth_largest", "largest", "nm_mask", "rank", "remaining", "topk_mask"]


def refuse_nan(what: str, arrays: Any) -> None:
    """Raises ValueError if an array that is at hand holds NaN; arrays that are traced pass.

    Args:
        what: of the arrays, for the message.
        arrays: a tree of them, of any dtypes.
    """
    known = [leaf for leaf in jax.tree.leaves(arrays) if not isinstance(leaf, jax.core.Tracer)]
    for leaf in (leaf for leaf in known if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size):
        with jax.ensure_compile_time_eval():  # or a constant inside jit would be traced
            count = int(_nans(leaf)) if _lowest(leaf) else 0
        if count:
            raise ValueError(f"{count:,} of {leaf.size:,} {what} are NaN; find out why, or take jnp.nan_to_num of them")


# The minimum is NaN if any score is. It takes a quarter of the time of isnan and any, a tenth of a mask's.
_lowest = jax.jit(lambda leaf: jnp.isnan(jnp.min(leaf)))
_nans = jax.jit(lambda leaf: jnp.sum(jnp.isnan(leaf), dtype=jnp.uint32))


def largest(scores: Sequence[jax.Array], keep: Any, across: bool = False) -> list[jax.Array]:
    """The masks of `rank`.

    Raises:
        ValueError: as `rank`.
    """
    return rank(scores, keep, across=across).masks


def kth_largest(scores: Any, k: Any) -> jax.Array:
    """The k-th largest score (k = 1: the maximum), float32 scalar.

    Args:
        scores: an array or a tree of arrays, ranked together.
        k: 1 to the number of scores; int, may be traced.

    Raises:
        ValueError: k is a Python int out of range, a leaf is empty or has 2^32 scores or more, or NaN outside jit.
    """
    layered = ranking.by_layer(jax.tree.leaves(scores))
    total = sum(array.size for array in layered)
    if isinstance(k, int) and not 1 <= k <= total:
        raise ValueError(f"the {k}-th largest of {total} scores was asked for; k must be 1 to {total}")
    refuse_nan("scores", scores)
    wanted = words([k] if isinstance(k, int) else jnp.atleast_1d(k))
    return _kth_largest(layered, wanted)


@jax.jit
def _kth_largest(layered: list[jax.Array], k: Words) -> jax.Array:
    cut = ranking.cut(layered, k, across=True).at
    # A clean cut may lie below the k-th largest score; the smallest score above the cut is that score in every case.
    return counting.score(jnp.min(jnp.concatenate([counting.smallest_from(array, cut) for array in layered])))


def topk_mask(scores: Any, sparsity: float) -> Any:
    """Drops the smallest scores: bool like `scores`, True for the n - round(sparsity * n) largest of all n together.

    Args:
        scores: an array or a tree of arrays, ranked together.
        sparsity: fraction to drop, in [0, 1).

    Raises:
        ValueError: sparsity is outside [0, 1), a leaf is empty or has 2^32 scores or more, or NaN outside jit.
    """
    _check(sparsity)
    leaves, structure = jax.tree.flatten(scores)
    total = sum(leaf.size for leaf in leaves)
    refuse_nan("scores", leaves)
    return jax.tree.unflatten(structure, largest(leaves, total - round(sparsity * total), across=True))


def _check(sparsity: float) -> None:
    number("the sparsity", sparsity)
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity {sparsity} is given; expected a fraction to drop, at least 0 and below 1")


def nm_mask(scores: jax.Array, n: int | jax.Array, m: int, axis: int = -2) -> jax.Array:
    """Of each m neighbours along an axis the n largest stay. Mishra et al. 2021, arXiv 2104.08378.

    Args:
        scores: an array. If the axis is partitioned, whole groups of m should be on each device, or neighbours are exchanged.
        n: 0 to m; int, or an int32 scalar that may be traced.
        m: 1 or more; divides the axis.
        axis: -2 is what a kernel [..., in, out] contracts.

    Returns:
        bool like `scores`. Among equal neighbours the lower index is the larger; NaN, under jit, is the lowest.

    Raises:
        ValueError: a scalar, an axis that the array does not have or that m does not divide, n not in 0 to m, m below 1 or no
            int, or NaN outside jit.
    """
    shape = list(scores.shape)
    whole("m of the pattern n:m", m)
    if not isinstance(n, (jax.Array, np.ndarray)):
        whole("n of the pattern n:m", n)
    if m < 1 or (isinstance(n, int) and not 0 <= n <= m):
        raise ValueError(f"the pattern {n}:{m} is given; expected n:m with m at least 1 and n from 0 to m")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"the pattern {n}:{m} is to run along axis {axis} of scores of shape {shape}, which has no such axis")
    at = axis % len(shape)
    if shape[at] % m:
        raise ValueError(f"axis {axis} of scores of shape {shape} has {shape[at]} entries, which {m} does not divide")
    refuse_nan("scores", scores)
    return _nm_mask(scores, n, m, at)


@functools.partial(jax.jit, static_argnames=("m", "axis"))
def _nm_mask(scores: jax.Array, n: jax.Array, m: int, axis: int) -> jax.Array:
    shape = scores.shape
    key = counting.keys(scores).reshape(*shape[:axis], shape[axis] // m, m, *shape[axis + 1 :])
    index = jax.lax.broadcasted_iota(jnp.int32, key.shape, axis + 1)
    above = jnp.zeros(key.shape, jnp.int32)
    for j in range(m):  # each key against neighbour j; an equal one of a lower index is the larger
        neighbour = jax.lax.slice_in_dim(key, j, j + 1, axis=axis + 1)
        above += (neighbour > key - (index > j)).astype(jnp.int32)
    return (above < n).reshape(shape)


def block_sums(scores: jax.Array, block: tuple[int, int]) -> jax.Array:
    """The sum of each block of the last two axes: float32 [..., H / rows, W / columns].

    Args:
        scores: [..., H, W].
        block: (rows, columns).

    Raises:
        ValueError: a block that is not two positive sizes, or that does not divide the last two axes.
    """
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"blocks of {tuple(block)} are asked for; expected (rows, columns), 1 or more each")
    shape = list(scores.shape)
    if len(shape) < 2 or shape[-2] % block[0] or shape[-1] % block[1]:
        raise ValueError(f"blocks of {block[0]} x {block[1]} do not divide the last two axes of scores of shape {shape}")
    rows, columns = shape[-2] // block[0], shape[-1] // block[1]
    return jnp.sum(scores.astype(jnp.float32).reshape(*shape[:-2], rows, block[0], columns, block[1]), axis=(-3, -1))


def block_mask(scores: jax.Array, sparsity: float, block: tuple[int, int]) -> jax.Array:
    """Drops the blocks of the smallest sums. Gray et al. 2017; Narang et al. 2017, arXiv 1711.02782.

    Args:
        scores: [..., H, W].
        sparsity: fraction of the blocks to drop, in [0, 1); round(sparsity * blocks) of them all go.
        block: (rows, columns) along the last two axes.

    Returns:
        bool like `scores`. Under jit a block with a NaN is the lowest.

    Raises:
        ValueError: sparsity is outside [0, 1), as `block_sums`, or NaN outside jit.
    """
    _check(sparsity)
    sums = block_sums(scores, block)
    refuse_nan("scores", scores)
    # An infinity of either sign in one block sums to NaN, which is the lowest.
    (units,) = largest([sums], sums.size - round(sparsity * sums.size))
    *stacked, rows, columns = units.shape
    wide = jnp.broadcast_to(units[..., :, None, :, None], (*stacked, rows, block[0], columns, block[1]))
    return wide.reshape(scores.shape)
