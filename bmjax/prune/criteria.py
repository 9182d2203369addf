"""What a weight, or an element of a group, is worth. The lowest scores go first.

A new one is one function that returns `per_weight(...)`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from bmjax import trees
from bmjax.prune import kinds
from bmjax.trace import keep
from bmjax.types import Group, Params


class Seen(NamedTuple):
    """What a criterion may look at.

    Attributes:
        params: the weights that the gradients were taken at, zero where already dropped.
        updates: what came in: the raw gradients under `around`, the chain's updates under `sparsify`.
        statistics: what the criterion's `observe` has made of all steps so far, this one included; () if it has none.
    """

    params: Params
    updates: Params
    statistics: Any = ()


Weights: TypeAlias = Callable[[Seen], Any]  # a score for each weight: a tree like the parameters
Pool: TypeAlias = Literal["sum of squares", "sum", "square of sum"]


class Criterion(NamedTuple):
    """How scores are made; all functions are pure and are traced inside the step.

    Attributes:
        weights: Seen -> tree like the parameters, a score for each weight.
        elements: (groups, Seen) -> {group name: float32 [size] or [stack, size]}, a score for each element.
        init: params -> statistics before the first step.
        observe: Seen, with the statistics before -> the statistics after a step. Runs at every step, so it should cost little.
        gradients: True if the updates must be raw gradients, which only `around` has.
        name: for messages.
    """

    weights: Weights
    elements: Callable[[Sequence[Group], Seen], dict[str, jax.Array]]
    init: Callable[[Params], Any] = lambda params: ()
    observe: Callable[[Seen], Any] = lambda seen: seen.statistics
    gradients: bool = False
    name: str = "this criterion"


def per_weight(
    weights: Weights,
    *,
    init: Callable[[Params], Any] | None = None,
    observe: Callable[[Seen], Any] | None = None,
    pool: Pool = "sum of squares",
    gradients: bool = False,
    name: str = "this criterion",
) -> Criterion:
    """A criterion from scores of weights.

    Args:
        weights: Seen -> a tree like its params, one score for each weight. Arrays of scanned layers have the layer as their first
            axis, biases and norms too.
        init, observe, gradients, name: as in `Criterion`. Statistics that are trees like the parameters are partitioned so.
        pool: what an element of a group is worth, from its weights' scores: their sum of squares, for scores that are sizes;
            their sum, for scores that already add up; or the square of their sum, for signed ones.

    Raises:
        ValueError: when the optimiser is initialised: scores of another shape than the parameters.
    """

    def checked(seen: Seen) -> Any:
        scores = weights(seen)
        if difference := trees.first_difference(_shapes(seen.params), _shapes(scores)):
            raise ValueError(f"the criterion's scores do not fit the parameters: {difference}; give one score for each weight")
        return scores

    def elements(groups: Sequence[Group], seen: Seen) -> dict[str, jax.Array]:
        scores = jax.tree.map(lambda score: score.astype(jnp.float32), checked(seen))
        if pool == "sum of squares":
            scores = jax.tree.map(jnp.square, scores)
        pooled = {group.name: keep.pool(group, scores) for group in groups}
        return {name: jnp.square(total) for name, total in pooled.items()} if pool == "square of sum" else pooled

    own = Criterion(checked, elements, gradients=gradients, name=name)
    return own._replace(init=init or own.init, observe=observe or own.observe)


def magnitude() -> Criterion:
    """The absolute value of a weight; for elements the squared L2 norm. Han et al. 2015, arXiv 1506.02626."""
    return per_weight(lambda seen: jax.tree.map(jnp.abs, seen.params), name="magnitude")


def random(seed: int = 0) -> Criterion:
    """A number drawn for each weight, or element, from the seed and its path: the floor that every criterion has to beat.

    It stays the same at every step, so gradual pruning drops more of the same, and on any mesh.

    Raises:
        ValueError: the seed is not in [0, 2^32).
    """
    kinds.whole("the seed of random pruning", seed)
    if not 0 <= seed < 2**32:
        raise ValueError(f"the seed of random pruning is {seed}; expected 0 to 2^32 - 1")

    return Criterion(
        lambda seen: trees.map_with_path(lambda path, leaf: draw(seed, path, leaf.shape), seen.params),
        lambda groups, seen: {group.name: draw(seed, group.name, keep.shape(group)) for group in groups},
        name="random",
    )


def draw(seed: int, name: str, shape: tuple[int, ...], step: Any = 0) -> jax.Array:
    """Uniform float32 numbers that go by the seed, a name and a step: the same on any mesh."""
    key = jax.random.fold_in(jax.random.key(np.uint32(seed)), np.uint32(zlib.crc32(name.encode())))
    return jax.random.uniform(jax.random.fold_in(key, step), shape)


def saliency(decay: float = 0.0) -> Criterion:
    """|w g|: what the loss changes by, to first order, if the weight goes. Lee et al. 2019 (SNIP), arXiv 1810.02340.

    Args:
        decay: of the running mean of |w g| over steps, in [0, 1); 0 looks at the present batch alone and keeps no state.

    Raises:
        ValueError: decay outside [0, 1).
    """
    product = lambda w, g: jnp.abs(w.astype(jnp.float32) * g)
    if decay == 0:
        present = lambda seen: jax.tree.map(product, seen.params, seen.updates)
        return per_weight(present, pool="sum", gradients=True, name="saliency")
    observe = _running(decay, product)
    return per_weight(lambda seen: seen.statistics, init=_zeros, observe=observe, pool="sum", gradients=True, name="saliency")


def movement(decay: float = 1.0) -> Criterion:
    """-sum of w g over the steps: high where training moves a weight away from zero. Sanh et al. 2020, arXiv 2005.07683, eq. 4.

    Args:
        decay: what the sum is multiplied by at every step, in (0, 1]; 1 is the paper's.

    Raises:
        ValueError: decay outside (0, 1].
    """
    kinds.number("the decay of movement", decay)
    if not 0 < decay <= 1:
        raise ValueError(f"the decay of movement is {decay}; expected a number above 0, at most 1")
    observe = lambda seen: jax.tree.map(
        lambda total, w, g: decay * total - w.astype(jnp.float32) * g, seen.statistics, seen.params, seen.updates
    )
    return per_weight(lambda seen: seen.statistics, init=_zeros, observe=observe, pool="sum", gradients=True, name="movement")


def fisher(decay: float = 0.99) -> Criterion:
    """w^2 F / 2 with F the running mean of g^2, the diagonal of the empirical Fisher matrix of batch gradients.

    LeCun et al. 1990 (Optimal Brain Damage) with the Fisher matrix for the Hessian; Theis et al. 2018, arXiv 1801.05787.

    Args:
        decay: of the running mean, in [0, 1).

    Raises:
        ValueError: decay outside [0, 1).
    """
    observe = _running(decay, lambda w, g: jnp.square(g.astype(jnp.float32)))
    score = lambda seen: jax.tree.map(lambda f, w: 0.5 * f * jnp.square(w.astype(jnp.float32)), seen.statistics, seen.params)
    return per_weight(score, init=_zeros, observe=observe, pool="sum", gradients=True, name="fisher")


def taylor(decay: float = 0.9) -> Criterion:
    """(sum over an element of w E[g])^2: the square of what the loss changes by, to first order, if all of it goes.

    Molchanov et al. 2019, arXiv 1906.10771, eq. 8, with the running mean of gradients for that of squares; for a single weight
    it is (w E[g])^2.

    Args:
        decay: of the running mean of gradients, in [0, 1).

    Raises:
        ValueError: decay outside [0, 1).
    """
    product = lambda g, w: g * w.astype(jnp.float32)
    change = lambda seen: jax.tree.map(product, seen.statistics, seen.params)
    how: dict[str, Any] = {"init": _zeros, "observe": _running(decay, lambda w, g: g.astype(jnp.float32)), "gradients": True}
    weights = per_weight(lambda seen: jax.tree.map(jnp.square, change(seen)), name="taylor", **how)
    return weights._replace(elements=per_weight(change, pool="square of sum").elements)


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

    own = Criterion(weights, elements, name="given")
    if otherwise is None:
        return own
    return own._replace(init=otherwise.init, observe=otherwise.observe, gradients=otherwise.gradients)


def _fitting(group: Group, scores: Any) -> jax.Array:
    expected = keep.shape(group)
    if np.shape(scores) != expected:
        raise ValueError(
            f"the scores given for group {group.name!r} have shape {list(np.shape(scores))}, expected {list(expected)}"
        )
    return jnp.asarray(scores, jnp.float32)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.float32), tree)


def _zeros(params: Params) -> Params:
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)


def _running(decay: float, value: Callable[[Any, Any], jax.Array]) -> Callable[[Seen], Params]:
    """The running mean of value(w, g) over the steps. A mean from 0 is short by one factor everywhere, which ranks do not see."""
    kinds.number("the decay of a running mean", decay)
    if not 0 <= decay < 1:
        raise ValueError(f"the decay of a running mean is {decay}; expected a number in [0, 1)")
    return lambda seen: jax.tree.map(
        lambda mean, w, g: decay * mean + (1 - decay) * value(w, g), seen.statistics, seen.params, seen.updates
    )
