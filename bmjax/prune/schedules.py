"""How much of the target sparsity is asked for at each step.

Begin and end are steps (int), counted from 0, or fractions of the run (float) whose length is then given as `steps`: 1.0 is its
last update. At its end every schedule asks for its target exactly, whatever the interval between updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.prune import kinds


class Schedule(NamedTuple):
    """What is asked for by step, and the steps between which masks are made.

    Attributes:
        fraction: (int32 step, target sparsity, a float or an array) -> fraction of the target in [0, 1], shaped like the target;
            it is 1 from `end` on, exactly.
        begin: the first step that makes masks.
        end: the last step that does, whatever the interval between updates; None if it never ends.
        initial: the sparsity that it starts from; no target may be below it.
    """

    fraction: Callable[[jax.Array, Any], jax.Array]
    begin: int
    end: int | None
    initial: float = 0.0

    def __call__(self, step: jax.Array | int, target: Any = 1.0) -> jax.Array:
        """Fraction of the target at a step, float32."""
        return self.fraction(jnp.asarray(step, jnp.int32), target)


def _step(value: int | float, steps: int | None) -> int:
    """A step, from a step or a fraction of the run."""
    kinds.number("a schedule's begin or end", value)
    if not isinstance(value, (int, np.integer)):
        value = float(value)
        if steps is None:
            raise ValueError(f"a schedule is given {value}, a fraction of the run; give its length too: steps=...")
        if not 0 <= value <= 1:
            raise ValueError(f"a schedule is given the fraction {value} of the run; expected 0 to 1, or a step as an int")
        if steps < 1:
            raise ValueError(f"a schedule is given a run of {steps} steps; expected 1 or more")
        return min(round(value * steps), steps - 1)  # the last update is number steps - 1
    if value < 0:
        raise ValueError(f"a schedule is given step {value}; steps count from 0")
    return int(value)


def _span(kind: str, begin: int | float, end: int | float, steps: int | None) -> tuple[int, int]:
    first, last = _step(begin, steps), _step(end, steps)
    if first >= last:
        raise ValueError(f"a {kind} schedule is given begin {begin} and end {end}; expected 0 <= begin < end")
    return first, last


def one_shot(step: int | float = 0, *, steps: int | None = None) -> Schedule:
    """Nothing before the step, the whole target at it.

    Raises:
        ValueError: the step is negative, or a fraction that cannot be one.
    """
    at = _step(step, steps)
    return Schedule(lambda now, target: jnp.where(now < at, 0.0, jnp.ones(jnp.shape(target), jnp.float32)), at, at)


def constant() -> Schedule:
    """The whole target from the first step on."""
    return one_shot(0)


def periodic(begin: int | float = 0, end: int | float | None = None, *, steps: int | None = None) -> Schedule:
    """The whole target from `begin` on, and masks made anew until `end`, or for ever.

    For masks that may change at the same sparsity: straight-through ones. Where weights are really dropped, which stay dropped,
    it is `one_shot(begin)`.

    Raises:
        ValueError: begin is negative, or not before end.
    """
    if end is None:
        return one_shot(begin, steps=steps)._replace(end=None)
    first, last = _span("periodic", begin, end, steps)
    return one_shot(first)._replace(end=last)


def polynomial(
    begin: int | float, end: int | float, power: float = 3.0, *, initial: float = 0.0, steps: int | None = None
) -> Schedule:
    """From `initial` at `begin` to the target at `end`: s_f + (s_i - s_f) (1 - t)^power with t from 0 to 1.

    Zhu and Gupta 2017, "To prune, or not to prune", equation 1.

    Args:
        begin, end: steps, or fractions of `steps`.
        power: above 0; 3 is fast at first and slow at the end.
        initial: the sparsity at `begin`, in [0, 1); below every target.
        steps: the length of the run, if fractions are given.

    Raises:
        ValueError: a value out of range, or begin not before end.
    """
    first, last = _span("polynomial" if power != 3 else "cubic", begin, end, steps)
    kinds.number("the power", power)
    kinds.number("the initial sparsity", initial)
    if not power > 0:
        raise ValueError(f"a polynomial schedule is given power {power}; expected a number above 0")
    if not 0 <= initial < 1:
        raise ValueError(f"a schedule is given the initial sparsity {initial}; expected a fraction, at least 0 and below 1")

    def fraction(now: jax.Array, target: Any) -> jax.Array:
        left = jnp.clip((last - now).astype(jnp.float32) / (last - first), 0.0, 1.0) ** power
        start = jnp.where(now < first, 0.0, _share(initial, target))
        return 1.0 - (1.0 - start) * left

    return Schedule(fraction, first, last, initial)


def cubic(begin: int | float, end: int | float, *, initial: float = 0.0, steps: int | None = None) -> Schedule:
    """`polynomial` of power 3: fast at first and slow at the end."""
    return polynomial(begin, end, 3.0, initial=initial, steps=steps)


def linear(begin: int | float, end: int | float, *, initial: float = 0.0, steps: int | None = None) -> Schedule:
    """`polynomial` of power 1: the same number of weights at every update."""
    return polynomial(begin, end, 1.0, initial=initial, steps=steps)


def iterative(begin: int | float, end: int | float, rounds: int, *, steps: int | None = None) -> Schedule:
    """In rounds, each of which drops the same fraction of what is left: (1 - s)^(k / rounds) stays after round k.

    Round 1 is at `begin`, the last one at `end`. Han et al. 2015, arXiv 1506.02626; Frankle and Carbin 2019, arXiv 1803.03635.

    Raises:
        ValueError: as `polynomial`, or rounds below 2.
    """
    first, last = _span("iterative", begin, end, steps)
    kinds.whole("the number of rounds", rounds)
    if rounds < 2:
        raise ValueError(f"an iterative schedule is given {rounds} rounds; expected 2 or more, or take one_shot")

    def fraction(now: jax.Array, target: Any) -> jax.Array:
        target = jnp.asarray(target, jnp.float32)
        done = jnp.floor((now - first).astype(jnp.float32) * (rounds - 1) / (last - first) + 1e-4) + 1.0
        done = jnp.clip(jnp.where(now < first, 0.0, done), 0.0, rounds)
        part = _share(-jnp.expm1(jnp.log1p(-jnp.minimum(target, 0.9999999)) * done / rounds), target)
        return jnp.where(done >= rounds, jnp.ones_like(part), part)

    return Schedule(fraction, first, last)


def _share(value: Any, target: Any) -> jax.Array:
    """value / target in [0, 1], and 0 where the target is 0."""
    target = jnp.asarray(target, jnp.float32)
    return jnp.clip(jnp.where(target > 0, value / jnp.where(target > 0, target, 1.0), 0.0), 0.0, 1.0)
