"""The sparsity of each layer from its sensitivity: all layers are expected to lose equally much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from bmjax.prune.allocation import Allocation, Part, Targets, one_sparsity
from bmjax.prune.kinds import number, shown
from bmjax.prune.patterns import Sparsity
from bmjax.prune.sensitivity import Sensitivity


class Curve(NamedTuple):
    """The drop of quality that a sparsity is expected to cost: rising, linear between points, from no drop at nothing dropped.

    Attributes:
        sparsities: float64 [points], rising, from 0.
        drops: float64 [points], not falling, from 0.
    """

    sparsities: np.ndarray
    drops: np.ndarray

    def drop(self, sparsity: float) -> float:
        """What is expected to be lost at a sparsity."""
        return float(np.interp(sparsity, self.sparsities, self.drops))

    def reach(self, drop: float) -> float:
        """The largest sparsity that loses no more; 0 if the drop is below 0."""
        if drop < 0:
            return 0.0
        above = int(np.searchsorted(self.drops, drop, side="right"))
        if above == len(self.drops):
            return float(self.sparsities[-1])
        low, high = self.drops[above - 1], self.drops[above]
        start, end = self.sparsities[above - 1], self.sparsities[above]
        return float(start + (end - start) * (drop - low) / (high - low))


def curve(sensitivity: Sensitivity, name: str) -> Curve:
    """The curve of a layer with its bumps evened out: the worst quality up to each sparsity.

    Raises:
        ValueError: the layer was not analysed, or its quality, or the dense one, is NaN or infinite.
    """
    if name not in sensitivity.names:
        raise ValueError(
            f"{name} has no curve; analyse with the same pattern, where and stacked. There are {', '.join(sensitivity.names)}"
        )
    at = sensitivity.names.index(name)
    drops = np.append(0.0, sensitivity.dense - sensitivity.quality[at])
    if not np.isfinite(drops).all():
        raise ValueError(f"the quality of {name} is not finite at some sparsity, so nothing follows from its curve")
    sparsities, first = np.unique(np.append(0.0, sensitivity.sparsities[at]), return_index=True)
    return Curve(sparsities, np.maximum.accumulate(drops[first]))


def halved(low: float, high: float, good: Callable[[float], bool]) -> tuple[float, float]:
    """Where `good` begins, by bisection: the last place that is not good and the first that is; `high` is good."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return low, high


def from_sensitivity(sensitivity: Sensitivity, *, floor: float = 0.0) -> Allocation:
    """Each layer as sparse as its curve allows: all are expected to lose equally much, and the whole is as sparse as asked.

    Expected is the worst quality measured up to a sparsity, linear between the points. Where curves are flat, layers go the same
    fraction of the way. Sparsities are whole units, and of all weights the number asked for is dropped.

    Args:
        sensitivity: from `analyse`, with the pattern, `where` and `stacked` that are used now.
        floor: fraction of each layer that stays whatever its curve.

    Raises:
        ValueError: what is no `Sensitivity`, floor outside [0, 1), or a curve that is not finite; at `init`: a layer without a
            curve or of another size, or a sparsity beyond the curves' ends.
    """
    if not isinstance(sensitivity, Sensitivity):
        raise ValueError(
            f"from_sensitivity is given {shown(sensitivity)}; expected the curves of analyse, or Sensitivity.load(path)"
        )
    number("the floor of from_sensitivity", floor)
    if not 0 <= floor < 1:
        raise ValueError(f"the floor of from_sensitivity is {floor}; expected a fraction to keep, at least 0 and below 1")
    curves = {name: curve(sensitivity, name) for name in sensitivity.names}
    sizes = zip(sensitivity.names, sensitivity.units, sensitivity.weights)
    known = {name: (units, weights / units) for name, units, weights in sizes}  # how many, and what each is worth

    def targets(parts: Sequence[Part], sparsity: Sparsity | None) -> Targets:
        single = one_sparsity("from_sensitivity", sparsity)
        layers = {name: part.units for part in parts for name in part.names}
        for name, units in layers.items():
            curve(sensitivity, name)
            if known[name][0] != units:
                raise ValueError(
                    f"the curve of {name} is of {known[name][0]:,} units and there are {units:,}; analyse these parameters with "
                    "this pattern"
                )
        line = _spread([curves[name] for name in layers], np.array([known[name] for name in layers]), floor, single)
        share = dict(zip(layers, line))
        found = {part.name: np.array([share[name] for name in part.names]) for part in parts}
        return {part.name: found[part.name] if part.layers else found[part.name][0] for part in parts}

    return Allocation("from_sensitivity", targets)


def _spread(curves: Sequence[Curve], sizes: np.ndarray, floor: float, sparsity: float) -> np.ndarray:
    """The sparsity of each layer, in whole units: float64 [layers]. Sizes [layers, 2] are units, and weights of each unit."""
    units, worth = sizes.T
    ends = np.array([curve.sparsities[-1] for curve in curves])
    most = np.floor(np.minimum(ends, 1 - floor) * units + 1e-6)
    wanted = float(np.round(sparsity * (units @ worth)))
    if most @ worth < wanted - 0.5:
        raise ValueError(
            f"a sparsity of {sparsity:g} is asked for, and the curves end, or the floor begins, at "
            f"{most @ worth / (units @ worth):.3g} of all weights; analyse larger sparsities, or ask for less"
        )

    def real(drop: float) -> np.ndarray:
        return np.minimum([curve.reach(drop) for curve in curves] * units, most)

    low, high = -1.0, 0.0
    if real(high) @ worth < wanted:
        low, high = halved(0.0, max(curve.drops[-1] for curve in curves), lambda drop: real(drop) @ worth >= wanted)
    # Where curves are flat, the tolerated drop alone does not say how far to go.
    less, more = real(low), real(high)
    jump = (more - less) @ worth
    return _whole(less + (more - less) * ((wanted - less @ worth) / jump if jump > 0 else 0.0), most, worth, wanted) / units


def _whole(real: np.ndarray, most: np.ndarray, worth: np.ndarray, wanted: float) -> np.ndarray:
    """Whole units, rounded so that as many weights are dropped as wanted: the largest remainders are rounded up."""
    found = np.floor(real + 1e-9)
    missing = wanted - found @ worth
    for i in np.argsort(found - real, kind="stable"):
        if found[i] < most[i] and missing >= worth[i] / 2:
            found[i] += 1
            missing -= worth[i]
    return found
