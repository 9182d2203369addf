"""Masks at one bit a weight: uint8 words of eight neighbours along one axis, on the device that holds those weights.

Packed along an axis, a mask of [in, out] is [in / 8, out]: the other axes are partitioned as before, and so is this one where a
device's part of it is a multiple of 8.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bmjax import trees
from bmjax.types import Params


def axis(shape: tuple[int, ...]) -> int:
    """The axis to pack: the one whose size has the most factors of two, so that a partition of it is likely to divide by 8.

    Of equal ones the first that is not the last: neighbours along the last axis are far from each other in no kernel's reduction.
    """
    twos = [size & -size for size in shape]
    return max(range(len(shape)), key=lambda i: (min(shape[i], 8) >= 8, twos[i], -i))


def pack(mask: jax.Array) -> jax.Array:
    """uint8 with ceil(n / 8) entries along the packed axis; a scalar stays as it is.

    Args:
        mask: bool.
    """
    if mask.ndim == 0:
        return mask
    at = axis(mask.shape)
    size = mask.shape[at]
    if size % 8:
        mask = jnp.pad(mask, [(0, -size % 8 if i == at else 0) for i in range(mask.ndim)])
    split = mask.reshape(*mask.shape[:at], mask.shape[at] // 8, 8, *mask.shape[at + 1 :]).astype(jnp.uint8)
    weights = (1 << jnp.arange(8, dtype=jnp.uint8)).reshape(8, *(1,) * (mask.ndim - at - 1))
    return jnp.sum(split * weights, axis=at + 1, dtype=jnp.uint8)


def unpack(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The bool mask of `shape` that `pack` packed; a mask that is not packed stays as it is."""
    if packed.dtype == jnp.bool_:
        return packed
    at = axis(shape)
    bits = jnp.arange(8, dtype=jnp.uint8).reshape(8, *(1,) * (len(shape) - at - 1))
    split = (jnp.expand_dims(packed, at + 1) >> bits) & 1
    whole = split.reshape(*shape[:at], packed.shape[at] * 8, *shape[at + 1 :]).astype(bool)
    return jax.lax.slice_in_dim(whole, 0, shape[at], axis=at)


def unpacked(masks: Params, params: Params) -> Any:
    """A tree of bool masks, from a tree of packed ones or not.

    Args:
        masks: as in a state; a scalar for a parameter that is not pruned.
        params: the parameters, arrays or ShapeDtypeStructs.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in trees.paths(params).items()}
    return trees.map_with_path(lambda path, mask: unpack(mask, shapes[path]), masks)
