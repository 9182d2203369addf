"""Which layers matter: a layer that hardly turns its input may go."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from bmjax.types import Mean


def importance(hidden: Sequence[jax.Array], weights: jax.Array) -> jax.Array:
    """How much each layer changes the direction of what flows through it: the mean of 1 - cosine(input, output).

    Small means that little is lost without the layer (block influence: Men et al. 2024, "ShortGPT", eq. 1).

    Args:
        hidden: L + 1 arrays [B, ..., D]; `hidden[i]` enters layer i and `hidden[i + 1]` leaves it.
        weights: [B], 0 for examples that are padding; every position of an example counts alike.

    Returns:
        [L] float32, in [0, 2].

    Raises:
        ValueError: fewer than two arrays, or they differ in shape.
    """
    if len(hidden) < 2:
        raise ValueError(f"{len(hidden)} hidden states were given; L layers need L + 1 of them")
    if len({x.shape for x in hidden}) > 1:
        raise ValueError(f"hidden states must have one shape, found {[list(x.shape) for x in hidden]}")
    return jnp.stack([Mean.of(1 - _cosine(x, y), weights).value() for x, y in itertools.pairwise(hidden)])


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """[...] for [..., D]; 0 where a vector is zero."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.sum(x * y, axis=-1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)
