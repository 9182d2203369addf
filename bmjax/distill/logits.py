"""Distillation from logits (Hinton, Vinyals & Dean 2015)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from bmjax.types import Batch, LossTerm, Mean, Outputs

_UNDERFLOW = -87.0  # exp of less is 0, or a number that float32 does not hold in full


def kl_divergence(student_logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """KL(teacher || student) per item of the softmaxes at a temperature. No factor T^2.

    A class of teacher probability 0 contributes 0, also where the student's logit is -inf.

    Args:
        student_logits, teacher_logits: [..., C] float.
        temperature: above 0.

    Returns:
        [...] float32, 0 or more.
    """
    log_q = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    log_p = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    # Chosen by the logarithm: a choice by p > 0 makes the student's pass need the teacher's exponentials.
    return jnp.sum(jnp.exp(log_p) * jnp.where(log_p > _UNDERFLOW, log_p - log_q, 0.0), axis=-1)


def kd(temperature: float = 4.0, t_squared: bool = True) -> LossTerm:
    """The distillation loss of Hinton et al. 2015: KL of the softened distributions, times T^2 if `t_squared`.

    With T^2 the gradient's size stays about the same when the temperature changes (section 2 of the paper).

    Raises:
        ValueError: temperature not above 0 or not finite; at the first use: no teacher, or logits of another shape.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"the distillation temperature is {temperature}; expected a number above 0")

    def term(student: Outputs, teacher: Outputs | None, batch: Batch) -> Mean:
        if teacher is None:
            raise ValueError("the term kd needs a teacher; give the step one, or leave kd out")
        mine, theirs = student.logits.shape, teacher.logits.shape
        if mine[-1] != theirs[-1]:
            raise ValueError(f"the student has {mine[-1]} classes and the teacher {theirs[-1]}; kd needs the same classes")
        if mine != theirs:  # a batch of 1 would broadcast in silence
            raise ValueError(f"the student's logits are {list(mine)} and the teacher's {list(theirs)}; kd needs the same shape")
        values = kl_divergence(student.logits, teacher.logits, temperature)
        return Mean.of(values * temperature**2 if t_squared else values, batch["weights"])

    return term
