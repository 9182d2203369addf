"""The loss of a student against its own moving average."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bmjax.distill.numerics import check_pair, check_temperature, log_probabilities


def consistency(s: jax.Array, t: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Mean over the classes of (p_t - p_s)^2, with p = softmax(logits / T) (Tarvainen & Valpola 2017, section 2, of two outputs).

    For a mean teacher, `train.Problem(mean_teacher=True)`. Bounded, so that a teacher that is still wrong does little harm. The
    paper's weight grows to 100 over the first tenth or so of the run; the gradient per class is small. No factor T^2.

    Args:
        s, t: student's and teacher's logits [..., C] float.
        temperature: above 0.

    Returns:
        [...] float32 in [0, 2 / C]; 0 where the distributions agree.

    Raises:
        ValueError: shapes that differ, a temperature that is not above 0 or not finite.
    """
    check_pair("consistency", s, t)
    check_temperature(temperature)
    p, q = jnp.exp(log_probabilities(t, temperature)), jnp.exp(log_probabilities(s, temperature))
    return jnp.mean(jnp.square(p - q), axis=-1)
