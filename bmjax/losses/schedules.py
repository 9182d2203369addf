"""Numbers that may follow the step: a constant, or an optax schedule in its place.

A schedule is evaluated inside the step at the number of updates done before it: the first update sees 0, the last one of a run
of n steps n - 1.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Schedule: TypeAlias = Callable[[Any], Any]  # step, an int32 scalar -> scalar

KINDS = ("linear", "cosine")


def at(value: float | Schedule, step: jax.Array) -> Any:
    """A number as it is, a schedule's float32 scalar at a step."""
    return jnp.asarray(value(step), jnp.float32) if callable(value) else value


def ramp(begin: float, end: float, steps: int, kind: str = "linear") -> Schedule:
    """From `begin` at step 0 to exactly `end` at the last step, steps - 1, and from there on.

    Linear: begin + (end - begin) f with f = step / (steps - 1); cosine: f is (1 - cos(pi step / (steps - 1))) / 2.

    Args:
        begin, end: finite.
        steps: of the run, 1 or more; a run of 1 sees `end` alone.
        kind: one of `KINDS`.

    Raises:
        ValueError: another kind, fewer than 1 step, or an end that is not finite.
    """
    if kind not in KINDS:
        raise ValueError(f"the schedule is {kind!r}; expected one of {', '.join(KINDS)}")
    if steps < 1 or not (math.isfinite(begin) and math.isfinite(end)):
        raise ValueError(f"a schedule from {begin} to {end} over {steps} steps; expected finite numbers, and 1 step or more")

    def schedule(step: jax.Array) -> jax.Array:
        share = jnp.clip(jnp.asarray(step, jnp.float32) / max(steps - 1, 1), 0.0, 1.0)
        share = share if kind == "linear" else 0.5 * (1 - jnp.cos(jnp.pi * share))
        # Chosen at the end: begin + (end - begin) rounds.
        return jnp.where(jnp.asarray(step) >= steps - 1, jnp.float32(end), jnp.float32(begin) + (end - begin) * share)

    return schedule


def check(what: str, value: float | Schedule, step: int = 0, *, positive: bool = False) -> None:
    """Raises ValueError if a number, or a schedule at a step, is not finite, or not above 0 where it must be.

    Args:
        what: "the weight of kd", for the message.
        value: the number or schedule.
        step: where a schedule is looked at, on the host.
        positive: for temperatures.
    """
    found, where = _number(what, value, step), f" at step {step}" if callable(value) else ""
    if not math.isfinite(found) or (positive and found <= 0):
        expected = "a number above 0" if positive else "a finite number"
        raise ValueError(f"{what} is {found}{where}; expected {expected}")


def _number(what: str, value: float | Schedule, step: int) -> float:
    if not callable(value):
        return value
    try:
        traced = jax.eval_shape(lambda step: jnp.asarray(value(step)), jax.ShapeDtypeStruct((), jnp.int32))
    except (TypeError, jax.errors.JAXTypeError) as error:
        raise ValueError(
            f"{what} is a schedule that cannot be traced ({str(error).splitlines()[0]}); make it of optax's schedules, or of "
            "jnp.where in place of if"
        ) from None
    if traced.shape:
        raise ValueError(f"{what} is a schedule that gives {list(traced.shape)}; expected one number for a step")
    return float(value(jnp.int32(step)))


def found_in(fn: Callable[..., Any], kw: Mapping[str, Any]) -> dict[str, Schedule]:
    """The arguments that are functions where `fn` wants a number: a float or an int by its default or its annotation."""
    parameters = inspect.signature(fn).parameters
    return {name: value for name, value in kw.items() if callable(value) and _numeric(parameters.get(name))}


def _numeric(parameter: inspect.Parameter | None) -> bool:
    if parameter is None:
        return False
    by_default = isinstance(parameter.default, int | float) and not isinstance(parameter.default, bool)
    return by_default or parameter.annotation in (float, int, "float", "int")
