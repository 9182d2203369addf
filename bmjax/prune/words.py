"""Counts beyond int32, without 64-bit integers: high * BASE + low, two int32 words. And how many weights stay, as such counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BASE = 2**16  # counts go up to 2^47, and words of 2^15 arrays add up before the carry
LEAST_TOO_MANY = 2**47


class Words(NamedTuple):
    """Non-negative integers high * BASE + low, with 0 <= low < BASE: two int32 arrays of one shape."""

    high: jax.Array
    low: jax.Array


def words(value: Any) -> Words:
    """Words of Python ints of any size (one, or nested sequences), of int32 or uint32 arrays (below 0 is 0), or of words.

    Raises:
        ValueError: a Python int is negative, or 2^47 or more.
    """
    if isinstance(value, Words):
        return value
    if isinstance(value, jax.Array):
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(f"a count is given as {value.dtype}; expected integers")
        value = jnp.maximum(value, 0)
        return Words((value // BASE).astype(jnp.int32), (value % BASE).astype(jnp.int32))
    if isinstance(value, (list, tuple)) and any(isinstance(item, jax.Array) for item in value):
        return words(jnp.stack([jnp.asarray(item, jnp.int32) for item in value]))
    exact = np.asarray(value, dtype=object)  # Python's integers, which do not overflow
    if exact.size and (min(exact.flat) < 0 or max(exact.flat) >= LEAST_TOO_MANY):
        raise ValueError(f"a count is given as {value}; expected integers from 0 to below 2^47")
    return Words(jnp.asarray((exact // BASE).astype(np.int32)), jnp.asarray((exact % BASE).astype(np.int32)))


def _carried(high: jax.Array, low: jax.Array) -> Words:
    return Words(high + low // BASE, low % BASE)


def total(count: Words) -> Words:
    """The sum over the first axis, which stays with size 1."""
    return _carried(jnp.sum(count.high, axis=0, keepdims=True), jnp.sum(count.low, axis=0, keepdims=True))


def running(count: Words) -> Words:
    """The sum of all before, along the first axis."""
    return _carried(jnp.cumsum(count.high, axis=0) - count.high, jnp.cumsum(count.low, axis=0) - count.low)


def minus(a: Words, b: Words) -> Words:
    """a - b, for a >= b."""
    return _carried(a.high - b.high, a.low - b.low)


def at_least(a: Words, b: Words) -> jax.Array:
    """a >= b: bool."""
    return (a.high > b.high) | ((a.high == b.high) & (a.low >= b.low))


def equal(a: Words, b: Words) -> jax.Array:
    """a == b: bool."""
    return (a.high == b.high) & (a.low == b.low)


def where(condition: jax.Array, a: Words, b: Words) -> Words:
    """a where the condition holds, else b."""
    return Words(jnp.where(condition, a.high, b.high), jnp.where(condition, a.low, b.low))


def smaller(a: Words, b: Words) -> Words:
    """The smaller of the two."""
    return where(at_least(a, b), b, a)


def as_float(count: Words) -> jax.Array:
    """float32, rounded."""
    return count.high.astype(jnp.float32) * BASE + count.low.astype(jnp.float32)


def from_float(value: jax.Array) -> Words:
    """Words of a float32 that is not negative, about."""
    high = jnp.floor(value / BASE)
    return _carried(high.astype(jnp.int32), jnp.clip(value - high * BASE, 0, BASE - 1).astype(jnp.int32))


def scaled(count: Words, factor: jax.Array, plus: float = 0.0) -> Words:
    """floor(count * factor + plus) for a float32 factor in [0, 1]; relative error 2^-23, and exact at 0 and 1."""
    factor = jnp.asarray(factor, jnp.float32)
    high = count.high.astype(jnp.float32) * factor
    whole = jnp.floor(high)
    low = jnp.floor((high - whole) * BASE + count.low.astype(jnp.float32) * factor + plus)
    product = _carried(whole.astype(jnp.int32), low.astype(jnp.int32))
    return where(factor >= 1, count, smaller(product, count))


def remaining(
    sizes: Sequence[int], sparsity: Sequence[float] | jax.Array, fraction: jax.Array | float = 1.0, least: int = 0
) -> Words:
    """How many stay when a fraction of what is to be dropped is dropped; `rank` takes it as `keep`.

    Args:
        sizes: of each problem, static.
        sparsity: the fraction to drop in the end, in [0, 1], one for each problem: Python floats, for which exactly
            round(sparsity * size) are dropped, or a float32 array [problems] that may be traced, halves rounded up.
        fraction: of the way, float32 in [0, 1], scalar or [problems], may be traced.
        least: so many stay in any case, or all where there are fewer.

    Returns:
        size - floor(fraction * dropped) of each problem; size - dropped exactly at fraction 1.

    Raises:
        ValueError: not one sparsity for each size, or a Python float outside [0, 1].
    """
    given = sparsity.shape if isinstance(sparsity, jax.Array) else (len(sparsity),)
    if given != (len(sizes),):
        raise ValueError(f"sparsities of shape {list(given)} are given for {len(sizes)} sizes; expected one for each")
    full = words(list(sizes))
    if isinstance(sparsity, jax.Array):
        dropped = scaled(full, jnp.clip(sparsity, 0.0, 1.0), 0.5)
    else:
        if not all(0 <= share <= 1 for share in sparsity):
            raise ValueError(f"sparsities {list(sparsity)} are given; expected fractions to drop, from 0 to 1")
        dropped = words([round(share * size) for share, size in zip(sparsity, sizes)])
    left = minus(full, scaled(dropped, jnp.clip(fraction, 0.0, 1.0)))
    floor = words([min(least, size) for size in sizes])
    return where(at_least(left, floor), left, floor)
