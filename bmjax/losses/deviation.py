"""How far the logits of a head are spread, fused with its product, forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bmjax.losses import tiles
from bmjax.losses.fused import _flat, _rounds
from bmjax.losses.tiles import Chunks, Head, Plan, Tile
from bmjax.parallel import collectives

LEAST = 1e-7  # logits of a deviation up to this are all alike


def head_deviation(
    head: tuple[jax.Array, jax.Array, jax.Array | None],
    chunks: Chunks = Chunks(),  # noqa: B008  # a tuple of numbers
) -> jax.Array:
    """Standard deviation of an item's logits hidden @ kernel + bias over the classes; those of -inf take no part.

    Where it is at most `LEAST`, as of a last layer that starts at zero, it is 1 with a gradient of 0. Means and sums of squares
    about them are merged tile by tile (Chan, Golub & LeVeque 1983), so that nothing cancels.

    Args:
        head: (hidden [..., D], kernel [D, V], bias [V] or None), float; products are summed in float32.
        chunks: how much of the logits exists at a time.

    Returns:
        [...] float32.

    Raises:
        ValueError: shapes that do not go together.
    """
    flat = _flat("the deviation", head)
    sizes = tiles.plan(len(flat.hidden), flat.kernel.shape[1], chunks)
    return _deviation(sizes, collectives.vary_as(flat, head)).reshape(head[0].shape[:-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _deviation(sizes: Plan, head: Head) -> jax.Array:
    return _forward(sizes, head)[0]


def _forward(sizes: Plan, head: Head) -> tuple[jax.Array, Any]:
    def tile(where: Tile, logits: list[jax.Array], sums: Any) -> tuple[jax.Array, ...]:
        kept = where.fresh & (logits[0] > -jnp.inf)
        count = kept.sum(-1).astype(jnp.float32)
        # About the largest, so that of logits which are all alike the mean is exact.
        top = jnp.where(count > 0, jnp.max(jnp.where(kept, logits[0], -jnp.inf), axis=-1), 0.0)
        mean = top + jnp.where(kept, logits[0] - top[..., None], 0.0).sum(-1) / jnp.maximum(count, 1)
        return _merged(sums, (count, mean, jnp.square(jnp.where(kept, logits[0] - mean[..., None], 0.0)).sum(-1)))

    parts = tiles.sweep(sizes, [_rounds(sizes, head)], tile, tiles.nothing(sizes, 0.0, 0.0, 0.0))
    count, mean, squares = parts
    total = count.sum(-1)
    middle = (count * mean).sum(-1) / jnp.maximum(total, 1)
    squares = (squares + count * jnp.square(mean - middle[..., None])).sum(-1)
    found = jnp.sqrt(squares / jnp.maximum(total, 1))
    alike = found <= LEAST
    scale = jnp.where(alike, 0.0, 1 / (jnp.where(alike, 1.0, found) * jnp.maximum(total, 1)))
    return tiles.join(sizes, jnp.where(alike, 1.0, found)), (head, middle, scale)


def _merged(before: tuple[jax.Array, ...], more: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Count, mean and sum of squares about it, of two parts together."""
    count = before[0] + more[0]
    share, apart = more[0] / jnp.maximum(count, 1), more[1] - before[1]
    return count, before[1] + share * apart, before[2] + more[2] + before[0] * share * jnp.square(apart)


def _backward(sizes: Plan, kept: Any, cotangent: jax.Array) -> Any:
    head, middle, scale = kept

    def slope(where: Tile, logits: list[jax.Array], middle: jax.Array, scale: jax.Array) -> jax.Array:
        apart = jnp.where(logits[0] > -jnp.inf, logits[0] - middle[:, None, None], 0.0)
        return apart * scale[:, None, None]

    return (tiles.pull_back(sizes, [_rounds(sizes, head)], slope, tiles.split(sizes, cotangent), (middle, scale)),)


_deviation.defvjp(_forward, _backward)
