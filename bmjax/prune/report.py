"""What an optimiser's state says of its pruning: masks, what stays of groups, a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bmjax import trees
from bmjax.prune import packing
from bmjax.prune.masking import SparsifyState, blank
from bmjax.prune.patterns import chosen, left_out
from bmjax.types import Params


def prunes(opt_state: Any) -> bool:
    """Whether an optimiser's state, real or abstract, holds masks."""
    return bool(_found(opt_state))


def _found(opt_state: Any) -> list[SparsifyState]:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, SparsifyState))
    return [leaf for leaf in leaves if isinstance(leaf, SparsifyState)]


def _states(opt_state: Any) -> list[SparsifyState]:
    found = _found(opt_state)
    if not found:
        raise ValueError("the optimiser's state holds no masks; build the optimiser with sparsify(...) or around(...)")
    return found


def masks(opt_state: Any, params: Params | None = None) -> Params:
    """The masks in an optimiser's state, however deep it is nested.

    Args:
        opt_state: of any optimiser with pruning in it.
        params: the parameters, arrays or ShapeDtypeStructs; needed where masks are packed.

    Returns:
        A tree like the parameters: bool arrays where weights are pruned, a scalar True elsewhere. If the state holds several
        (`optax.partition`, two `sparsify`), a weight stays where all of them keep it.

    Raises:
        ValueError: the state holds none, or packed ones and no parameters are given.
    """

    def plain(state: SparsifyState) -> Params:
        if params is not None:
            return packing.unpacked(state.masks, params)
        if any(leaf.dtype != jnp.bool_ for leaf in jax.tree.leaves(state.masks)):
            raise ValueError("the masks are packed, eight weights to a word; give the parameters too: masks(opt_state, params)")
        return state.masks

    def absent(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def both(a: Any, b: Any) -> Any:
        return b if absent(a) else a if absent(b) else a & b

    first, *others = [plain(state) for state in _states(opt_state)]
    for other in others:
        first = jax.tree.map(both, first, other, is_leaf=absent)
    return jax.tree.map(lambda mask: jnp.asarray(True) if absent(mask) else mask, first, is_leaf=absent)


def saved(leaves: Mapping[str, Any], params: Params) -> SparsifyState:
    """The pruning's state, as far as its masks, of a training state that was saved as {path: array}.

    Args:
        leaves: such as `train.checkpoint.read` gives.
        params: the parameters.

    Raises:
        ValueError: there are no masks for all parameters among the leaves, or several of them.
    """
    names, ending = list(trees.paths(params)), f"/masks/{next(iter(trees.paths(params)))}"
    starts = [path.removesuffix(ending) for path in leaves if path.endswith(ending)]
    starts = [start for start in starts if all(f"{start}/masks/{name}" in leaves for name in names)]
    if len(starts) != 1:
        raise ValueError(f"the saved state holds the masks of {len(starts)} prunings; expected those of one")
    return blank(trees.map_with_path(lambda path, _: leaves[f"{starts[0]}/masks/{path}"], params))


def keeps(opt_state: Any) -> dict[str, jax.Array]:
    """The elements that stay, {group name: bool [size] or [stack, size]}, from an optimiser's state however deep.

    Raises:
        ValueError: the state holds none, because single weights are pruned or nothing is.
    """
    found: dict[str, jax.Array] = {}
    for state in _states(opt_state):
        for name, keep in state.keeps.items():
            found[name] = found[name] & keep if name in found else keep
    if not found:
        raise ValueError("the optimiser's state holds masks of single weights and no groups; use pattern=groups(...)")
    return found


class Row(NamedTuple):
    """One parameter, or all of them, in a sparsity report.

    Attributes:
        path: of the parameter.
        size: number of weights.
        zeros: how many are zero, pruned or not.
        sparsity: zeros / size.
        note: "pruned", or why it is left out.
        alive: how many the mask drops and that are not zero: none, but for `straight_through`, before the first update, or where
            `sparsify` is not the last of its chain.
    """

    path: str
    size: int
    zeros: int
    sparsity: float
    note: str
    alive: int = 0


class Report(NamedTuple):
    """What `sparsity_report` returns.

    Attributes:
        rows: one for each parameter, in the tree's order.
        total: all parameters together.
        nans: NaN scores that masks were made from so far; other than 0 it means that training has diverged.
    """

    rows: tuple[Row, ...]
    total: Row
    nans: int


def sparsity_report(params: Params, opt_state: Any) -> Report:
    """How much of each parameter is zero, and which are pruned at all. A mask alone makes nothing smaller or faster.

    Raises:
        ValueError: the state holds no masks.
    """
    found = trees.paths(masks(opt_state, params))
    rows = []
    for path, leaf in trees.paths(params).items():
        pruned = path in found and found[path].ndim > 0
        alive = int(jnp.count_nonzero(jnp.where(found[path], 0, leaf))) if pruned else 0
        rows.append(_row(path, leaf, pruned)._replace(alive=alive))
    size, zeros = sum(row.size for row in rows), sum(row.zeros for row in rows)
    total = Row("total", size, zeros, zeros / max(size, 1), "", sum(row.alive for row in rows))
    return Report(tuple(rows), total, int(nan_scores(opt_state)))


def nan_scores(opt_state: Any) -> jax.Array:
    """How many NaN scores masks were made from so far, int32 scalar; it may be traced. Raises ValueError without masks."""
    return sum((state.nans for state in _states(opt_state)), start=jnp.int32(0))


def overview(params: Params, where: str | None = None) -> tuple[Row, ...]:
    """How much of each parameter is zero, and why it was left dense where it was, without an optimiser's state.

    Args:
        params: trained and pruned.
        where: the regex that chose what to prune; None is the default rule.

    Raises:
        ValueError: nothing is chosen.
    """
    pruned = set(chosen(params, where))
    return tuple(_row(path, leaf, path in pruned) for path, leaf in trees.paths(params).items())


def _row(path: str, leaf: Any, pruned: bool) -> Row:
    zeros = leaf.size - int(jnp.count_nonzero(leaf))
    note = "pruned" if pruned else left_out(path, leaf.ndim) or "not selected"
    return Row(path, leaf.size, zeros, zeros / max(leaf.size, 1), note)
