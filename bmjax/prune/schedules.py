"""How much of the target sparsity is asked for at each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Schedule(NamedTuple):
    """A function of the step, and the steps between which masks are made.

    Attributes:
        fraction: int32 scalar step -> fraction of the target sparsity in [0, 1]; it is 1 at `end`, exactly.
        begin: the first step that makes masks.
        end: the last step that does, whatever the interval between updates.
    """

    fraction: Callable[[jax.Array], jax.Array]
    begin: int
    end: int

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """Fraction of the target at a step, float32."""
        return self.fraction(jnp.asarray(step, jnp.int32))


def one_shot(step: int) -> Schedule:
    """Nothing before the step, the whole target at it.

    Raises:
        ValueError: the step is negative.
    """
    if step < 0:
        raise ValueError(f"a schedule is given step {step}; steps count from 0")
    return Schedule(lambda now: jnp.where(now < step, 0.0, 1.0), step, step)


def constant() -> Schedule:
    """The whole target from the first step on."""
    return one_shot(0)


def cubic(begin: int, end: int) -> Schedule:
    """Fast at first and slow at the end: 1 - (1 - t)^3 with t from 0 at `begin` to 1 at `end`.

    Zhu and Gupta 2017, "To prune, or not to prune", equation 1, from an initial sparsity of 0.

    Raises:
        ValueError: begin is negative, or not before end.
    """
    if not 0 <= begin < end:
        raise ValueError(f"a cubic schedule is given begin {begin} and end {end}; expected 0 <= begin < end")

    def fraction(now: jax.Array) -> jax.Array:
        left = jnp.clip((end - now).astype(jnp.float32) / (end - begin), 0.0, 1.0)
        return 1.0 - left**3

    return Schedule(fraction, begin, end)
