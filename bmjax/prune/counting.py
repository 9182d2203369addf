"""How many scores are at least a threshold, in one pass over them, and where those equal to it are.

A score is compared as an integer key in the order of float32: -0.0 equals 0.0, and NaN is below everything, -inf included.
Thresholds are uint32 *ranks*: NaN 0, -inf 1, both zeros `INFINITY + 1`, +inf `END - 2`, and `END - 1` which no score reaches.

The shapes here are [layers, ..., C], a problem for each layer. Passes are made of what XLA's CPU compiler keeps in one loop: rows
of at most 32 are reduced first, with several counts in the bytes of one word, and the bits of equal scores fill another. No
pass gathers an array that is partitioned, however it is.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

INFINITY = 0x7F800000  # the bits of float32 infinity
END = 2 * INFINITY + 3
_NAN = 0x00FFFFFE - 2**31  # the key of rank 0
_ROW = 32  # the widest row that XLA's CPU reductions keep in one loop; its count fits 8 bits, its flags 32
_ONE = 2**26  # a packed score: 6 bits that count, 21 of its key and 5 of its place
WIDEST = 2**21
_PIECE = 512  # of so many neighbours at most 8 are sampled


def _keys(scores: jax.Array) -> jax.Array:
    """int32 in the order of the scores. NaN wraps around to below -inf, to `_NAN` or lower."""
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, -1 - INFINITY - bits, bits + (2**31 - 1 - INFINITY))


def keys(scores: jax.Array) -> jax.Array:
    """int32 in the order of the scores, the same for all NaN."""
    return jnp.maximum(_keys(scores), _NAN)


def _key(rank: jax.Array) -> jax.Array:
    """The int32 key of a uint32 rank; 2^32 - 1 stands for the one below 0."""
    return lax.bitcast_convert_type(rank + jnp.uint32(_NAN + 2**32), jnp.int32)


def score(rank: jax.Array) -> jax.Array:
    """The float32 of a rank."""
    signed = (rank - jnp.uint32(INFINITY + 1)).astype(jnp.int32)
    bits = jnp.where(signed < 0, jnp.int32(-(2**31)) - signed, signed)
    return jnp.where(rank == 0, jnp.nan, lax.bitcast_convert_type(bits, jnp.float32))


def _share(size: int) -> int:
    """What one of 16 devices holds of a trailing axis, where 16 divide it; rows inside are never partitioned.

    A row that two devices share costs an all-reduce of rows, and rows that do not line up with the devices at all would
    be gathered. Up to 16 devices neither happens; for a power of two, which lines up anyway, wider rows are better than
    being spared the first beyond 8.
    """
    return size // math.gcd(size, 8 if size & (size - 1) == 0 else 16)


def _rows(x: jax.Array, widest: int) -> jax.Array:
    """[..., C] as [..., C / w, w], w at most `widest`."""
    share = _share(x.shape[-1])
    w = max(d for d in range(1, widest + 1) if share % d == 0)
    return x.reshape(*x.shape[:-1], x.shape[-1] // w, w)


def _spread(values: jax.Array, ndim: int) -> jax.Array:
    """[layers] to be broadcast against `ndim` axes."""
    return values.reshape(-1, *(1,) * (ndim - 1))


def _sums(pairs: jax.Array) -> jax.Array:
    """The sums of each layer of two 16-bit numbers, up to 32 each, in every word: uint32 [layers, ..., C] to [layers, 2]."""
    for _ in range(2):  # at most 32^2 words are added before the fields are taken apart
        pairs = jnp.sum(_rows(pairs, _ROW), axis=-1, dtype=jnp.uint32)
    apart = jnp.stack([pairs & 0xFFFF, pairs >> 16], axis=1)
    return jnp.sum(apart, axis=tuple(range(2, apart.ndim)), dtype=jnp.uint32)


def _above(values: jax.Array, thresholds: jax.Array) -> jax.Array:
    """How many int32 [layers, ..., C] of each layer are above int32 [layers or 1, an even n]: uint32 [layers, n]."""
    columns = [_spread(column, values.ndim) for column in thresholds.T]
    pair = lambda one, other: jnp.where(values > one, jnp.uint32(1), 0) + jnp.where(values > other, jnp.uint32(2**16), 0)
    return jnp.concatenate([_sums(pair(*columns[j : j + 2])) for j in range(0, len(columns), 2)], axis=-1)


def at_least(scores: jax.Array, ranks: jax.Array) -> jax.Array:
    """How many scores of each layer are at least each threshold.

    Args:
        scores: [layers, ..., C], fewer than 2^32 in a layer.
        ranks: uint32 [layers or 1, an even n], above 0.

    Returns:
        uint32 [layers, thresholds].
    """
    return _above(_keys(scores), _key(ranks - 1))


def sample(scores: jax.Array) -> tuple[jax.Array, int]:
    """Some of the scores [layers, ..., C], evenly spread, and of how many each is one."""
    pieces = _rows(scores, _PIECE)
    w = pieces.shape[-1]
    taken = max(t for t in range(1, 9) if w % t == 0 and (t == 1 or w // t >= 64))
    return pieces[..., :taken].reshape(*pieces.shape[:-2], -1), w // taken


def pack(scores: jax.Array, lo: jax.Array, hi: jax.Array) -> jax.Array:
    """Rows of scores packed into a word each, if at most one score of a row lies from lo to below hi.

    Such a score becomes 2^26 + 32 (its rank - lo) + its place in the row; a row without one is 0, and a row of more is at least
    2^27. Where hi is lo + 1 rows can have more: bit i then says that score i of the row is lo.

    Args:
        scores: [layers, ..., C].
        lo, hi: uint32 [layers or 1], hi - lo from 1 to `WIDEST`.

    Returns:
        uint32 [layers, ..., C / w].
    """
    rows = _rows(keys(scores), _ROW)
    end = jnp.minimum(hi, jnp.uint32(END - 1)) - 1  # what no score reaches has no key
    low, last, one = (_spread(v, rows.ndim) for v in (_key(lo), _key(end), hi - lo == 1))
    place = lax.broadcasted_iota(jnp.uint32, rows.shape, rows.ndim - 1)
    offset = lax.bitcast_convert_type(rows - low, jnp.uint32)
    word = jnp.where(one, jnp.uint32(1) << place, (offset << 5) + (place + _ONE))
    return jnp.sum(jnp.where((rows >= low) & (rows <= last), word, jnp.uint32(0)), axis=-1, dtype=jnp.uint32)


def crowded(packed: jax.Array) -> jax.Array:
    """Whether a row of each layer had more than one score: bool [layers]."""
    return jnp.max(packed, axis=tuple(range(1, packed.ndim))) >= 2 * _ONE


def packed_at_least(packed: jax.Array, offsets: jax.Array) -> jax.Array:
    """How many packed scores are at least lo + offset, for uint32 offsets [layers or 1, n]: uint32 [layers, n]."""
    signed = lax.bitcast_convert_type(packed, jnp.int32)
    return _above(signed, (offsets << 5).astype(jnp.int32) + (_ONE - 1))


def equals(packed: jax.Array, lo: jax.Array, hi: jax.Array, ranks: jax.Array) -> jax.Array:
    """Bit i of a word says that score i of its row equals the threshold: uint32 like `packed`, from lo and hi as packed."""
    one, offset = (_spread(v, packed.ndim) for v in (hi - lo == 1, ranks - lo))
    found = jnp.where(packed >> 5 == offset + (_ONE >> 5), jnp.uint32(1) << (packed & 31), jnp.uint32(0))
    return jnp.where(one, packed, found)


def positions(shape: tuple[int, ...]) -> jax.Array:
    """The flat index in each layer, uint32 of the given shape [layers, ...]."""
    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(1, len(shape)):
        position += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(math.prod(shape[axis + 1 :]))
    return position


def equals_before(bits: jax.Array, size: int, limits: jax.Array) -> jax.Array:
    """How many bits of `equals` stand at positions before each of two limits.

    Args:
        bits: uint32 [layers, ..., rows].
        size: scores in a layer.
        limits: uint32 [layers, 2], up to size.

    Returns:
        uint32 [layers, 2].
    """
    width = size * bits.shape[0] // bits.size
    start = positions(bits.shape) * jnp.uint32(width)

    def count(limit: jax.Array) -> jax.Array:
        limit = _spread(limit, bits.ndim)
        inside = jnp.where(limit > start, jnp.minimum(limit - start, 32), 0)
        # Shifting by 32 is undefined, and no bit before the limit needs no shift.
        mask = jnp.where(inside > 0, jnp.uint32(2**32 - 1) >> jnp.minimum(32 - inside, 31), jnp.uint32(0))
        return lax.population_count(bits & mask)

    return _sums(count(limits[:, 0]) + (count(limits[:, 1]) << 16))


def smallest_from(scores: jax.Array, ranks: jax.Array) -> jax.Array:
    """The smallest score of each layer that is at least its threshold, as a rank; the highest rank of all if there is none.

    Args:
        scores: [layers, ..., C].
        ranks: uint32 [layers or 1].

    Returns:
        uint32 [layers].
    """
    key = _rows(keys(scores), _ROW)
    above = jnp.where(key > _spread(_key(ranks - 1), key.ndim), key, jnp.int32(2**31 - 1))
    rows = lax.optimization_barrier(jnp.min(above, axis=-1))  # one minimum of everything would be made without vectors
    return lax.bitcast_convert_type(jnp.min(rows, axis=tuple(range(1, rows.ndim))) - _NAN, jnp.uint32)


def kept(scores: jax.Array, ranks: jax.Array, limits: jax.Array) -> jax.Array:
    """Which scores are above the threshold, or equal to it at a position before the limit: bool [layers, ...].

    Args:
        scores: [layers, ...].
        ranks, limits: uint32 [layers or 1].
    """
    key = keys(scores)
    above, at, limit = (_spread(v, key.ndim) for v in (_key(ranks - 1), _key(ranks), limits))
    return (key > above) & ((key != at) | (positions(key.shape) < limit))
