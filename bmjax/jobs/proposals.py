"""Which smaller sizes to try: what is least sensitive gives most, until a parameter count is met."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from bmjax import trees
from bmjax.prune.curves import Curve, halved

Sizes: TypeAlias = dict[str, int]


class Proposal(NamedTuple):
    """One candidate.

    Attributes:
        ratio: the reduction of parameters that was asked for.
        sizes: {size name: elements kept}.
        parameters: of the model with these sizes.
    """

    ratio: float
    sizes: Sizes
    parameters: int


def parameters(model: Any, sizes: Mapping[str, int], shape: tuple[int, ...]) -> int:
    """Parameters of the model resized, without creating any."""
    inputs = jax.ShapeDtypeStruct((1, *shape), "float32")
    params, _ = jax.eval_shape(model.resize(sizes).init, jax.random.key(0), {"inputs": inputs})
    return trees.size(params)


def propose(
    model: Any, whole: Mapping[str, int], ratios: Sequence[float], shape: tuple[int, ...], curves: Mapping[str, Curve]
) -> list[Proposal]:
    """For each ratio the sizes of at most 1 / ratio of the parameters whose worst expected drop is the least.

    A size is expected to lose what its group's curve says. Every group shrinks as far as some drop allows, the same for all, and
    that drop is the smallest with which the parameters fit. Groups have few elements or flat curves, so some parameters may be
    left over then: they go to the groups that are expected to lose most.

    Args:
        model: the big model.
        whole: {size name: elements now} of what may shrink.
        ratios: reductions of the parameter count, above 1, rising.
        shape: of one example's inputs.
        curves: {size name: the drop of quality by sparsity}, down to one element.

    Returns:
        Proposals in the order of the ratios; a ratio that no sizes reach is left out, and so are repetitions.
    """

    @functools.cache
    def count(*sizes: int) -> int:
        return parameters(model, dict(zip(whole, sizes)), shape)

    found: list[Proposal] = []
    for ratio in ratios:
        limit = count(*whole.values()) / ratio
        sizes = _least_harmful(whole, curves, lambda sizes: count(*sizes.values()) <= limit)  # noqa: B023  # called now
        if sizes is not None and all(sizes != proposal.sizes for proposal in found):
            found.append(Proposal(ratio, sizes, count(*sizes.values())))
    return found


def _least_harmful(whole: Mapping[str, int], curves: Mapping[str, Curve], fits: Callable[[Sizes], bool]) -> Sizes | None:
    """The sizes that fit at the least worst expected drop; None if not even one element of each fits."""
    at = lambda drop: {name: size * (1 - curves[name].reach(drop)) for name, size in whole.items()}
    low, high = -1.0, max(curves[name].drops[-1] for name in whole)
    if not fits(_whole(at(high))):
        return None
    if fits(_whole(at(0.0))):
        high = 0.0
    low, high = halved(low, high, lambda drop: fits(_whole(at(drop))))
    # Where curves are flat, one drop allows many sizes: all groups go the same fraction of the way.
    before, after = at(low), at(high)
    between = lambda way: _whole({name: before[name] + way * (after[name] - before[name]) for name in whole})
    _, way = halved(0.0, 1.0, lambda way: fits(between(way)))
    return _grown(between(way), whole, curves, fits)


def _whole(sizes: Mapping[str, float]) -> Sizes:
    """Rounded up, so that no more is lost than was allowed."""
    return {name: max(1, math.ceil(size - 1e-6)) for name, size in sizes.items()}


def _grown(sizes: Sizes, whole: Mapping[str, int], curves: Mapping[str, Curve], fits: Callable[[Sizes], bool]) -> Sizes:
    """The sizes as large as fits, first those of the groups that are expected to lose most."""
    lost = {name: curves[name].drop(1 - size / whole[name]) for name, size in sizes.items()}
    for name in sorted(sizes, key=lambda name: -lost[name]):
        low, high = sizes[name], whole[name] + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(sizes | {name: middle}) else (low, middle)
        sizes = sizes | {name: low}
    return sizes
