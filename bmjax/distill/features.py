"""Losses that compare features item by item."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bmjax.distill.shapes import check_same, same_size, unit


def hint(s: jax.Array, t: jax.Array) -> jax.Array:
    """Mean of (t - s)^2 over all entries (FitNets: Romero et al. 2015, eq. 3, per entry). The usual weight is 1 to 100.

    Widths that differ need a projection: `losses.on_features(hint, layers, project="linear")`.

    Args:
        s, t: student's and teacher's features [B, ..., C] float; maps [B, H, W, C] of different size are average-pooled to the
            smaller.

    Returns:
        float32 scalar, 0 at s = t.

    Raises:
        ValueError: shapes that differ in another way.
    """
    s, t = same_size("hint", s, t)
    check_same("hint", s, t)
    return jnp.mean(jnp.square(t - s))


def cosine(s: jax.Array, t: jax.Array) -> jax.Array:
    """Mean of 1 - cos(s, t) over all tokens or pixels (Sanh et al. 2019, DistilBERT, section 2). The usual weight is 1.

    Args, errors as for `hint`. A vector of zeros has the cosine 0 to all.

    Returns:
        float32 scalar in [0, 2]; 0 where s = a t with a > 0.
    """
    s, t = same_size("cosine", s, t)
    check_same("cosine", s, t)
    return jnp.mean(1 - jnp.sum(unit(s, -1) * unit(t, -1), axis=-1))
