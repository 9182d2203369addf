"""Distillation from logits: softened targets and what they became."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from bmjax.distill.numerics import (
    RULED_OUT,
    UNDERFLOW,
    bounded,
    check_pair,
    check_share,
    check_temperature,
    log_probabilities,
    relative_entropy,
    squared,
)
from bmjax.losses.deviation import LEAST


def kl_divergence(student_logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """KL(teacher || student) per item of the softmaxes at a temperature. No factor T^2.

    A class of teacher probability 0 contributes 0, also where the student's logit is -inf. One that the student alone rules out
    by -inf counts with a log-probability of -200, so that the value stays finite; the gradient is q - p there too.

    Args:
        student_logits, teacher_logits: [..., C] float.
        temperature: above 0.

    Returns:
        [...] float32, 0 or more.
    """
    return _kl(student_logits, teacher_logits, jnp.float32(1 / temperature))


@jax.custom_jvp
def _kl(s: jax.Array, t: jax.Array, inverse: jax.Array) -> jax.Array:
    return _value_and_slopes(s, t, inverse)[0]


@functools.partial(_kl.defjvp, symbolic_zeros=True)
def _kl_jvp(primals: tuple[jax.Array, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    # The slope is made beside the value, from the same exponentials. Left to autodiff, the parts of both are written to memory
    # one by one and read again in the backward pass: three times what this adds to a language model's step on a CPU.
    value, *slopes = _value_and_slopes(*primals)
    moved = jnp.zeros_like(value)
    for slope, tangent in zip(slopes, tangents):
        if not isinstance(tangent, SymbolicZero):
            product = slope * jnp.asarray(tangent, jnp.float32)
            moved += product if jnp.ndim(tangent) == 0 else jnp.sum(product, axis=-1)
    return value, moved


def _value_and_slopes(s: jax.Array, t: jax.Array, inverse: jax.Array) -> tuple[jax.Array, ...]:
    """KL(p || q) [...] of p = softmax(t * inverse) and q = softmax(s * inverse), and its slopes by s, by t and by inverse."""
    s, t = s.astype(jnp.float32), t.astype(jnp.float32)
    low_s, low_t = (z * inverse - jnp.max(z * inverse, axis=-1, keepdims=True) for z in (s, t))
    q, p = jnp.exp(low_s), jnp.exp(low_t)
    sum_q, sum_p = q.sum(-1, keepdims=True), p.sum(-1, keepdims=True)
    there = low_s > -jnp.inf
    # What the student rules out has the log-probability low_s - log(sum_q) = RULED_OUT; the slope is q - p there too.
    apart = jnp.where(low_t > UNDERFLOW, low_t - jnp.where(there, low_s, RULED_OUT + jnp.log(sum_q)), 0.0)
    mean = jnp.sum(p * apart, axis=-1, keepdims=True) / sum_p
    value = mean + (jnp.log(sum_q) - jnp.log(sum_p))
    q, p = q / sum_q, p / sum_p
    by_s, by_t = q - p, p * jnp.where(p > 0, apart - mean, 0.0)
    by_scale = jnp.where(there & (by_s != 0), by_s * s, 0.0) + jnp.where(by_t != 0, by_t * t, 0.0)
    by_inverse = jnp.sum(by_scale, axis=-1)
    return value[..., 0], by_s * inverse, by_t * inverse, by_inverse


def kd(s: jax.Array, t: jax.Array, temperature: float = 4.0, t_squared: bool = True) -> jax.Array:
    """T^2 KL(p_t || p_s), with p = softmax(logits / T) (Hinton, Vinyals & Dean 2015, section 2).

    With T^2 the gradient's size stays about the same when the temperature changes. The usual weight is 0.9, beside 0.1 of the
    task's loss.

    Args:
        s, t: student's and teacher's logits [..., C] float.
        temperature: above 0.
        t_squared: False leaves the factor T^2 out.

    Returns:
        [...] float32, 0 or more; 0 at s = t; finite also where the student rules out a class by -inf, as in `kl_divergence`.

    Raises:
        ValueError: shapes that differ, a temperature that is not above 0 or not finite.
    """
    check_pair("kd", s, t)
    check_temperature(temperature)
    return squared(kl_divergence(s, t, temperature), temperature, t_squared)


def soft_cross_entropy(s: jax.Array, t: jax.Array, temperature: float = 4.0, t_squared: bool = True) -> jax.Array:
    """T^2 times minus the sum of p_t log p_s: `kd` plus the teacher's entropy, with the same gradient (Hinton et al. 2015).

    Arguments, shapes, errors and usual weight as for `kd`; its least value is T^2 times the teacher's entropy.
    """
    check_pair("soft_cross_entropy", s, t)
    check_temperature(temperature)
    log_p, log_q = log_probabilities(t, temperature), log_probabilities(s, temperature)
    return squared(-jnp.sum(jnp.exp(log_p) * jnp.where(log_p > UNDERFLOW, bounded(log_q), 0.0), axis=-1), temperature, t_squared)


def logit_standardized_kd(s: jax.Array, t: jax.Array, temperature: float = 2.0, t_squared: bool = True) -> jax.Array:
    """`kd` of standardised logits: (z - mean) / (standard deviation over the classes) / T (Sun et al. 2024, algorithm 1).

    The student need not match the range of the teacher's logits, only their relations. The paper's weight is 9, beside 0.1 of the
    task's loss. Classes of -inf take no part in the mean and the deviation, and stay at -inf. Logits that are all alike, as those
    of a last layer that starts at zero, are divided by 1.

    Arguments, shapes and errors as for `kd`; 0 where s = a t + b with a > 0.
    """
    check_pair("logit_standardized_kd", s, t)
    return kd(_standardized(s), _standardized(t), temperature, t_squared)


def _standardized(logits: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    kept = logits > -jnp.inf
    count = jnp.maximum(kept.sum(-1, keepdims=True), 1)
    # About the largest first, so that logits which are all alike are exactly 0.
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    centred = jnp.where(kept, logits - jnp.where(top > -jnp.inf, top, 0.0), 0.0)
    centred = jnp.where(kept, centred - centred.sum(-1, keepdims=True) / count, 0.0)
    variance = jnp.square(centred).sum(-1, keepdims=True) / count
    # Chosen before the root, whose slope at 0 is infinite.
    alike = variance <= LEAST**2
    return jnp.where(kept, centred * jax.lax.rsqrt(jnp.where(alike, 1.0, variance)), -jnp.inf)


def label_smoothing_teacher(
    s: jax.Array, labels: jax.Array, correct: float = 0.9, temperature: float = 20.0, t_squared: bool = True
) -> jax.Array:
    """T^2 KL(p || p_s) against a virtual teacher, right in `correct` of its mass, even in the rest (Yuan et al. 2020, eq. 9-10).

    The virtual teacher's logits are the logarithms of its probabilities: correct for the label, (1 - correct) / (C - 1) for every
    other class that the student does not mask with -inf; both distributions are softened. The paper takes `correct` of 0.9 and
    more, temperatures of 20 to 40, and a weight of 0.1 beside 0.9 of the task's loss.

    Args:
        s: student's logits [..., C] float.
        labels: [...] int in [0, C); the value of any other is NaN.
        correct: in [0, 1).
        temperature, t_squared: as for `kd`.

    Returns:
        [...] float32, 0 or more.

    Raises:
        ValueError: labels of another shape, one class only, `correct` outside [0, 1), a bad temperature.
    """
    classes = s.shape[-1]
    if labels.shape != s.shape[:-1]:
        raise ValueError(
            f"label_smoothing_teacher: labels {list(labels.shape)} for logits {list(s.shape)}; give one for each item"
        )
    if classes < 2:
        raise ValueError("label_smoothing_teacher: the logits have 1 class; expected 2 or more")
    check_share("label_smoothing_teacher", "correct", correct, open_high=True)
    check_temperature(temperature)
    right, masked = labels[..., None] == jnp.arange(classes), s == -jnp.inf
    others = jnp.maximum(jnp.sum(~masked & ~right, axis=-1, keepdims=True), 1)
    log_p = jnp.where(masked, -jnp.inf, jnp.log(jnp.where(right, correct, (1 - correct) / others)))
    log_q = log_probabilities(s, temperature)
    values = squared(relative_entropy(jax.nn.log_softmax(log_p / temperature), log_q), temperature, t_squared)
    return jnp.where((labels >= 0) & (labels < classes), values, jnp.nan)
