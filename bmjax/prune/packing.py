"""Masks at one bit a weight: uint8 words of up to eight neighbours along one axis, on the device that holds those weights.

How the parameter is partitioned is not known inside jit, so an axis is packed in blocks: each fills words by itself, and a device
that holds whole blocks packs them alone. A packed mask has the parameter's axes, one of them shorter, and is partitioned as it.
An axis of a multiple of 64 packs to exactly an eighth; a shorter one takes up to one word for 4 weights. A mask that would take
more on every axis stays bool.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bmjax import trees
from bmjax.types import Params

_PARTS = 8  # a packed axis may be partitioned over so many devices, as far as powers of two divide it
_FEWEST = 4  # weights to a word, on average


class Layout(NamedTuple):
    """How a mask is packed.

    Attributes:
        axis: that is packed.
        blocks: neighbours along it that are packed by themselves; the axis may be partitioned into what divides this.
        words: of each block.
    """

    axis: int
    blocks: int
    words: int


@functools.cache
def layout(shape: tuple[int, ...]) -> Layout | None:
    """The axis that takes the fewest words, of equal ones that of the most blocks, then the first. None: it stays bool.

    The first, since of a square kernel that is what a reduction runs along.
    """
    found = [(size, _blocks(size), -axis) for axis, size in enumerate(shape)]
    usable = [(-blocks * words / size, blocks, axis, words) for size, (blocks, words), axis in found if blocks]
    if not usable:
        return None
    _, blocks, axis, words = max(usable)
    return Layout(-axis, blocks, words)


def _blocks(size: int) -> tuple[int, int]:
    """(blocks, words of each) of an axis: the fewest words, then the most blocks; (0, 0) if there are too many words."""
    parts = min(size & -size, _PARTS)
    if size == 0:
        return 0, 0
    if size % (8 * parts) == 0:
        return size // 8, 1
    divisors = (blocks for blocks in range(parts, size // _FEWEST + 1, parts) if size % blocks == 0)
    fits = [(blocks, -(-size // (8 * blocks))) for blocks in divisors]
    fits = [(blocks, words) for blocks, words in fits if blocks * words * _FEWEST <= size]
    return min(fits, key=lambda fit: (fit[0] * fit[1], -fit[0]), default=(0, 0))


def pack(mask: jax.Array) -> jax.Array:
    """uint8 with `blocks * words` entries along the axis of its `layout`; bool as it is where there is none, as of a scalar.

    Args:
        mask: bool.
    """
    how = layout(mask.shape)
    if how is None:
        return mask
    before, after = mask.shape[: how.axis], mask.shape[how.axis + 1 :]
    split = mask.reshape(*before, how.blocks, mask.shape[how.axis] // how.blocks, *after)
    if missing := 8 * how.words - split.shape[how.axis + 1]:
        split = jnp.pad(split, [(0, missing if axis == how.axis + 1 else 0) for axis in range(split.ndim)])
    split = split.reshape(*before, how.blocks * how.words, 8, *after).astype(jnp.uint8)
    weights = (1 << jnp.arange(8, dtype=jnp.uint8)).reshape(8, *(1,) * len(after))
    return jnp.sum(split * weights, axis=how.axis + 1, dtype=jnp.uint8)


def unpack(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The bool mask of `shape` that `pack` packed; a mask that is not packed stays as it is."""
    how = layout(tuple(shape))
    if packed.dtype == jnp.bool_ or how is None:
        return packed
    before, after = tuple(shape[: how.axis]), tuple(shape[how.axis + 1 :])
    bits = jnp.arange(8, dtype=jnp.uint8).reshape(8, *(1,) * len(after))
    split = ((jnp.expand_dims(packed, how.axis + 1) >> bits) & 1).astype(bool)
    size = shape[how.axis] // how.blocks
    if size == 8 * how.words:
        return split.reshape(shape)
    whole = split.reshape(*before, how.blocks, 8 * how.words, *after)
    return jax.lax.slice_in_dim(whole, 0, size, axis=how.axis + 1).reshape(shape)


def unpacked(masks: Params, params: Params) -> Any:
    """A tree of bool masks, from a tree of packed ones or not.

    Args:
        masks: as in a state; a scalar for a parameter that is not pruned.
        params: the parameters, arrays or ShapeDtypeStructs.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in trees.paths(params).items()}
    return trees.map_with_path(lambda path, mask: unpack(mask, shapes[path]), masks)
