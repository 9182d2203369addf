"""What the losses on logits share: checks, and sums over classes that stay finite."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

UNDERFLOW = -87.0  # exp of less is 0, or a number that float32 does not hold in full
RULED_OUT = -200.0  # log-probability of a class that is ruled out by -inf, where it is divided by: exp of it is 0


def check_pair(name: str, s: jax.Array, t: jax.Array) -> None:
    """Raises ValueError if the two arrays differ in shape: a batch of 1 would broadcast in silence."""
    if jnp.shape(s) != jnp.shape(t):
        raise ValueError(
            f"{name}: the student's array is {list(jnp.shape(s))} and the teacher's {list(jnp.shape(t))}; they must agree"
        )


def known(value: Any) -> Any:
    """A scalar whose value is known, of NumPy or JAX too, as a Python number; what is traced, or is no scalar, as it is."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray | jax.Array) and not isinstance(value, jax.core.Tracer)):
        return value.item() if jnp.ndim(value) == 0 else value
    return value


def check_temperature(temperature: float) -> None:
    """Raises ValueError on a number that is not above 0 or not finite; a traced one passes."""
    temperature = known(temperature)
    if isinstance(temperature, int | float) and not 0 < temperature < math.inf:
        raise ValueError(f"the distillation temperature is {temperature}; expected a number above 0")


def check_share(name: str, what: str, value: float, *, open_high: bool = False) -> None:
    """Raises ValueError on a number outside [0, 1], or outside [0, 1) with `open_high`; a traced one passes."""
    value = known(value)
    if isinstance(value, int | float) and not (0 <= value < 1 or (value == 1 and not open_high)):
        raise ValueError(f"{name}: {what} is {value}; expected a number in [0, 1{')' if open_high else ']'}")


def log_probabilities(logits: jax.Array, temperature: float) -> jax.Array:
    """[..., C] float32: log-softmax at a temperature."""
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)


@jax.custom_jvp
def bounded(log_q: jax.Array) -> jax.Array:
    """Log-probabilities with a class that is ruled out, by -inf or a number that stands for it, at `RULED_OUT`."""
    return jnp.where(log_q < -1e29, RULED_OUT, log_q)


@bounded.defjvp
def _bounded_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # The slope of the logarithm without a bound: the gradient of a KL by the student's logits stays q - p.
    return bounded(*primals), tangents[0]


def relative_entropy(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """[...]: sum of p (log p - log q) over the last axis; as `entropy_summand`."""
    return jnp.sum(entropy_summand(log_p, log_q), axis=-1)


def entropy_summand(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """p (log p - log q), elementwise; 0 where p = 0, and finite with a finite slope where q alone is ruled out."""
    # Chosen by the logarithm: a choice by p > 0 makes the pass of q need the exponentials of p.
    return jnp.exp(log_p) * jnp.where(log_p > UNDERFLOW, log_p - bounded(log_q), 0.0)


def squared(values: jax.Array, temperature: float, t_squared: bool) -> jax.Array:
    """The values times T^2, if `t_squared`: the gradient's size then stays about the same when the temperature changes."""
    return values * temperature**2 if t_squared else values
