"""How a sparsity is spread: what is asked of each array, or of each layer of a stacked one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.prune.kinds import number, shown
from bmjax.prune.outliers import Owl, owl_sparsities
from bmjax.prune.patterns import Sparsity
from bmjax.trace import Sides

Targets: TypeAlias = dict[str, np.ndarray]  # {name: float64 [] or, for a stacked array, [layers]}


class Part(NamedTuple):
    """Something that takes part: an array, stacked or not, or a group.

    Attributes:
        name: its path, or the group's name.
        shape: without the stacked axis.
        layers: how many are stacked in front; 0 if it is not stacked.
        units: how many there are to choose from, in each layer.
        names: the name of each layer, "layers/3/up/kernel"; just the name if it is not stacked.
    """

    name: str
    shape: tuple[int, ...]
    layers: int
    units: int
    names: tuple[str, ...]

    @property
    def weights(self) -> int:
        """Weights of one layer."""
        return math.prod(self.shape)


class Allocation(NamedTuple):
    """Spreads the sparsity.

    Attributes:
        name: for messages.
        targets: (parts, what the user asks for) -> {name: target}. A part that it leaves out stays whole.
        across: True if units of all parts are ranked together.
        floor: with `across`, the fraction of each part that stays whatever its scores.
        normalise: with `across`, scores are divided by their part's root mean square first.
        adapt: None, or ({name: scores}, targets) -> {name: targets by the scores, traced}.
        outliers: the settings of `owl`, which `layerwise` applies to blocks.
    """

    name: str
    targets: Callable[[Sequence[Part], Sparsity | None], Targets]
    across: bool = False
    floor: float = 0.0
    normalise: bool = False
    adapt: Callable[[Mapping[str, jax.Array], Targets], dict[str, jax.Array]] | None = None
    outliers: Owl | None = None


def one_sparsity(kind: str, sparsity: Sparsity | None) -> float:
    """The single sparsity that an allocation spreads. Raises ValueError if it is not one number."""
    if sparsity is None or isinstance(sparsity, Mapping):
        given = "none" if sparsity is None else "one by name"
        raise ValueError(f"the allocation {kind} spreads one sparsity over all weights, and {given} is given; give a fraction")
    return sparsity


def _everywhere(parts: Sequence[Part], sparsity: float) -> Targets:
    return {part.name: np.full((part.layers,) if part.layers else (), sparsity) for part in parts}


def uniform() -> Allocation:
    """The same sparsity in every array, in each layer of a stacked one, and in each layer of a group."""

    def targets(parts: Sequence[Part], sparsity: Sparsity | None) -> Targets:
        if sparsity is None:
            raise ValueError("no sparsity is given; give the fraction to drop: sparsity=0.8")
        return _by_name(parts, sparsity) if isinstance(sparsity, Mapping) else _everywhere(parts, sparsity)

    return Allocation("uniform", targets)


def by_layer(table: Mapping[str, float], otherwise: float | None = None) -> Allocation:
    """A sparsity by name: the first regex of the table that is found in a name counts.

    Args:
        table: {regex of a path, or of a layer of a stacked array ("layers/3/up/kernel"), or a group's name: fraction}.
        otherwise: for what no regex finds; None leaves it whole.

    Raises:
        ValueError: a value out of range, no table, or at `init` a regex that finds nothing.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"the table of by_layer is {shown(table)}; expected {{regex of a path: fraction}}")

    def targets(parts: Sequence[Part], sparsity: Sparsity | None) -> Targets:
        if sparsity is not None:
            raise ValueError("a sparsity is given beside the table of by_layer; leave one of them out")
        return _by_name(parts, table, otherwise)

    check_range(table if otherwise is None else {**table, "otherwise": otherwise})
    return Allocation("by_layer", targets)


def check_range(named: Mapping[str, float]) -> None:
    """Raises ValueError for a sparsity outside [0, 1), or one that is no number."""
    if not named:
        raise ValueError("the sparsity is an empty mapping; expected a fraction, or one for each name")
    for name, value in named.items():
        of = f" of {name!r}" if name else ""
        number(f"the sparsity{of}", value)
        if not 0.0 <= value < 1.0:
            raise ValueError(f"the sparsity{of} is {value}; expected a fraction to drop, at least 0 and below 1")


def _by_name(parts: Sequence[Part], table: Mapping[str, float], otherwise: float | None = None) -> Targets:
    for regex in table:
        if not any(re.search(regex, name) for part in parts for name in (part.name, *part.names)):
            known = ", ".join(part.name for part in parts)
            raise ValueError(f"the sparsity of {regex!r} matches none of the weights to prune: {known}")

    def of(name: str, whole: str) -> float | None:
        return next((value for regex, value in table.items() if re.search(regex, name) or re.search(regex, whole)), otherwise)

    found = {}
    for part in parts:
        values = [of(name, part.name) for name in part.names]
        if any(value is not None for value in values):
            line = np.array([0.0 if value is None else value for value in values])
            found[part.name] = line if part.layers else line[0]
    return found


def global_threshold(*, floor: float = 0.0, normalise: bool = False) -> Allocation:
    """One threshold for all weights together, so that layers of small weights lose more.

    Args:
        floor: fraction of each array that stays whatever happens, so that no layer is cut off.
        normalise: divide scores by their array's root mean square, so that arrays of different scale can be compared.

    Raises:
        ValueError: the floor is not in [0, 1), or at `init` leaves too little to drop.
    """
    number("the floor of a global threshold", floor)
    if not 0 <= floor < 1:
        raise ValueError(f"the floor of a global threshold is {floor}; expected a fraction to keep, at least 0 and below 1")

    def targets(parts: Sequence[Part], sparsity: Sparsity | None) -> Targets:
        single = one_sparsity("global_threshold", sparsity)
        if floor > 1 - single:
            raise ValueError(f"the floor {floor} of a global threshold keeps more than the sparsity {single} allows; lower it")
        return _everywhere(parts, single)

    return Allocation("global_threshold", targets, across=True, floor=floor, normalise=normalise)


def erdos_renyi(sides: Mapping[str, Sides] | None = None) -> Allocation:
    """The density of a layer is proportional to (n_in + n_out) / (n_in n_out). Mocanu et al. 2018, arXiv 1707.04780.

    Args:
        sides: {path: its inputs and outputs} from `trace.sides`, for kernels whose last two axes these are not, such as those of
            attention, [in, heads, dim].
    """
    name = "erdos_renyi"
    return Allocation(name, lambda parts, sparsity: _erdos_renyi(name, parts, sparsity, sides or {}, kernel=False))


def erdos_renyi_kernel(sides: Mapping[str, Sides] | None = None) -> Allocation:
    """Erdos-Renyi whose sum and product have a convolution's taps too. Evci et al. 2020 (RigL), arXiv 1911.11134, section 3.

    Args:
        sides: as for `erdos_renyi`; without them every axis of a kernel counts by itself.
    """
    name = "erdos_renyi_kernel"
    return Allocation(name, lambda parts, sparsity: _erdos_renyi(name, parts, sparsity, sides or {}, kernel=True))


def _sizes(part: Part, sides: Sides | None, kernel: bool) -> tuple[int, ...]:
    """The numbers that Erdos-Renyi adds and multiplies."""
    if sides is None:
        return part.shape if kernel else part.shape[-2:]
    taps = tuple(part.shape[axis] for axis in sides.taps) if kernel else ()
    return (*taps, *(math.prod(part.shape[axis] for axis in side) for side in (sides.inputs, sides.outputs)))


def _erdos_renyi(
    kind: str, parts: Sequence[Part], sparsity: Sparsity | None, sides: Mapping[str, Sides], kernel: bool
) -> Targets:
    single = one_sparsity(kind, sparsity)
    for part in parts:
        if len(part.shape) < 2:
            raise ValueError(f"{kind} needs inputs and outputs, and {part.name} has shape {list(part.shape)}; leave it out")
    sizes = np.array([part.weights * max(part.layers, 1) for part in parts], np.float64)
    axes = [_sizes(part, sides.get(part.name), kernel) for part in parts]
    raw = np.array([sum(shape) / math.prod(shape) for shape in axes])
    dense = np.zeros(len(parts), bool)  # layers whose share would be above 1
    while True:
        epsilon = ((1 - single) * sizes.sum() - sizes[dense].sum()) / max((raw * sizes)[~dense].sum(), 1e-300)
        over = ~dense & (epsilon * raw > 1)
        if not over.any():
            break
        dense |= over
    density = np.where(dense, 1.0, np.maximum(epsilon, 0.0) * raw)
    return {part.name: np.full((part.layers,) if part.layers else (), 1 - share) for part, share in zip(parts, density)}


def owl(outlier: float = 5.0, spread: float = 0.08) -> Allocation:
    """Layers with more outliers among their scores lose less. Yin et al. 2023 (OWL), arXiv 2310.05175, section 3.

    A layer's outliers are its scores above `outlier` times their mean. In training they are taken array by array, or layer by
    layer of a stacked one; `layerwise` takes them block by block, as the paper does.

    Args:
        outlier: M of the paper.
        spread: lambda of the paper: the layer that differs most from the target differs by so much. The mean over all weights is
            the target.

    Raises:
        ValueError: a setting that is not above 0, or at `init` a spread that leaves [0, 1).
    """
    number("the outlier of owl", outlier)
    number("the spread of owl", spread)
    if not outlier > 0 or not spread > 0:
        raise ValueError(f"owl is given outlier={outlier} and spread={spread}; expected numbers above 0, 5 and 0.08 in the paper")

    def targets(parts: Sequence[Part], sparsity: Sparsity | None) -> Targets:
        single = one_sparsity("owl", sparsity)
        owl_sparsities([0.0], [1], single, spread)
        return _everywhere(parts, single)

    def adapt(scores: Mapping[str, jax.Array], targets: Targets) -> dict[str, jax.Array]:
        ratios, sizes, places = [], [], [0]
        for name, leaf in scores.items():
            # The axes stay as they are: rows of all of a layer would be gathered where it is partitioned.
            layers = leaf.astype(jnp.float32).reshape(-1, *leaf.shape[targets[name].ndim :])
            layers = jnp.where(jnp.isfinite(layers), layers, 0.0)  # what is dropped already ranks at -inf
            inner = tuple(range(1, layers.ndim))
            ratios.append(jnp.mean(layers > outlier * layers.mean(inner, keepdims=True), axis=inner, dtype=jnp.float32))
            sizes.extend([math.prod(layers.shape[1:])] * len(layers))
            places.append(places[-1] + len(layers))
        share = np.asarray(sizes, np.float64) / sum(sizes)
        line = jnp.concatenate(ratios)
        deviation = line - jnp.sum(line * share)
        widest = jnp.max(jnp.abs(deviation))
        moved = -deviation * jnp.where(widest > 0, spread / jnp.where(widest > 0, widest, 1.0), 0.0)
        spans = zip(scores, places, places[1:])
        return {name: jnp.asarray(targets[name], jnp.float32) + moved[a:b].reshape(targets[name].shape) for name, a, b in spans}

    return Allocation("owl", targets, adapt=adapt, outliers=Owl(outlier, spread))
