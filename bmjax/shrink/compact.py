"""Cuts the dropped elements of groups out of the parameters, and out of the state that belongs to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax import trees
from bmjax.trace import counts
from bmjax.types import Group, Member, Params


def sizes(groups: Sequence[Group], keeps: Mapping[str, Any]) -> dict[str, int]:
    """{group name: how many elements are kept}, as `Model.resize` takes it; groups without a keep are left out.

    Args:
        groups: the groups that `keeps` speaks of, and maybe more.
        keeps: {group name: bool [size] or [stack, size]}, concrete.

    Raises:
        ValueError: a keep fits no group, leaves nothing, or leaves different numbers in the layers of a stacked group.
    """
    return counts(groups, keeps)


def compact(params: Params, groups: Sequence[Group], keeps: Mapping[str, Any]) -> Params:
    """The parameters without the dropped elements: smaller arrays, the kept weights unchanged and in order.

    Args:
        params: tree of arrays.
        groups: the groups that `keeps` speaks of, and maybe more. Several may cut one array.
        keeps: {group name: bool [size] or [stack, size]}, concrete. Where a group of the layers themselves drops some, only the
            other layers' rows of a stacked keep are used.

    Raises:
        ValueError: as `sizes`; or a member is not in `params`.
    """
    return _compact(params, groups, keeps, lambda group: group.members, "parameter")


def compact_state(state: Params, groups: Sequence[Group], keeps: Mapping[str, Any]) -> Params:
    """The model's state without what belongs to dropped elements: the batch statistics of the channels that stay.

    Args:
        state: tree of arrays; {} for a model without.
        groups, keeps: as for `compact`, of a model that was traced with its state.

    Raises:
        ValueError: as `sizes`; or a member is not in `state`.
    """
    return _compact(state, groups, keeps, lambda group: group.state, "part of the state")


def _compact(
    tree: Any, groups: Sequence[Group], keeps: Mapping[str, Any], members: Callable[[Group], tuple[Member, ...]], kind: str
) -> Any:
    """The tree without the positions that the dropped elements' members have in it."""
    counts(groups, keeps)
    leaves = trees.paths(tree)
    cuts: dict[str, dict[int, np.ndarray]] = {}
    for group in groups:
        if group.name not in keeps:
            continue
        keep = np.asarray(keeps[group.name], bool)
        for path, axis, index in members(group):
            if path not in leaves:
                raise ValueError(f"group {group.name!r} has the member {path!r}, which is no {kind}")
            kept = _positions_kept(keep, index, leaves[path].shape[axis])
            axes = cuts.setdefault(path, {})
            axes[axis] = axes[axis] & kept if axis in axes else kept
    return trees.replace(tree, {path: _cut(leaves[path], axes) for path, axes in cuts.items()})


def _positions_kept(keep: np.ndarray, index: np.ndarray, length: int) -> np.ndarray:
    """Bool [length] or [stack, length] from a keep [size] or [stack, size] and a member's index [size, block]."""
    if keep.ndim > 1:
        return np.stack([_positions_kept(row, index, length) for row in keep])
    kept = np.ones(length, bool)
    kept[index[~keep]] = False
    return kept


def _cut(leaf: Any, axes: Mapping[int, np.ndarray]) -> jax.Array:
    """The array with only the kept positions [length], or [stack, length] where axis 0 chooses, of some axes."""
    array = jnp.asarray(leaf)
    layers = axes.get(0, np.ones(array.shape[0], bool))
    for axis, kept in axes.items():
        if kept.ndim == 1:
            array = jnp.take(array, np.flatnonzero(kept), axis=axis)
    for axis, kept in axes.items():
        if kept.ndim > 1:
            index = np.stack([np.flatnonzero(row) for row in kept[layers]])
            index = np.expand_dims(index, [i for i in range(1, array.ndim) if i != axis])
            array = jnp.take_along_axis(array, index, axis=axis)
    return array


def verify(
    masked_apply: Callable[..., Any],
    masked_params: Params,
    small_apply: Callable[..., Any],
    small_params: Params,
    *args: Any,
    tolerance: float = 1e-5,
) -> float:
    """The largest difference between the masked and the compact function's outputs, relative to max(1, largest output).

    Args:
        masked_apply: `(masked_params, *args) -> pytree of arrays`, the full-size function.
        masked_params: its parameters, zero where dropped.
        small_apply: `(small_params, *args)`, the compact function, with outputs of the same shapes.
        small_params: its parameters.
        args: for both.
        tolerance: what is still equal.

    Raises:
        ValueError: the outputs have different shapes, are not finite, or differ by more than the tolerance.
    """
    expected, found = masked_apply(masked_params, *args), small_apply(small_params, *args)
    problem = trees.first_difference(expected, found)
    if problem:
        raise ValueError(f"the compact function's output does not look like the masked one's: {problem}")
    pairs = [
        (np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found))
    ]
    largest = max(float(np.max(np.abs(x), initial=0.0)) for x, _ in pairs)
    difference = max(float(np.max(np.abs(x - y), initial=0.0)) for x, y in pairs) / max(1.0, largest)
    if not difference <= tolerance:
        raise ValueError(
            f"the compact model is not the masked one: outputs differ by {difference:.2g} where {tolerance:.2g} is allowed; "
            "only groups without a note may be removed"
        )
    return difference
