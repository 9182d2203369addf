"""Where a factor on an element of a group goes, so that what the element contributes is scaled once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from bmjax import trace, trees
from bmjax.types import Group, Member, Params

Carriers: TypeAlias = Mapping[str, Sequence[Member]]  # {group name: the members that its factors are multiplied into}

_TOLERANCE = 1e-4  # both sides add the same numbers and zeros; what is wrong differs by far more


def carriers(
    fn: Callable[..., Any], params: Params, batch: Any, groups: Sequence[Group], where: Mapping[str, str] | None = None
) -> dict[str, tuple[Member, ...]]:
    """The members of each group whose weights a factor on an element is to be multiplied into.

    A factor in all members would act several times over: once in each kernel on the element's way. The carriers are the kernels
    that contract the group's axis, which read the element: a neuron's row of the next kernel, a head's rows of the output
    projection, a channel's slice of the next convolution. What they give is linear in them, so the factor scales the element's
    contribution exactly, biases and activations before it included, and statistics of a batch norm before it do not move. That
    a factor of 0 leaves the masked model is proved here for each group: both are run on random parameters.

    Args:
        fn: `(params, batch) -> pytree of arrays`, as for `trace.groups`.
        params: tree of arrays or ShapeDtypeStructs.
        batch: any pytree of arrays.
        groups: from `trace.groups`.
        where: {group name: regex over the members, each as "path:axis"} for groups that no kernel contracts. Whole layers of a
            residual stack are carried by what they end with, kernels and biases: `{"layers": "(out|down)/"}`.

    Raises:
        ValueError: `where` names no group, a group has no carriers, or those at 0 do not give the masked model.
    """
    where = where or {}
    if unknown := sorted(set(where) - {group.name for group in groups}):
        raise ValueError(f"no group is called {unknown[0]!r}; there are {', '.join(group.name for group in groups) or 'none'}")
    contracted = _contracted(fn, params, batch)
    found = {}
    for group in groups:
        regex = where.get(group.name)
        if regex is None:
            chosen = tuple(member for member in group.members if member.axis in contracted.get(member.path, ()))
        else:
            chosen = tuple(member for member in group.members if re.search(regex, f"{member.path}:{member.axis}"))
        if not chosen:
            there = ", ".join(f"{member.path}:{member.axis}" for member in group.members)
            how = f"where={{{group.name!r}: ...}} must match some" if regex is None else f"{regex!r} matches none"
            raise ValueError(f"nothing carries a factor of the group {group.name!r}: {how} of its members {there}")
        found[group.name] = chosen
    _prove(fn, params, batch, groups, found)
    return found


def scaled(params: Params, groups: Sequence[Group], carriers: Carriers, factors: Mapping[str, jax.Array]) -> Params:
    """The parameters with each element's factor multiplied into its carriers.

    Args:
        params: tree of arrays.
        groups: those that `factors` speaks of.
        carriers: of every group.
        factors: {group name: [size], or [stack, size] for a stacked group}.

    Raises:
        ValueError: a carrier is not in `params`.
    """
    found = trees.paths(params)
    changed: dict[str, jax.Array] = {}
    for group in groups:
        for member in carriers[group.name]:
            if member.path not in found:
                raise ValueError(f"the gates of {group.name!r} are carried by {member.path!r}, which is no parameter")
            leaf = changed.get(member.path, found[member.path])
            changed[member.path] = leaf * _line(group, member, factors[group.name], leaf.shape).astype(leaf.dtype)
    return trees.replace(params, changed)


def _line(group: Group, member: Member, factors: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The factors spread along the member's axis, to broadcast against its parameter; 1 where no element owns a position."""
    owners = np.full(shape[member.axis], group.size, np.int32)
    owners[np.asarray(member.index)] = np.arange(group.size)[:, None]
    padded = jnp.concatenate([factors, jnp.ones((*factors.shape[:-1], 1), factors.dtype)], axis=-1)
    spread = [1] * len(shape)
    spread[member.axis] = shape[member.axis]
    if group.stack:
        spread[0] = group.stack
    return padded[..., owners].reshape(spread)


def _contracted(fn: Callable[..., Any], params: Params, batch: Any) -> dict[str, set[int]]:
    """{path of a linear layer's kernel: the axes of the whole parameter that its product contracts}."""
    shapes = {path: leaf.shape for path, leaf in trees.paths(params).items()}
    found: dict[str, set[int]] = {}
    for layer in trace.linears(fn, params, batch).layers:
        if layer.path in found:  # another step of the scan, which looks the same
            continue
        shape = shapes[layer.path]
        positions = jnp.arange(np.prod(shape, dtype=np.int64), dtype=jnp.int32).reshape(shape)
        column = np.unravel_index(np.asarray(layer.get(positions)[:, 0]), shape)
        found[layer.path] = {axis for axis, at in enumerate(column) if np.any(at != at[0])}
    return found


def _prove(fn: Callable[..., Any], params: Params, batch: Any, groups: Sequence[Group], found: Carriers) -> None:
    """Raises ValueError unless a group with factors of 0 on every other element computes what the masked one does."""
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
        scale = float(np.prod(leaf.shape[:-1], dtype=np.float64)) ** -0.5 if leaf.ndim > 1 else 0.5
        return (rng.normal(size=leaf.shape) * scale).astype(leaf.dtype)

    @jax.jit
    def both(drawn: Params, keeps: dict[str, jax.Array]) -> tuple[Any, Any]:
        mask = trace.masks(groups, keeps, drawn)
        masked = jax.tree.map(lambda leaf, stays: jnp.where(stays, leaf, jnp.zeros((), leaf.dtype)), drawn, mask)
        factors = {name: keep.astype(jnp.float32) for name, keep in keeps.items()}
        return fn(masked, batch), fn(scaled(drawn, groups, found, factors), batch)

    drawn = jax.tree.map(draw, params)
    whole = {group.name: np.ones((group.stack, group.size) if group.stack else group.size, bool) for group in groups}
    for group in groups:
        half = whole[group.name] & (np.arange(group.size) % 2 == 0)
        pairs = zip(*map(jax.tree.leaves, both(drawn, {**whole, group.name: half})))
        wide = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
        largest = max(np.abs(a).max() for a, _ in wide)
        difference = max(np.abs(a - b).max() for a, b in wide) / max(largest, np.finfo(np.float32).tiny)
        if not difference <= _TOLERANCE:
            carried = ", ".join(f"{member.path}:{member.axis}" for member in found[group.name])
            raise ValueError(
                f"gates of the group {group.name!r} at 0, carried by {carried}, do not give the masked model: outputs differ by "
                f"{difference:.1g}; name its carriers with where=, or leave the group out{group.note and f' ({group.note})'}"
            )
