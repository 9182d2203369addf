"""Proof by replay that removing a group's elements equals masking them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.trace.groups import Traced, trace
from bmjax.trace.keep import masks
from bmjax.types import Group, Params


def groups(
    fn: Callable[..., Any],
    params: Params,
    *args: Any,
    names: Mapping[str, tuple[str, int]] | None = None,
    state: Params | None = None,
    check: bool = True,
) -> tuple[Group, ...]:
    """The groups of axes of `fn(params, *args)` that can shrink together; those with an empty `note` are exact.

    Args:
        fn, params, args, names, state: as for `trace`.
        check: replay the function with half the elements removed, on random parameters and inputs, and note where the outputs
            differ from those with the same elements masked. A function that computes in bfloat16 is checked to a tenth only: let
            it compute in float32 here.

    Raises:
        ValueError: as `trace`.
    """
    traced = trace(fn, params, *args, names=names, state=state)
    found = inexact(traced, params, *args, state=state) if check else {}
    return tuple(
        group._replace(note=f"masking is not removing here: outputs differ by {found[group.name]}")
        if group.name in found
        else group
        for group in traced.groups
    )


def inexact(traced: Traced, params: Params, *args: Any, state: Params | None = None) -> dict[str, str]:
    """{group name: by how much it differs} for groups without a note that a replay on random numbers disproves.

    Half the elements of all groups are removed together; only where the outputs differ are the groups halved and tried again.

    Args:
        traced: of the function.
        params: tree of arrays or ShapeDtypeStructs; only shapes and dtypes are used where they are floats.
        args, state: as traced, likewise.
    """
    check = _Check(traced, _random(params, 0, _weight_scale), _random(args, 1, lambda shape: 1.0), _random_state(state))
    tolerance = _tolerance(traced)
    found: dict[str, str] = {}

    def search(groups: Sequence[Group]) -> None:
        difference = check.difference(groups) if groups else 0.0
        if difference > tolerance and len(groups) == 1:
            found[groups[0].name] = f"{difference:.1g}"
        elif difference > tolerance:
            search(groups[: len(groups) // 2])
            search(groups[len(groups) // 2 :])

    search([group for group in traced.groups if not group.note])
    return found


def _tolerance(traced: Traced) -> float:
    """What rounding may change, relative to the largest output: half the digits of the coarsest floats on the way."""
    floats = [dtype for dtype in traced.dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return max((float(jnp.finfo(dtype).eps) for dtype in floats), default=0.0) ** 0.5


class _Check:
    """Compares masked with replayed outputs on given numbers."""

    def __init__(self, traced: Traced, params: Params, args: tuple[Any, ...], state: Params | None):
        self.traced, self.params, self.args, self.state = traced, params, args, state
        self.whole = jax.jit(traced.replay({}))
        self.rng = np.random.default_rng(2)

    def difference(self, groups: Sequence[Group]) -> float:
        """The largest difference relative to the largest output when half the elements of the groups go."""
        keeps = {group.name: self._half(group) for group in groups}
        mask = jax.jit(lambda keeps: masks(groups, keeps, self.params))(keeps)
        masked = jax.tree.map(lambda leaf, keep: np.where(keep, leaf, np.zeros((), leaf.dtype)), self.params, mask)
        small = jax.tree.map(_select, self.params, mask)
        states: list[Any] = [(), ()]
        if self.state is not None:
            stay = masks([group._replace(members=group.state) for group in groups], keeps, self.state)
            states = [(self.state,), (jax.tree.map(_select, self.state, stay),)]
        outputs = (
            jax.tree.leaves(self.whole(masked, *states[0], *self.args)),
            jax.tree.leaves(jax.jit(self.traced.replay(keeps))(small, *states[1], *self.args)),
        )
        expected, found = (np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in leaves]) for leaves in outputs)
        difference = np.abs(expected - found).max() / max(np.abs(expected).max(), np.finfo(np.float32).tiny)
        return float(difference) if np.isfinite(difference) else float("inf")

    def _half(self, group: Group) -> np.ndarray:
        """A random half of the elements, in a stacked group another one for each layer."""
        order = self.rng.permuted(np.tile(np.arange(group.size), (max(group.stack, 1), 1)), axis=1)
        keep = order < group.size - group.size // 2
        return keep if group.stack else keep[0]


def _select(leaf: np.ndarray, keep: jax.Array) -> np.ndarray:
    """The kept weights in order. Every layer keeps as many, so those of the first kept one give the shape."""
    mask = np.asarray(keep)
    if not mask.ndim:
        return leaf
    rows = mask.reshape(len(mask), -1).any(axis=1)
    first = mask[rows.argmax()]
    shape = [first.any(axis=tuple(i for i in range(first.ndim) if i != axis)).sum() for axis in range(first.ndim)]
    return leaf[mask].reshape(rows.sum(), *shape)


def _random(tree: Any, seed: int, scale: Callable[[tuple[int, ...]], float]) -> Any:
    """Random floats; other numbers as they are, or zeros where only a shape is known."""
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return (rng.normal(size=leaf.shape) * scale(leaf.shape)).astype(leaf.dtype)
        return np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf

    return jax.tree.map(draw, tree)


def _random_state(state: Params | None) -> Params | None:
    """Positive floats, as a variance must be."""
    rng = np.random.default_rng(3)

    def draw(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        return np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf

    return jax.tree.map(draw, state)


def _weight_scale(shape: tuple[int, ...]) -> float:
    """About that of trained weights, so that signals neither die nor saturate."""
    return float(np.prod(shape[:-1], dtype=np.float64)) ** -0.5 if len(shape) > 1 else 0.5
