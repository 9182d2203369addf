"""From a choice of elements to the weights that it touches, and back: keep-masks and pooled scores of groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax import trees
from bmjax.types import Group, Member


def shape(group: Group) -> tuple[int, ...]:
    """The shape of a keep, or of scores: (size,), or (stack, size) for a stacked group."""
    return (group.stack, group.size) if group.stack else (group.size,)


def _owners(member: Member, size: int, length: int) -> np.ndarray:
    """[length]: the element that each position of the axis belongs to; `size` where it belongs to none."""
    owners = np.full(length, size, np.int32)
    owners[np.asarray(member.index)] = np.arange(size)[:, None]
    return owners


def _member_mask(group: Group, member: Member, keep: jax.Array, ndim: int, length: int) -> jax.Array:
    """Keep-mask of one member, [length] or [stack, length] spread out to broadcast against the parameter."""
    padded = jnp.concatenate([keep, jnp.ones((*keep.shape[:-1], 1), bool)], axis=-1)
    line = padded[..., _owners(member, group.size, length)]
    shape = [1] * ndim
    shape[member.axis] = length
    if group.stack:
        shape[0] = group.stack
    return line.reshape(shape)


def masks(groups: Sequence[Group], keeps: Mapping[str, Any], params: Any) -> Any:
    """The weights that stay when only some elements of some groups are kept.

    Args:
        groups: the groups that `keeps` speaks of, and maybe more.
        keeps: {group name: bool [size], or [stack, size] for a stacked group}; arrays may be traced. A group that is not
            named is kept whole.
        params: tree of arrays or ShapeDtypeStructs.

    Returns:
        A tree of bool arrays with the shapes of `params`: False where any dropped element of any group owns the weight.

    Raises:
        ValueError: a name in `keeps` is no group's, a keep has another shape than its group, or a member is not in `params`.
    """
    by_name = {group.name: group for group in groups}
    found = {path: jnp.ones(leaf.shape, bool) for path, leaf in trees.paths(params).items()}
    for name, keep in keeps.items():
        if name not in by_name:
            raise ValueError(f"no group is called {name!r}; there are {', '.join(by_name) or 'none'}")
        group = by_name[name]
        if tuple(keep.shape) != shape(group):
            raise ValueError(f"the keep of group {name!r} has shape {list(keep.shape)}, expected {list(shape(group))}")
        for member in group.members:
            if member.path not in found:
                raise ValueError(f"group {name!r} has the member {member.path!r}, which is no parameter")
            mask = found[member.path]
            found[member.path] = mask & _member_mask(group, member, jnp.asarray(keep, bool), mask.ndim, mask.shape[member.axis])
    return trees.replace(params, found)


def pool(group: Group, scores: Any) -> jax.Array:
    """One score for each element: the sum over all weights that belong to it, in float32.

    A weight that belongs to an element by two members (both axes of a square kernel) counts once for each.

    Args:
        group: the group.
        scores: tree like the parameters, one score for each weight.

    Returns:
        [size], or [stack, size] for a stacked group.

    Raises:
        ValueError: a member is not in `scores`.
    """
    by_path = trees.paths(scores)
    total = jnp.zeros(shape(group), jnp.float32)
    for member in group.members:
        if member.path not in by_path:
            raise ValueError(f"group {group.name!r} has the member {member.path!r}, which has no scores")
        leaf = by_path[member.path]
        kept_axes = {member.axis, 0} if group.stack else {member.axis}
        line = jnp.sum(leaf, axis=tuple(i for i in range(leaf.ndim) if i not in kept_axes), dtype=jnp.float32)
        total += line[..., np.asarray(member.index)].sum(axis=-1)
    return total
