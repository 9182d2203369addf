"""Divergences between two heads, for vocabularies whose logits do not fit: the losses of `logits` and `divergences`, fused.

Each takes heads (hidden [..., D], kernel [D, V], bias [V] or None), as in `Outputs.head`, where the function of the same name in
`bmjax.distill` takes logits, and returns the same values with the same gradients. Logits exist a tile at a time, forward and
backward; student and teacher may have different widths D. `losses.on_head` makes terms of them. A divergence of your own is one
elementwise function: `losses.head_divergence(lambda log_s, log_t: ..., student, teacher)`.
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp

from bmjax.distill.divergences import jsd_summand, mixture_summand, tvd_summand
from bmjax.distill.numerics import (
    UNDERFLOW,
    bounded,
    check_share,
    check_temperature,
    entropy_summand,
    known,
    relative_entropy,
    squared,
)
from bmjax.losses import Chunks, Summand, head_coarse, head_deviation, head_divergence

HeadLike: TypeAlias = tuple[jax.Array, jax.Array, jax.Array | None]  # hidden [..., D], kernel [D, V], bias [V]


def same_vocabulary(s: jax.Array, t: jax.Array, vocabulary: int) -> tuple[jax.Array, jax.Array]:
    """Logits of student and teacher [..., V] without the classes from `vocabulary` on, as for padding at the end of one of them.

    Args:
        s, t: [..., V] float; each may have its own V.
        vocabulary: classes that stay; above 0 and at most the smaller V.

    Returns:
        Both, [..., vocabulary].

    Raises:
        ValueError: one of them has fewer classes.
    """
    if not 0 < vocabulary <= min(s.shape[-1], t.shape[-1]):
        raise ValueError(
            f"vocabulary is {vocabulary}, and the student has {s.shape[-1]} classes and the teacher {t.shape[-1]}; expected a "
            "number above 0 that is at most the smaller of them"
        )
    return s[..., :vocabulary], t[..., :vocabulary]


def kd(
    student: HeadLike,
    teacher: HeadLike,
    temperature: float = 4.0,
    t_squared: bool = True,
    chunks: Chunks = Chunks(),  # noqa: B008  # a tuple of numbers
) -> jax.Array:
    """`distill.kd` of two heads: T^2 KL(p_t || p_s) (Hinton, Vinyals & Dean 2015, section 2).

    Args:
        student, teacher: heads; the teacher gets no gradient.
        temperature: above 0.
        t_squared: False leaves the factor T^2 out.
        chunks: how much of the logits exists at a time.

    Returns:
        [...] float32.

    Raises:
        ValueError: items or vocabularies that differ, a temperature that is not above 0 or not finite.
    """
    return _fused("kd", _forward, student, teacher, temperature, t_squared, chunks)


def soft_cross_entropy(
    student: HeadLike,
    teacher: HeadLike,
    temperature: float = 4.0,
    t_squared: bool = True,
    chunks: Chunks = Chunks(),  # noqa: B008
) -> jax.Array:
    """`distill.soft_cross_entropy` of two heads: T^2 times minus the sum of p_t log p_s. Arguments and errors as for `kd`."""
    return _fused("soft_cross_entropy", _soft, student, teacher, temperature, t_squared, chunks)


def reverse_kl(
    student: HeadLike,
    teacher: HeadLike,
    temperature: float = 1.0,
    t_squared: bool = True,
    chunks: Chunks = Chunks(),  # noqa: B008
) -> jax.Array:
    """`distill.reverse_kl` of two heads: T^2 KL(p_s || p_t). Arguments and errors as for `kd`."""
    return _fused("reverse_kl", entropy_summand, student, teacher, temperature, t_squared, chunks)


def jsd(
    student: HeadLike,
    teacher: HeadLike,
    beta: float = 0.5,
    temperature: float = 1.0,
    t_squared: bool = True,
    chunks: Chunks = Chunks(),  # noqa: B008
) -> jax.Array:
    """`distill.jsd` of two heads, divided by beta (1 - beta). Arguments and errors as for `kd`; beta in [0, 1]."""
    beta = known(beta)
    check_share("jsd", "beta", beta)
    summand = _forward if beta == 0 else entropy_summand if beta == 1 else _jsd(beta)
    return _fused("jsd", summand, student, teacher, temperature, t_squared, chunks)


def skew_kl(
    student: HeadLike,
    teacher: HeadLike,
    alpha: float = 0.1,
    temperature: float = 1.0,
    t_squared: bool = True,
    chunks: Chunks = Chunks(),  # noqa: B008
) -> jax.Array:
    """`distill.skew_kl` of two heads: T^2 KL(p_t || alpha p_t + (1 - alpha) p_s). As for `kd`; alpha in [0, 1)."""
    alpha = known(alpha)
    check_share("skew_kl", "alpha", alpha, open_high=True)
    summand = _skewed(alpha) if alpha else _forward
    return _fused("skew_kl", summand, student, teacher, temperature, t_squared, chunks)


def skew_reverse_kl(
    student: HeadLike,
    teacher: HeadLike,
    alpha: float = 0.1,
    temperature: float = 1.0,
    t_squared: bool = True,
    chunks: Chunks = Chunks(),  # noqa: B008
) -> jax.Array:
    """`distill.skew_reverse_kl` of two heads: T^2 KL(p_s || (1 - alpha) p_t + alpha p_s). As for `kd`; alpha in [0, 1)."""
    alpha = known(alpha)
    check_share("skew_reverse_kl", "alpha", alpha, open_high=True)
    summand = _skewed_reverse(alpha) if alpha else entropy_summand
    return _fused("skew_reverse_kl", summand, student, teacher, temperature, t_squared, chunks)


def tvd(
    student: HeadLike,
    teacher: HeadLike,
    temperature: float = 1.0,
    chunks: Chunks = Chunks(),  # noqa: B008
) -> jax.Array:
    """`distill.tvd` of two heads: half the sum of |p_t - p_s|, without T^2. Arguments and errors as for `kd`."""
    return _fused("tvd", tvd_summand, student, teacher, temperature, False, chunks)


def dkd(
    student: HeadLike,
    teacher: HeadLike,
    labels: jax.Array,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    t_squared: bool = True,
    chunks: Chunks = Chunks(),  # noqa: B008
) -> jax.Array:
    """`distill.dkd` of two heads: T^2 (alpha TCKD + beta NCKD). As for `kd`; labels [...] int in [0, V)."""
    check_temperature(temperature)
    if student[1].shape[-1] < 2:
        raise ValueError("dkd: the heads have 1 class; expected 2 or more")
    there = (labels >= 0) & (labels < student[1].shape[-1])
    labels = jnp.where(there, labels, 0)  # an ignored one must not reach the gradient of its item
    others = head_divergence(_forward, student, teacher, temperature, chunks, without=labels, name="dkd")
    pair = (head_coarse(head, labels[..., None], temperature, chunks) for head in (student, teacher))
    mine, theirs = pair
    there &= ~jnp.isnan(mine + theirs).any(-1)
    log_q, log_p = (jax.nn.log_softmax(jnp.where(there[..., None], z, 0.0)) for z in (mine, theirs))  # the label, all others
    binary = relative_entropy(jax.lax.stop_gradient(log_p), log_q)
    return jnp.where(there, squared(alpha * binary + beta * others, temperature, t_squared), jnp.nan)


def logit_standardized_kd(
    student: HeadLike,
    teacher: HeadLike,
    temperature: float = 2.0,
    t_squared: bool = True,
    chunks: Chunks = Chunks(),  # noqa: B008
) -> jax.Array:
    """`distill.logit_standardized_kd` of two heads. Arguments and errors as for `kd`.

    A softmax does not see the mean, so that to divide an item's logits by their deviation is to give it a temperature of its own.
    """
    check_temperature(temperature)
    warmth = temperature * head_deviation(student, chunks), temperature * head_deviation(teacher, chunks)
    values = head_divergence(_forward, student, teacher, warmth, chunks, name="logit_standardized_kd")
    return squared(values, temperature, t_squared)


def _fused(
    name: str,
    summand: Summand,
    student: HeadLike,
    teacher: HeadLike,
    temperature: float,
    t_squared: bool,
    chunks: Chunks,
) -> jax.Array:
    check_temperature(temperature)
    return squared(head_divergence(summand, student, teacher, temperature, chunks, name=name), temperature, t_squared)


def _forward(log_s: jax.Array, log_t: jax.Array) -> jax.Array:
    return entropy_summand(log_t, log_s)


def _soft(log_s: jax.Array, log_t: jax.Array) -> jax.Array:
    return -jnp.exp(log_t) * jnp.where(log_t > UNDERFLOW, bounded(log_s), 0.0)


# Cached, so that a function which is called again is the same one to jit.


@functools.cache
def _jsd(beta: float) -> Summand:
    return functools.partial(jsd_summand, beta=beta)


@functools.cache
def _skewed(alpha: float) -> Summand:
    return lambda log_s, log_t: mixture_summand(log_t, log_s, 1 - alpha)


@functools.cache
def _skewed_reverse(alpha: float) -> Summand:
    return lambda log_s, log_t: mixture_summand(log_s, log_t, 1 - alpha)
