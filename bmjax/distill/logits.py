"""Distillation from logits: softened targets and what they became."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bmjax.distill.numerics import (
    UNDERFLOW,
    check_pair,
    check_share,
    check_temperature,
    log_probabilities,
    relative_entropy,
    squared,
)


def kl_divergence(student_logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """KL(teacher || student) per item of the softmaxes at a temperature. No factor T^2.

    A class of teacher probability 0 contributes 0, also where the student's logit is -inf.

    Args:
        student_logits, teacher_logits: [..., C] float.
        temperature: above 0.

    Returns:
        [...] float32, 0 or more.
    """
    return relative_entropy(log_probabilities(teacher_logits, temperature), log_probabilities(student_logits, temperature))


def kd(s: jax.Array, t: jax.Array, temperature: float = 4.0, t_squared: bool = True) -> jax.Array:
    """T^2 KL(p_t || p_s), with p = softmax(logits / T) (Hinton, Vinyals & Dean 2015, section 2).

    With T^2 the gradient's size stays about the same when the temperature changes. The usual weight is 0.9, beside 0.1 of the
    task's loss.

    Args:
        s, t: student's and teacher's logits [..., C] float.
        temperature: above 0.
        t_squared: False leaves the factor T^2 out.

    Returns:
        [...] float32, 0 or more; 0 at s = t.

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
    return squared(-jnp.sum(jnp.exp(log_p) * jnp.where(log_p > UNDERFLOW, log_q, 0.0), axis=-1), temperature, t_squared)


def logit_standardized_kd(s: jax.Array, t: jax.Array, temperature: float = 2.0, t_squared: bool = True) -> jax.Array:
    """`kd` of standardised logits: (z - mean) / (standard deviation over the classes) / T (Sun et al. 2024, algorithm 1).

    The student need not match the range of the teacher's logits, only their relations. The paper's weight is 9, beside 0.1 of the
    task's loss. Classes of -inf take no part in the mean and the deviation, and stay at -inf.

    Arguments, shapes and errors as for `kd`; 0 where s = a t + b with a > 0.
    """
    check_pair("logit_standardized_kd", s, t)
    return kd(_standardized(s), _standardized(t), temperature, t_squared)


def _standardized(logits: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    kept = logits > -jnp.inf
    count = jnp.maximum(kept.sum(-1, keepdims=True), 1)
    centred = jnp.where(kept, logits, 0.0)
    centred = jnp.where(kept, centred - centred.sum(-1, keepdims=True) / count, 0.0)
    variance = jnp.square(centred).sum(-1, keepdims=True) / count
    # Bounded before the root, whose slope at 0 is infinite.
    return jnp.where(kept, centred * jax.lax.rsqrt(jnp.maximum(variance, 1e-14)), -jnp.inf)


def label_smoothing_teacher(
    s: jax.Array, labels: jax.Array, correct: float = 0.9, temperature: float = 20.0, t_squared: bool = True
) -> jax.Array:
    """T^2 KL(p || p_s) against a virtual teacher, right in `correct` of its mass, even in the rest (Yuan et al. 2020, eq. 9-10).

    The virtual teacher's logits are the logarithms of its probabilities: correct for the label, (1 - correct) / (C - 1) for every
    other class that the student does not mask with -inf; both distributions are softened. The paper takes `correct` of 0.9 and
    more, temperatures of 20 to 40, and a weight of 0.1 beside 0.9 of the task's loss.

    Args:
        s: student's logits [..., C] float.
        labels: [...] int in [0, C).
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
    return squared(relative_entropy(jax.nn.log_softmax(log_p / temperature), log_q), temperature, t_squared)
