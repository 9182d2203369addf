"""What a weight, or an element of a group, is worth. The lowest scores go first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from bmjax import trees
from bmjax.trace import keep
from bmjax.types import Group, Params


class Seen(NamedTuple):
    """What a criterion may look at.

    Attributes:
        params: the weights that the gradients were taken at, zero where already dropped.
        updates: what came in: the raw gradients under `around`, the chain's updates under `sparsify`.
    """

    params: Params
    updates: Params


Weights: TypeAlias = Callable[[Seen], Any]  # a score for each weight: a tree like the parameters


class Criterion(NamedTuple):
    """How scores are made; both functions are pure and are traced inside the step.

    Attributes:
        weights: Seen -> tree like the parameters, a score for each weight.
        elements: (groups, Seen) -> {group name: float32 [size] or [stack, size]}, a score for each element.
    """

    weights: Weights
    elements: Callable[[Sequence[Group], Seen], dict[str, jax.Array]]


def per_weight(weights: Weights) -> Criterion:
    """A criterion from scores of weights: an element is worth the sum of squares of its weights' scores.

    Args:
        weights: Seen -> a tree like its params, one score for each weight. Arrays of scanned layers have the layer as their first
            axis, biases and norms too.

    Raises:
        ValueError: when the optimiser is initialised: scores of another shape than the parameters.
    """

    def checked(seen: Seen) -> Any:
        scores = weights(seen)
        if difference := trees.first_difference(_shapes(seen.params), _shapes(scores)):
            raise ValueError(f"the criterion's scores do not fit the parameters: {difference}; give one score for each weight")
        return scores

    def elements(groups: Sequence[Group], seen: Seen) -> dict[str, jax.Array]:
        squares = jax.tree.map(lambda score: jnp.square(score.astype(jnp.float32)), checked(seen))
        return {group.name: keep.pool(group, squares) for group in groups}

    return Criterion(checked, elements)


def magnitude() -> Criterion:
    """The absolute value of a weight; for elements the squared L2 norm. Han et al. 2015, arXiv 1506.02626."""
    return per_weight(lambda seen: jax.tree.map(jnp.abs, seen.params))


def given(scores: Any, otherwise: Criterion | None = None) -> Criterion:
    """Fixed scores, such as those of an analysis that was made before.

    Args:
        scores: a tree like the parameters, or {group name: [size] or [stack, size]} for the groups pattern.
        otherwise: the criterion of the groups that `scores` does not name; without one every group must be named.

    Raises:
        ValueError: when the optimiser is initialised: scores that do not fit the parameters or the groups.
    """

    def weights(seen: Seen) -> Any:
        difference = trees.first_difference(*(_shapes(tree) for tree in (seen.params, scores)))
        if difference:
            raise ValueError(f"the given scores do not fit the parameters: {difference}")
        return scores

    def elements(groups: Sequence[Group], seen: Seen) -> dict[str, jax.Array]:
        if set(trees.paths(scores)) == set(trees.paths(seen.params)):
            return per_weight(weights).elements(groups, seen)
        unknown = sorted(set(scores) - {group.name for group in groups})
        if unknown:
            raise ValueError(f"scores are given for {unknown[0]!r}; the groups are {', '.join(g.name for g in groups)}")
        rest = [group for group in groups if group.name not in scores]
        if rest and otherwise is None:
            raise ValueError(f"no scores are given for the group {rest[0].name!r}; give some, or a criterion as `otherwise`")
        found = otherwise.elements(rest, seen) if rest and otherwise is not None else {}
        for group in groups:
            if group.name in scores:
                found[group.name] = _fitting(group, scores[group.name])
        return found

    return Criterion(weights, elements)


def _fitting(group: Group, scores: Any) -> jax.Array:
    expected = keep.shape(group)
    if np.shape(scores) != expected:
        raise ValueError(
            f"the scores given for group {group.name!r} have shape {list(np.shape(scores))}, expected {list(expected)}"
        )
    return jnp.asarray(scores, jnp.float32)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.float32), tree)
