"""The search for thresholds: brackets that narrow with every pass of counting, for many problems at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from bmjax.prune.words import Words, as_float, at_least, equal, minus, smaller, where

Counter: TypeAlias = Callable[[jax.Array], Words]  # thresholds uint32 [problems, n] -> how many are at least that, same shape


class Bracket(NamedTuple):
    """Where the thresholds are: at least k keys reach `lo`, not more than k reach `hi`. All [problems]."""

    lo: jax.Array
    hi: jax.Array
    above_lo: Words
    above_hi: Words


class Goal(NamedTuple):
    """When a search may stop: k keys reach lo, or hi is lo + 1, or at most `slack` keys lie in a range of at most `widest`."""

    k: Words  # from above_hi to above_lo
    slack: jax.Array | float = 0.0
    widest: int = 2**32 - 1


def inside_of(bracket: Bracket) -> jax.Array:
    """How many keys lie from lo to below hi, float32."""
    return as_float(minus(bracket.above_lo, bracket.above_hi))


def unfinished(bracket: Bracket, goal: Goal) -> jax.Array:
    """Which problems have not reached their goal: bool [problems]."""
    width = bracket.hi - bracket.lo
    few = (inside_of(bracket) <= goal.slack) & (width <= jnp.uint32(goal.widest))
    return ~equal(bracket.above_lo, goal.k) & (width > 1) & ~few


def _narrowed(bracket: Bracket, goal: Goal, at: jax.Array, counts: Words) -> Bracket:
    """The bracket after counting at some thresholds, [problems, n]. What is finished stays as it is."""
    lo, hi, above_lo, above_hi = bracket
    going = unfinished(bracket, goal)
    for j in range(at.shape[-1]):
        t, count = at[..., j], Words(counts.high[..., j], counts.low[..., j])
        inside, enough = going & (t > lo) & (t < hi), at_least(count, goal.k)
        up, down = inside & enough, inside & ~enough
        lo, above_lo = jnp.where(up, t, lo), where(up, count, above_lo)
        hi, above_hi = jnp.where(down, t, hi), where(down, count, above_hi)
    return Bracket(lo, hi, above_lo, above_hi)


def _thresholds(bracket: Bracket, k: Words, even: jax.Array) -> jax.Array:
    """Two places to count at, between lo and hi: uint32 [problems, 2].

    They stand where the k-th largest is if the keys lie evenly between lo and hi, give or take two standard deviations of
    that guess; or, if `even`, they cut the range in three whatever the scores look like.
    """
    inside = jnp.maximum(inside_of(bracket), 1.0)
    share = as_float(minus(bracket.above_lo, smaller(k, bracket.above_lo))) / inside
    band = 2.0 * jnp.sqrt(jnp.maximum(share * (1.0 - share), 0.0) / inside) + 0.5 / inside
    width = bracket.hi - bracket.lo
    parts = jnp.stack([jnp.where(even, 1 / 3, share - band), jnp.where(even, 2 / 3, share + band)], axis=-1)
    # 0.999 because the product is rounded and must not reach 2^32; it only moves a guess.
    offset = (jnp.clip(parts, 0.0, 0.999) * width.astype(jnp.float32)[..., None]).astype(jnp.uint32)
    first = jnp.clip(offset[..., 0], 1, jnp.maximum(width, 3) - 2)
    second = jnp.clip(offset[..., 1], first + 1, jnp.maximum(width, first + 2) - 1)
    return bracket.lo[..., None] + jnp.stack([first, second], axis=-1)


class State(NamedTuple):
    """A search under way: its bracket, where to count next (uint32 [problems, 2]), and whether that is in thirds (bool)."""

    bracket: Bracket
    at: jax.Array
    even: jax.Array


def begin(bracket: Bracket, k: Words, even: bool) -> State:
    """A search that starts where keys that lie evenly would put the k-th, or, if `even`, in thirds."""
    evenly = jnp.full(bracket.lo.shape, even)
    return State(bracket, _thresholds(bracket, k, evenly), evenly)


def search(count: Counter, goal: Goal, state: State) -> State:
    """Narrows each problem's bracket until its goal is reached; `count` counts for all problems at once."""

    def narrow(state: State) -> State:
        bracket = _narrowed(state.bracket, goal, state.at, count(state.at))
        # The guess that keys lie evenly has failed where too many are left; then one pass does not rely on it.
        even = ~state.even & (inside_of(bracket) > inside_of(state.bracket) / 3)
        return State(bracket, _thresholds(bracket, goal.k, even), even)

    return lax.while_loop(lambda state: jnp.any(unfinished(state.bracket, goal)), narrow, state)
