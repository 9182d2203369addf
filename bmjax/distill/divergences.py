"""Other divergences between the teacher's distribution and the student's: reverse, mixed, total variation."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from bmjax.distill.logits import kd
from bmjax.distill.numerics import (
    RULED_OUT,
    check_pair,
    check_share,
    check_temperature,
    known,
    log_probabilities,
    relative_entropy,
    squared,
)

_SERIES = 0.02  # below it exp(d) - 1 - d loses digits


def reverse_kl(s: jax.Array, t: jax.Array, temperature: float = 1.0, t_squared: bool = True) -> jax.Array:
    """T^2 KL(p_s || p_t): the student seeks the teacher's modes (Gu et al. 2024, MiniLLM, eq. 1). The usual weight is 1.

    Args:
        s, t: student's and teacher's logits [..., C] float.
        temperature: above 0.
        t_squared: False leaves the factor T^2 out.

    Returns:
        [...] float32, 0 or more; 0 at s = t. A class that the teacher alone rules out by -inf counts with a log-probability of
        -200, so that value and gradient stay finite: the gradient takes the student's mass from it.

    Raises:
        ValueError: shapes that differ, a temperature that is not above 0 or not finite.
    """
    check_pair("reverse_kl", s, t)
    check_temperature(temperature)
    value = relative_entropy(log_probabilities(s, temperature), log_probabilities(t, temperature))
    return squared(value, temperature, t_squared)


def jsd(s: jax.Array, t: jax.Array, beta: float = 0.5, temperature: float = 1.0, t_squared: bool = True) -> jax.Array:
    """T^2 [beta KL(p_t || m) + (1 - beta) KL(p_s || m)] / (beta (1 - beta)), with m = beta p_t + (1 - beta) p_s.

    The generalised Jensen-Shannon divergence (Agarwal et al. 2024, GKD, eq. 1), divided so that it goes over to the forward KL at
    beta = 0 and to the reverse KL at beta = 1; without that it vanishes at both ends. The usual weight is 1; at beta = 1/2 it is
    four times the Jensen-Shannon divergence.

    Args:
        s, t: student's and teacher's logits [..., C] float.
        beta: in [0, 1]; one that follows a schedule is kept 1e-4 from both ends.
        temperature, t_squared: as for `reverse_kl`.

    Returns:
        [...] float32, 0 or more; 0 at s = t; at most T^2 log(2) 4 at beta = 1/2.

    Raises:
        ValueError: as for `reverse_kl`, and beta outside [0, 1].
    """
    beta = known(beta)
    check_share("jsd", "beta", beta)
    if isinstance(beta, int | float) and beta in (0, 1):
        return (reverse_kl if beta else kd)(s, t, temperature, t_squared)
    beta = _inside(beta)
    check_pair("jsd", s, t)
    check_temperature(temperature)
    value = jsd_summand(log_probabilities(s, temperature), log_probabilities(t, temperature), beta).sum(-1)
    return squared(value, temperature, t_squared)


def skew_kl(s: jax.Array, t: jax.Array, alpha: float = 0.1, temperature: float = 1.0, t_squared: bool = True) -> jax.Array:
    """T^2 KL(p_t || alpha p_t + (1 - alpha) p_s): a KL with a bounded gradient (Ko et al. 2024, DistiLLM, eq. 3).

    Arguments, shapes and errors as for `jsd`, with alpha in [0, 1); 0 is the forward KL. The usual weight is 1.
    """
    alpha = known(alpha)
    check_share("skew_kl", "alpha", alpha, open_high=True)
    if isinstance(alpha, int | float) and alpha == 0:
        return kd(s, t, temperature, t_squared)
    return _skewed("skew_kl", s, t, _inside(alpha), temperature, t_squared)


def skew_reverse_kl(
    s: jax.Array, t: jax.Array, alpha: float = 0.1, temperature: float = 1.0, t_squared: bool = True
) -> jax.Array:
    """T^2 KL(p_s || (1 - alpha) p_t + alpha p_s) (Ko et al. 2024, DistiLLM, section 3.1).

    Arguments, shapes and errors as for `jsd`, with alpha in [0, 1); 0 is the reverse KL. The usual weight is 1.
    """
    check_pair("skew_reverse_kl", s, t)  # before they change places
    alpha = known(alpha)
    check_share("skew_reverse_kl", "alpha", alpha, open_high=True)
    if isinstance(alpha, int | float) and alpha == 0:
        return reverse_kl(s, t, temperature, t_squared)
    return _skewed("skew_reverse_kl", t, s, _inside(alpha), temperature, t_squared)


def tvd(s: jax.Array, t: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Half the sum of |p_t - p_s|: the total variation distance (Wen et al. 2023, f-DISTILL, eq. 8). The usual weight is 1.

    No factor T^2. Arguments, shapes and errors as for `reverse_kl`; in [0, 1], and 0 at s = t.
    """
    check_pair("tvd", s, t)
    check_temperature(temperature)
    return tvd_summand(log_probabilities(s, temperature), log_probabilities(t, temperature)).sum(-1)


def jsd_summand(log_s: jax.Array, log_t: jax.Array, beta: float) -> jax.Array:
    """What a class adds to `jsd` with beta in (0, 1), elementwise on log-probabilities; no T^2."""
    return mixture_summand(log_t, log_s, 1 - beta) / (1 - beta) + mixture_summand(log_s, log_t, beta) / beta


def tvd_summand(log_s: jax.Array, log_t: jax.Array) -> jax.Array:
    """What a class adds to `tvd`, elementwise on log-probabilities."""
    return 0.5 * jnp.abs(jnp.exp(log_t) - jnp.exp(log_s))


def _skewed(name: str, b: jax.Array, a: jax.Array, alpha: float, temperature: float, t_squared: bool) -> jax.Array:
    """T^2 KL(a || alpha a + (1 - alpha) b) of the softmaxes of two logits."""
    check_pair(name, b, a)
    check_temperature(temperature)
    value = mixture_summand(log_probabilities(a, temperature), log_probabilities(b, temperature), 1 - alpha).sum(-1)
    return squared(value, temperature, t_squared)


def _inside(share: float) -> Any:
    """A traced share away from 0 and 1, where the formulas divide by 0; a number as it is."""
    return share if isinstance(share, int | float) else jnp.clip(share, 1e-4, 1 - 1e-4)


def mixture_summand(log_a: jax.Array, log_b: jax.Array, share: float) -> jax.Array:
    """What a class adds to KL(a || m) with m = (1 - share) a + share b; exact in its leading digits also where share is small.

    With d = log(m / a) it is a (exp(d) - 1 - d), which is 0 or more: the usual sum of a d cancels.
    """
    log_a, log_b = jnp.maximum(log_a, RULED_OUT), jnp.maximum(log_b, RULED_OUT)
    ratio = log_b - log_a
    of: Any = math if isinstance(share, int | float) else jnp
    log_m = jnp.logaddexp(log_a + of.log1p(-share), log_b + of.log(share))
    near = ratio < 30
    d = jnp.where(near, jnp.log1p(share * jnp.expm1(jnp.where(near, ratio, 0.0))), log_m - log_a)
    series = jnp.square(d) * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d / 120)))
    a = jnp.exp(log_a)
    return jnp.where(jnp.abs(d) < _SERIES, a * series, jnp.exp(log_m) - a - a * d)
