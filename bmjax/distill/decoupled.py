"""Decoupled distillation: the target class and the rest, weighed apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bmjax.distill.numerics import check_pair, check_temperature, log_probabilities, relative_entropy, squared

_NEVER = -1e30  # the logit of a class that takes no part: finite, so that a softmax over nothing else is no NaN


def dkd(
    s: jax.Array,
    t: jax.Array,
    labels: jax.Array,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    t_squared: bool = True,
) -> jax.Array:
    """T^2 (alpha TCKD + beta NCKD) (Zhao et al. 2022, eq. 7).

    TCKD is the KL of (p of the label, 1 - p of the label), teacher to student; NCKD that of the distributions over the other
    classes, each renormalised. Per item, `kd` = TCKD + (1 - p_t) NCKD (eq. 6), where p_t is the teacher's probability of the
    label; the weight of NCKD is freed from it. The paper's beta lies between 0.25 and 8, and the term's weight is 1, after a
    warm-up of 20 epochs.

    Args:
        s, t: student's and teacher's logits [..., C] float.
        labels: [...] int in [0, C); the value of any other is NaN.
        alpha, beta: of the two parts.
        temperature: above 0.
        t_squared: False leaves the factor T^2 out.

    Returns:
        [...] float32, 0 or more; 0 at s = t.

    Raises:
        ValueError: shapes that differ, labels of another shape, one class only, a temperature that is not above 0 or not finite.
    """
    check_pair("dkd", s, t)
    check_temperature(temperature)
    if labels.shape != s.shape[:-1]:
        raise ValueError(f"dkd: labels {list(labels.shape)} for logits {list(s.shape)}; give one for each item")
    if s.shape[-1] < 2:
        raise ValueError("dkd: the logits have 1 class; expected 2 or more")
    log_p, log_q = log_probabilities(t, temperature), log_probabilities(s, temperature)
    target = labels[..., None] == jnp.arange(s.shape[-1])
    binary = relative_entropy(_target_or_not(log_p, target), _target_or_not(log_q, target))
    others = relative_entropy(_among_others(log_p, target), _among_others(log_q, target))
    there = (labels >= 0) & (labels < s.shape[-1])
    return jnp.where(there, squared(alpha * binary + beta * others, temperature, t_squared), jnp.nan)


def _target_or_not(log_p: jax.Array, target: jax.Array) -> jax.Array:
    """[..., 2]: the logarithms of p of the label and of all others together; the latter by their own sum, as 1 - p cancels."""
    return jnp.stack([jnp.sum(jnp.where(target, log_p, 0.0), axis=-1), _log_sum(log_p, ~target)], axis=-1)


def _among_others(log_p: jax.Array, target: jax.Array) -> jax.Array:
    found = jax.nn.log_softmax(jnp.where(target, _NEVER, jnp.maximum(log_p, _NEVER)))
    # A class that is ruled out keeps the slope of its logarithm, as in `kd`.
    found = jnp.where(log_p > -jnp.inf, found, log_p - _log_sum(log_p, ~target)[..., None])
    return jnp.where(target, -jnp.inf, found)


def _log_sum(log_p: jax.Array, kept: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(jnp.where(kept, jnp.maximum(log_p, _NEVER), _NEVER), axis=-1)
