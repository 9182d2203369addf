"""What is dropped together: single weights, or the elements of groups."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from bmjax import trees
from bmjax.prune.criteria import Criterion, Seen
from bmjax.trace import keep
from bmjax.types import Group, Params

Sparsity: TypeAlias = float | Mapping[str, float]


class Pattern(NamedTuple):
    """How the choices that an allocation makes become masks. A choice is {name: bool array}: paths, or names of groups.

    Attributes:
        targets: (params, sparsity, where) -> {name: target sparsity} of all that takes part.
        whole: (params, names) -> the choice that keeps everything.
        scores: (criterion, seen, names) -> {name: scores}, shaped like the choice.
        masks: (choice, params) -> tree of bool like params, a scalar True for a parameter that takes no part.
        groups: the groups; empty if single weights are chosen.
    """

    targets: Callable[[Params, Sparsity, str | None], dict[str, float]]
    whole: Callable[[Params, Sequence[str]], dict[str, jax.Array]]
    scores: Callable[[Criterion, Seen, Sequence[str]], dict[str, jax.Array]]
    masks: Callable[[dict[str, jax.Array], Params], Params]
    groups: tuple[Group, ...]


def left_out(path: str, ndim: int) -> str:
    """Why the default rule leaves a parameter out; "" if it does not.

    The rule: a leaf with two axes or more that is called `kernel`, in no part of the path that names an embedding
    ("embed..."), a norm ("...norm...") or the head ("head", "..._head").
    """
    if ndim < 2:
        return "one axis"
    for part in path.lower().split("/"):
        for reason, regex in (("embedding", "embed"), ("norm", "norm"), ("head", "^(.*_)?head$")):
            if re.search(regex, part):
                return reason
    return "" if path.split("/")[-1] == "kernel" else "not called kernel"


def _chosen(params: Params, where: str | None) -> list[str]:
    """Paths of the weights to prune: those that `where` finds, or those of the default rule."""
    leaves = {path: leaf.ndim for path, leaf in trees.paths(params).items()}
    if where is not None:
        return [path for path, hit in trees.paths(trees.select(params, where)).items() if hit]
    if any(path.split("/")[-1] == "kernel" for path in leaves):
        found = [path for path, ndim in leaves.items() if not left_out(path, ndim)]
    else:  # a tree that does not use Flax's names
        found = [path for path, ndim in leaves.items() if ndim >= 2]
    if not found:
        raise ValueError(f"nothing to prune among {', '.join(leaves) or 'no parameters'}; name the weights with `where`")
    return found


def unstructured() -> Pattern:
    """Single weights, anywhere."""

    def targets(params: Params, sparsity: Sparsity, where: str | None) -> dict[str, float]:
        chosen = _chosen(params, where)
        if not isinstance(sparsity, Mapping):
            return dict.fromkeys(chosen, sparsity)
        for pattern in sparsity:
            if not any(re.search(pattern, path) for path in chosen):
                raise ValueError(f"the sparsity of {pattern!r} matches none of the weights to prune: {', '.join(chosen)}")
        first = {path: next((s for pattern, s in sparsity.items() if re.search(pattern, path)), None) for path in chosen}
        return {path: s for path, s in first.items() if s is not None}

    def whole(params: Params, names: Sequence[str]) -> dict[str, jax.Array]:
        leaves = trees.paths(params)
        return {name: jnp.ones(leaves[name].shape, bool) for name in names}

    def scores(criterion: Criterion, seen: Seen, names: Sequence[str]) -> dict[str, jax.Array]:
        found = trees.paths(criterion.weights(seen))
        return {name: found[name] for name in names}

    def masks(choice: dict[str, jax.Array], params: Params) -> Params:
        return trees.map_with_path(lambda path, _: choice.get(path, jnp.ones((), bool)), params)

    return Pattern(targets, whole, scores, masks, ())


def groups(groups: Sequence[Group]) -> Pattern:
    """Elements of groups (heads, neurons, layers): every weight of an element goes, wherever it is.

    Args:
        groups: from `bmjax.trace`. A stacked group chooses for each layer, the same number in each.

    Raises:
        ValueError: there is no group, or two have the same name.
    """
    by_name = {group.name: group for group in groups}
    if not by_name or len(by_name) != len(groups):
        raise ValueError(f"the groups pattern is given {[group.name for group in groups]}; expected groups of different names")

    def targets(params: Params, sparsity: Sparsity, where: str | None) -> dict[str, float]:
        keep.masks(list(by_name.values()), {}, params)
        return dict(sparsity) if isinstance(sparsity, Mapping) else dict.fromkeys(by_name, sparsity)

    def whole(params: Params, names: Sequence[str]) -> dict[str, jax.Array]:
        return {name: jnp.ones(keep.shape(by_name[name]), bool) for name in names}

    def scores(criterion: Criterion, seen: Seen, names: Sequence[str]) -> dict[str, jax.Array]:
        return criterion.elements([by_name[name] for name in names], seen)

    def masks(choice: dict[str, jax.Array], params: Params) -> Params:
        touched = {member.path for name in choice for member in by_name[name].members}
        full = keep.masks(list(by_name.values()), choice, params)
        return trees.map_with_path(lambda path, mask: mask if path in touched else jnp.ones((), bool), full)

    return Pattern(targets, whole, scores, masks, tuple(by_name.values()))


def masked(params: Params, masks: Params) -> Any:
    """The parameters with zeros where the masks are False."""
    return jax.tree.map(lambda p, mask: jnp.where(mask, p, jnp.zeros((), p.dtype)), params, masks)
