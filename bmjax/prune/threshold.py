"""The largest scores by counting: no sort, no gather, one small all-reduce a pass when the scores are partitioned.

Every score becomes an unsigned integer key in the same order, and a search over keys asks "how many are at least t?" for four
values of t a pass, until the answer is exactly the wanted number. Equal scores are told apart by their position: the same
search then runs over positions. So the result is exact, and the same on any number of devices.

Rules: scores are compared as float32; -0.0 equals 0.0; among equal scores the lower flat index (in the tree's order) is the
larger; NaN is below everything, -inf included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

Counter: TypeAlias = Callable[[jax.Array], jax.Array]  # thresholds [problems, 4] -> how many keys are at least that, same shape

_Bracket: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # lo, hi, and the counts at or above them

_FIELDS = 4  # thresholds a pass: four 8-bit counts share one int32 word
_ROW = 32  # the widest row that XLA's CPU reductions keep in one fused loop; its count fits the 8 bits
_MANY = 2**20  # scores from which a search in a sample first pays for its compilation
_INFINITY = 0x7F800000  # the bits of float32 infinity
_END = 2 * _INFINITY + 3  # a search ends below it, so that it can reach the key after +inf's and keep nothing


def _keys(scores: jax.Array) -> jax.Array:
    """uint32 in the order of the scores: NaN 0, -inf 1, both zeros `_INFINITY + 1`, +inf `_END - 2`."""
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    key = jnp.where(bits < 0, -magnitude, magnitude).astype(jnp.uint32) + jnp.uint32(_INFINITY + 1)
    return jnp.where(magnitude > _INFINITY, jnp.uint32(0), key)


def _score(key: jax.Array) -> jax.Array:
    """The float32 that `_keys` made `key` of."""
    signed = (key - jnp.uint32(_INFINITY + 1)).astype(jnp.int32)
    bits = jnp.where(signed < 0, jnp.int32(-(2**31)) - signed, signed)
    return jnp.where(key == 0, jnp.nan, lax.bitcast_convert_type(bits, jnp.float32))


def _rows(x: jax.Array) -> jax.Array:
    """[..., C] as [..., C / w, w] with w at most 32, so that a trailing axis split over 2, 4, 8 or 16 devices is not gathered.

    A row that two devices share costs an all-reduce of rows, and rows that do not line up with the devices at all would
    be gathered. Up to 16 devices neither happens; for a power of two, which lines up anyway, wider rows are better than
    being spared the first beyond 8.
    """
    size = x.shape[-1]
    share = size // math.gcd(size, 8 if size & (size - 1) == 0 else 16)
    w = max(d for d in range(1, _ROW + 1) if share % d == 0)
    return x.reshape(*x.shape[:-1], size // w, w)


def _count(keys: jax.Array, thresholds: jax.Array) -> jax.Array:
    """How many keys are at least each of the four thresholds: int32 [4]."""
    rows = _rows(keys)
    words = sum(jnp.where(rows >= thresholds[j], jnp.int32(1 << 8 * j), 0) for j in range(_FIELDS))
    fields = (jnp.sum(words, axis=-1, dtype=jnp.int32)[..., None] >> 8 * jnp.arange(_FIELDS)) & 0xFF
    return jnp.sum(fields, axis=tuple(range(fields.ndim - 1)), dtype=jnp.int32)


def _thresholds(lo: jax.Array, hi: jax.Array, above_lo: jax.Array, above_hi: jax.Array, k: jax.Array) -> jax.Array:
    """Four places to count at, strictly between lo and hi where there is room: uint32 [problems, 4].

    Two stand where the k-th largest is if the keys lie evenly between lo and hi, give or take two standard deviations of
    that guess. The other two cut the range in three whatever the scores look like.
    """
    inside = jnp.maximum((above_lo - above_hi).astype(jnp.float32), 1.0)
    share = (above_lo - k).astype(jnp.float32) / inside
    band = 2.0 * jnp.sqrt(share * (1.0 - share) / inside) + 0.5 / inside
    parts = jnp.stack([share - band, share + band, jnp.full_like(share, 1 / 3), jnp.full_like(share, 2 / 3)], axis=-1)
    width = hi - lo
    # 0.999 because the product is rounded and must not reach 2^32; it only moves a guess.
    offset = (jnp.clip(parts, 0.0, 0.999) * width.astype(jnp.float32)[:, None]).astype(jnp.uint32)
    return lo[:, None] + jnp.clip(offset, 1, jnp.maximum(width - 1, 1)[:, None])


def _search(
    count: Counter,
    k: jax.Array,
    lo: jax.Array,
    hi: jax.Array,
    above_lo: jax.Array,
    above_hi: jax.Array,
    first: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each problem a cut with exactly k keys at or above it, or the k-th largest key if equal keys leave no such cut.

    Args:
        count: counts at given thresholds, for all problems at once.
        k: int32 [problems], above_hi <= k <= above_lo.
        lo, hi: uint32 [problems], where to look.
        above_lo, above_hi: int32 [problems], how many keys are at least lo and hi.
        first: uint32 [problems, 4], where to count first, above lo; a guess saves passes and changes no result.

    Returns:
        (cut uint32, keys at or above cut int32, keys at or above cut + 1 if the first is not k int32), each [problems].
    """

    def unfinished(state: _Bracket) -> jax.Array:
        lo, hi, above_lo, _ = state
        return jnp.any((above_lo != k) & (hi - lo > 1))

    def narrow(state: _Bracket, at: jax.Array) -> _Bracket:
        lo, hi, above_lo, above_hi = state
        counts = count(at)
        outside = at >= hi[:, None]
        enough = (counts >= k[:, None]) & ~outside
        few = ~enough & ~outside
        return (
            jnp.max(jnp.where(enough, at, lo[:, None]), axis=-1),
            jnp.min(jnp.where(few, at, hi[:, None]), axis=-1),
            jnp.min(jnp.where(enough, counts, above_lo[:, None]), axis=-1),
            jnp.max(jnp.where(few, counts, above_hi[:, None]), axis=-1),
        )

    bracket = (lo, hi, above_lo, above_hi)
    if first is not None:
        bracket = narrow(bracket, first)
    cut, _, at_cut, above_cut = lax.while_loop(unfinished, lambda state: narrow(state, _thresholds(*state, k)), bracket)
    return cut, at_cut, above_cut


def _counter(leaves: Sequence[jax.Array], across: bool) -> Counter:
    """Counts in all leaves together, or of problem i in leaf i (and again from the first leaf when there are more problems)."""
    if across:
        return lambda at: jnp.stack([jnp.sum(jnp.stack([_count(leaf, row) for leaf in leaves]), axis=0) for row in at])
    return lambda at: jnp.stack([_count(leaves[i % len(leaves)], row) for i, row in enumerate(at)])


def _priorities(shapes: Sequence[tuple[int, ...]], across: bool) -> list[jax.Array]:
    """uint32 like each leaf: 1 for the last position up to the number of positions for the first; over all leaves if `across`."""
    sizes = [math.prod(shape) for shape in shapes]
    found = []
    for i, shape in enumerate(shapes):
        last = sum(sizes[i:]) if across else sizes[i]
        position = jnp.zeros(shape, jnp.uint32)
        for axis in range(len(shape)):
            position += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(math.prod(shape[axis + 1 :]))
        found.append(jnp.uint32(last) - position)
    return found


def _checked(scores: Sequence[jax.Array]) -> list[jax.Array]:
    """The scores without scalars (as [1]); none may be empty."""
    total = sum(leaf.size for leaf in scores)
    if total >= 2**31:
        raise ValueError(f"{total} scores are to be ranked at once, and counts are int32: rank fewer than 2^31 at once")
    if not scores or min(leaf.size for leaf in scores) == 0:
        raise ValueError(f"no scores to rank: got arrays of sizes {[leaf.size for leaf in scores]}")
    return [leaf.reshape(1) if leaf.ndim == 0 else leaf for leaf in scores]


def _total(leaves: Sequence[jax.Array], across: bool) -> jax.Array:
    sizes = [leaf.size for leaf in leaves]
    return jnp.asarray([sum(sizes)] if across else sizes, jnp.int32)


def _guess(keys: Sequence[jax.Array], k: jax.Array, across: bool) -> jax.Array:
    """Four places around the k-th largest key, from the first key of each row: uint32 [problems, 4]."""
    samples = [_rows(leaf)[..., 0] for leaf in keys]
    total, drawn = _total(keys, across), _total(samples, across)
    rank = k.astype(jnp.float32) * drawn / total
    deviation = jnp.sqrt(jnp.maximum(rank * (1 - rank / drawn), 1.0))
    ranks = jnp.concatenate([rank + 3 * deviation, rank - 3 * deviation]).astype(jnp.int32)
    drawn = jnp.tile(drawn, 2)
    lo = jnp.zeros(drawn.shape, jnp.uint32)
    ranks = jnp.clip(ranks, 1, drawn)
    found, _, _ = _search(_counter(samples, across), ranks, lo, jnp.full_like(lo, _END), drawn, jnp.zeros_like(drawn))
    low, high = jnp.split(jnp.maximum(found, 1), 2)
    return jnp.stack([low, low + (high - low) // 3, low + (high - low) // 3 * 2, high + 1], axis=-1)


def _cut(keys: Sequence[jax.Array], k: jax.Array, across: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    total = _total(keys, across)
    lo = jnp.zeros(total.shape, jnp.uint32)
    first = _guess(keys, k, across) if sum(leaf.size for leaf in keys) >= _MANY else None
    return _search(_counter(keys, across), k, lo, jnp.full_like(lo, _END), total, jnp.zeros_like(total), first)


def largest(scores: Sequence[jax.Array], keep: Any, across: bool = False) -> list[jax.Array]:
    """Masks of the largest scores, of each array or of all of them together.

    Args:
        scores: arrays of any shapes, partitioned or not.
        keep: how many to keep, 0 to all; int32, may be traced: one number an array, or a single one if `across`.
        across: rank all arrays together instead of each by itself.

    Returns:
        A bool array for each, with exactly `keep` True. See the module for ties and NaN.

    Raises:
        ValueError: an array is empty, or there are 2^31 scores or more.
    """
    shapes = [leaf.shape for leaf in scores]
    keys = [_keys(leaf) for leaf in _checked(scores)]
    k = jnp.atleast_1d(jnp.asarray(keep, jnp.int32))
    cut, at_cut, above_cut = _cut(keys, k, across)

    problem = [0] * len(keys) if across else range(len(keys))
    priorities = _priorities([leaf.shape for leaf in keys], across)

    def part_equals() -> jax.Array:
        equals = [jnp.where(key == cut[i], rank, jnp.uint32(0)) for i, key, rank in zip(problem, keys, priorities)]
        tied = jnp.stack([jnp.max(rank) for rank in equals])
        top = (jnp.max(tied, keepdims=True) if across else tied) + 2
        wanted, equal = jnp.where(at_cut == k, 0, k - above_cut), jnp.where(at_cut == k, 0, at_cut - above_cut)
        first, _, _ = _search(_counter(equals, across), wanted, jnp.ones_like(top), top, equal, jnp.zeros_like(equal))
        return jnp.where(at_cut == k, jnp.ones_like(first), first)  # a clean cut beside a tied one keeps all its equals

    # Which of the equal scores stay: those of priority `first` and up; all of them where the cut was clean.
    first = lax.cond(jnp.all(at_cut == k), lambda: jnp.ones_like(cut), part_equals)
    kept = [(key > cut[i]) | ((key == cut[i]) & (rank >= first[i])) for i, key, rank in zip(problem, keys, priorities)]
    return [mask.reshape(shape) for mask, shape in zip(kept, shapes)]


def kth_largest(scores: Any, k: Any) -> jax.Array:
    """The k-th largest score (k = 1: the maximum), float32 scalar.

    Args:
        scores: an array or a tree of arrays, ranked together.
        k: 1 to the number of scores; int, may be traced.

    Raises:
        ValueError: k is a Python int out of range, a leaf is empty, or there are 2^31 scores or more.
    """
    leaves = _checked(jax.tree.leaves(scores))
    total = sum(leaf.size for leaf in leaves)
    if isinstance(k, int) and not 1 <= k <= total:
        raise ValueError(f"the {k}-th largest of {total} scores was asked for; k must be 1 to {total}")
    keys = [_keys(leaf) for leaf in leaves]
    cut, _, _ = _cut(keys, jnp.atleast_1d(jnp.asarray(k, jnp.int32)), across=True)
    # A clean cut may lie below the k-th largest key; the smallest key above the cut is that key in every case.
    above = [jnp.min(jnp.where(leaf >= cut[0], leaf, jnp.uint32(2**32 - 1))) for leaf in keys]
    return _score(jnp.min(jnp.stack(above)))


def topk_mask(scores: Any, sparsity: float) -> Any:
    """Drops the smallest scores: bool like `scores`, True for the n - round(sparsity * n) largest of all n together.

    Args:
        scores: an array or a tree of arrays, ranked together. See the module for ties and NaN.
        sparsity: fraction to drop, in [0, 1).

    Raises:
        ValueError: sparsity is outside [0, 1), a leaf is empty, or there are 2^31 scores or more.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity {sparsity} is given; expected a fraction to drop, at least 0 and below 1")
    leaves, structure = jax.tree.flatten(scores)
    total = sum(leaf.size for leaf in leaves)
    return jax.tree.unflatten(structure, largest(leaves, total - round(sparsity * total), across=True))
