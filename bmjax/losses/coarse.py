"""The logits of k classes and of all others as one, fused with the head's product, forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bmjax.losses import tiles
from bmjax.losses.fused import _flat, _rounds
from bmjax.losses.tiles import Chunks, Head, Plan, Tile
from bmjax.parallel import collectives


def head_coarse(
    head: tuple[jax.Array, jax.Array, jax.Array | None],
    indices: jax.Array,
    temperature: float | jax.Array = 1.0,
    chunks: Chunks = Chunks(),  # noqa: B008  # a tuple of numbers
) -> jax.Array:
    """`distill.coarse` of the logits z = hidden @ kernel + bias, which never exist as a whole, up to a constant for each item.

    [(z_i - c) / T for i in indices, log sum of exp((z_j - c) / T) over the others], with c the item's largest logit: a softmax is
    the same for any c, and so is its gradient, which takes c as constant. The others are summed by themselves, not as the whole
    less the k: what is left is right in its leading digits however small it is. Every tile of the logits is computed once
    forward and once backward; the k logits are read out of the tiles, since k columns of the kernel for each item would be
    k D numbers beside the V logits.

    Args:
        head: (hidden [..., D], kernel [D, V], bias [V] or None), float; products are summed in float32.
        indices: [..., k] int in [0, V), classes that differ from each other; an item that has any other is NaN.
        temperature: above 0; it gets no gradient.
        chunks: how much of the logits exists at a time.

    Returns:
        [..., k + 1] float32; the last is -inf where no class is left.

    Raises:
        ValueError: shapes that do not go together, more indices than classes.
    """
    hidden, kernel, bias = _flat("the coarse head", head)
    if indices.shape[:-1] != head[0].shape[:-1] or indices.shape[-1] > kernel.shape[1]:
        raise ValueError(
            f"the teacher's classes are {list(indices.shape)} for hidden {list(head[0].shape)} and {kernel.shape[1]} classes; "
            "expected [..., k] for each item's [..., D], with k up to the classes"
        )
    sizes = tiles.plan(len(hidden), kernel.shape[1], chunks)
    scale = jax.lax.stop_gradient(jnp.float32(temperature))
    flat, scale = collectives.vary_as((Head(hidden, kernel, bias), scale), (head, indices, scale))
    return _coarse(sizes, flat, indices.reshape(-1, indices.shape[-1]), scale).reshape(*indices.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _coarse(sizes: Plan, head: Head, indices: jax.Array, temperature: jax.Array) -> jax.Array:
    return _forward(sizes, head, indices, temperature)[0]


def _forward(sizes: Plan, head: Head, indices: jax.Array, temperature: jax.Array) -> tuple[jax.Array, Any]:
    def tile(where: Tile, logits: list[jax.Array], sums: Any, indices: jax.Array) -> tuple[jax.Array, ...]:
        largest, total, chosen = sums
        at = _places(where, indices)
        others = where.fresh & _set(jnp.ones(logits[0].shape, bool), at, jnp.zeros(at.shape, bool))
        chosen = jnp.where(at < sizes.size, _get(logits[0], at), chosen)
        return (*tiles.grown(largest, total, logits[0], others, temperature), chosen)

    given = tiles.split(sizes, indices)
    start = (*tiles.nothing(sizes, -jnp.inf, 0.0), jnp.zeros((*given.shape[:2], sizes.partitions, given.shape[-1])))
    largest, total, chosen = tiles.sweep(sizes, [_rounds(sizes, head)], tile, start, (given,))
    top, log_total = tiles.normalize(largest, total, temperature)
    there = (given >= 0) & (given < sizes.partitions * sizes.width)
    chosen = jnp.where(there, chosen.sum(-2), jnp.nan)  # each class is in one partition, and 0 in the others
    best = jnp.maximum(top, chosen.max(-1))
    best = jnp.where(best == -jnp.inf, 0.0, best)[..., None]
    found = jnp.concatenate([(chosen - best) / temperature, (top[..., None] - best) / temperature + log_total[..., None]], -1)
    return tiles.join(sizes, found), (head, indices, temperature, top, log_total)


def _backward(sizes: Plan, kept: Any, cotangent: jax.Array) -> Any:
    head, indices, temperature, top, log_total = kept
    # An empty bucket has no slope, nor one of classes of -inf alone.
    base, log_total = jnp.where(top == -jnp.inf, 0.0, top), jnp.where(log_total == -jnp.inf, jnp.inf, log_total)

    def slope(
        where: Tile, logits: list[jax.Array], indices: jax.Array, by: jax.Array, top: jax.Array, log_total: jax.Array
    ) -> jax.Array:
        by, at = by / temperature, _places(where, indices)
        share = jnp.exp(tiles.log_probabilities(logits[0], top, log_total, temperature)) * by[:, None, -1:]
        # What the share of the bucket gives the k classes themselves, infinite perhaps, is replaced.
        return _set(share, at, jnp.broadcast_to(by[:, None, :-1], at.shape))

    given = (tiles.split(sizes, indices), tiles.split(sizes, cotangent), base, log_total)
    counted = tiles.split(sizes, (cotangent != 0).any(-1).astype(jnp.float32))
    return tiles.pull_back(sizes, [_rounds(sizes, head)], slope, counted, given), None, None


_coarse.defvjp(_forward, _backward)


def _places(where: Tile, indices: jax.Array) -> jax.Array:
    """[n, P, k]: where in each partition's tile the classes [n, k] are; its size for those that are not in it."""
    size = where.classes.shape[-1]
    places = indices[:, None, :] - where.classes[:, :1]
    return jnp.where((places >= 0) & (places < size), places, size)


# Mapped over items and partitions, so that the compiler knows that none reads another's: it may split both over devices.


@jax.vmap
@jax.vmap
def _get(row: jax.Array, at: jax.Array) -> jax.Array:
    """[n, P, k] of a tile [n, P, size]; 0 beside it."""
    return row.at[at].get(mode="fill", fill_value=0)


@jax.vmap
@jax.vmap
def _set(row: jax.Array, at: jax.Array, value: jax.Array) -> jax.Array:
    """A tile [n, P, size] with values in their places; those beside it are left out."""
    return row.at[at].set(value, mode="drop")
