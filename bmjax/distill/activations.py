"""Losses on what an activation says: on which side of its threshold it is, and how much of it can be known."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bmjax.distill.numerics import known
from bmjax.distill.shapes import check_same, same_size


def activation_boundary(s: jax.Array, t: jax.Array, margin: float = 1.0) -> jax.Array:
    """Mean over all entries of the squared hinge to the teacher's side of 0 (Heo et al. 2019, eq. 5, per entry).

    relu(margin - s)^2 where the teacher's neuron is active (t > 0), relu(margin + s)^2 where it is not. For features before the
    activation. The usual weight is 1, before the training on the task. It is 0 where s is on the teacher's side by the margin.

    Args:
        s, t: student's and teacher's features [B, ..., C] float; maps of different size are average-pooled to the smaller.
        margin: above 0.

    Returns:
        float32 scalar, 0 or more.

    Raises:
        ValueError: shapes that differ, a margin that is not above 0.
    """
    margin = known(margin)
    if isinstance(margin, int | float) and not margin > 0:
        raise ValueError(f"activation_boundary: margin is {margin}; expected a number above 0")
    s, t = same_size("activation_boundary", s, t)
    check_same("activation_boundary", s, t)
    return jnp.mean(jnp.square(jax.nn.relu(margin - jnp.where(t > 0, s, -s))))


def vid(s: jax.Array, t: jax.Array, log_variance: jax.Array, floor: float = 1e-5) -> jax.Array:
    """Mean over all entries of (log v + (t - s)^2 / v) / 2 (Ahn et al. 2019, eq. 5-6, variational information distillation).

    Minus the log-likelihood of the teacher's feature under a Gaussian about the student's, up to a constant, with a trained
    variance v = softplus(log_variance) + floor for each channel. The usual weight is 1. It is negative where v is below 1.

    In a term: `on_features(vid, layers, project="linear", trained={"log_variance": vid_variance})`.

    Args:
        s, t: student's (projected) and teacher's features [B, ..., C] float; maps are pooled to the smaller size.
        log_variance: [C] float; what the softplus makes a variance of.
        floor: least variance.

    Returns:
        float32 scalar.

    Raises:
        ValueError: shapes that differ, or one variance too few or too many.
    """
    s, t = same_size("vid", s, t)
    check_same("vid", s, t)
    if log_variance.shape != t.shape[-1:]:
        raise ValueError(f"vid: log_variance is {list(log_variance.shape)} for {t.shape[-1]} channels; give one for each")
    variance = jax.nn.softplus(log_variance) + floor
    return jnp.mean(0.5 * (jnp.log(variance) + jnp.square(t - s) / variance))


def vid_variance(key: jax.Array, s: jax.Array, t: jax.Array) -> jax.Array:
    """The log_variance of `vid` to start with: a variance of 5 in each channel, as in the paper's experiments."""
    return jnp.full(t.shape[-1], jnp.log(jnp.expm1(5.0)), jnp.float32)
