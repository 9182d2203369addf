"""Which smaller sizes to try: depth and the sizes within a layer shrink in balance until a parameter count is met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from bmjax import trees


class Proposal(NamedTuple):
    """One candidate.

    Attributes:
        ratio: the reduction of parameters that was asked for.
        sizes: {size name: elements kept}.
        parameters: of the model with these sizes.
    """

    ratio: float
    sizes: dict[str, int]
    parameters: int


def parameters(model: Any, sizes: Mapping[str, int], shape: tuple[int, ...]) -> int:
    """Parameters of the model resized, without creating any."""
    inputs = jax.ShapeDtypeStruct((1, *shape), "float32")
    params, _ = jax.eval_shape(model.resize(sizes).init, jax.random.key(0), {"inputs": inputs})
    return trees.size(params)


def propose(model: Any, whole: Mapping[str, int], ratios: Sequence[float], shape: tuple[int, ...]) -> list[Proposal]:
    """For each ratio the most balanced sizes that have at most 1 / ratio of the parameters.

    For every depth the largest fraction of the other sizes that fits is found by bisection; of these pairs the one is
    taken whose two fractions are closest to each other.

    Args:
        model: the big model.
        whole: {size name: elements now} of what may shrink; "layers" is the depth.
        ratios: reductions of the parameter count, above 1, rising.
        shape: of one example's inputs.

    Returns:
        Proposals in the order of the ratios; a ratio that no sizes reach is left out, and so are repetitions.
    """
    total = parameters(model, {}, shape)
    found: list[Proposal] = []
    for ratio in ratios:
        best = _balanced(model, whole, total / ratio, shape)
        if best is not None and all(best[0] != proposal.sizes for proposal in found):
            found.append(Proposal(ratio, *best))
    return found


def _balanced(model: Any, whole: Mapping[str, int], limit: float, shape: tuple[int, ...]) -> tuple[dict[str, int], int] | None:
    inner = {name: size for name, size in whole.items() if name != "layers"}
    depths = range(1, whole["layers"] + 1) if "layers" in whole else (0,)
    options = []
    for depth in depths:
        layers = {"layers": depth} if depth else {}
        fraction = _largest_fraction(model, inner, layers, limit, shape)
        if fraction is not None:
            sizes = layers | _scaled(inner, fraction)
            imbalance = abs(math.log(depth / whole["layers"]) - math.log(fraction)) if depth else 0.0
            options.append((imbalance, sizes))
    if not options:
        return None
    _, sizes = min(options, key=lambda option: option[0])
    return sizes, parameters(model, sizes, shape)


def _scaled(sizes: Mapping[str, int], fraction: float) -> dict[str, int]:
    return {name: max(1, round(size * fraction)) for name, size in sizes.items()}


def _largest_fraction(
    model: Any, inner: Mapping[str, int], layers: dict[str, int], limit: float, shape: tuple[int, ...]
) -> float | None:
    """The largest fraction in (0, 1] of the inner sizes with which the parameters stay within the limit."""
    fits = lambda fraction: parameters(model, layers | _scaled(inner, fraction), shape) <= limit
    steps = max(inner.values(), default=1)
    low, high = 0, steps
    if fits(1.0):
        return 1.0
    if not fits(1 / steps):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle / steps) else (low, middle)
    return max(low, 1) / steps
