"""How much quality each layer costs when it alone is pruned, and the sparsities that follow from it.

curves = prune.analyse(quality, params)
tx = optax.chain(tx, prune.sparsify(sparsity=0.8, allocation=prune.from_sensitivity(curves)))
"""

from __future__ import annotations

import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bmjax import trees
from bmjax.prune import plan, threshold
from bmjax.prune.allocation import Part, check_range
from bmjax.prune.criteria import Criterion, Seen
from bmjax.prune.patterns import Pattern, masked
from bmjax.prune.plan import Plan
from bmjax.prune.words import Words, words
from bmjax.trace import keep
from bmjax.types import Params

SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


class Sensitivity(NamedTuple):
    """Quality against sparsity, layer by layer.

    Attributes:
        names: of the layers: an array's path, "layers/3/up/kernel" for a layer of a stacked array; a group's name for all of a
            group, "neurons/3" for the elements of its layer 3.
        sparsities: float64 [layers, points], what was really dropped: whole units, so a group of 4 knows quarters only.
        quality: float64 [layers, points]; higher is better.
        dense: quality with nothing pruned.
        units: of each layer, what there is to choose from: weights, blocks, channels, elements of a group.
        weights: of each layer; for a group, those that its elements own.
    """

    names: tuple[str, ...]
    sparsities: np.ndarray
    quality: np.ndarray
    dense: float
    units: tuple[int, ...]
    weights: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it; `from_dict` is the inverse."""
        lists = {key: np.asarray(value).tolist() for key, value in self._asdict().items() if key not in ("names", "dense")}
        return {**self._asdict(), "names": list(self.names), **lists}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Sensitivity:
        """The curves of `as_dict`.

        Raises:
            ValueError: something is missing, or not for every layer.
        """
        if missing := [key for key in cls._fields if key not in content]:
            raise ValueError(f"the sensitivity has no {missing[0]!r}; expected what `save` writes: {', '.join(cls._fields)}")
        names, units, weights = (tuple(content[key]) for key in ("names", "units", "weights"))
        sparsities, quality = (np.asarray(content[key], np.float64) for key in ("sparsities", "quality"))
        if quality.ndim != 2 or quality.shape != sparsities.shape or not len(quality) == len(names) == len(units) == len(weights):
            raise ValueError(
                f"the sensitivity has {len(names)} names, {len(units)} units, {len(weights)} weights, sparsities "
                f"{list(sparsities.shape)} and quality {list(quality.shape)}; expected [layers, points], and one of each a layer"
            )
        return cls(names, sparsities, quality, float(content["dense"]), units, weights)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, whole or not at all."""
        place = pathlib.Path(path)
        draft = place.with_name(f"{place.name}.tmp")
        draft.write_text(json.dumps(self.as_dict(), indent=1), encoding="utf-8")
        draft.replace(place)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """What `save` wrote. Raises ValueError as `from_dict`."""
        return cls.from_dict(json.loads(pathlib.Path(path).read_text(encoding="utf-8")))


class _Row(NamedTuple):
    """A curve: its name, the problems (layers of parts, in order) that are pruned for it, their units, and its weights."""

    name: str
    problems: tuple[int, ...]
    units: int
    weights: int


def analyse(
    quality: Callable[[Params], Any],
    params: Params,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    criterion: Criterion | None = None,
    pattern: Pattern | Mapping[str, Pattern] | None = None,
    where: str | None = None,
    stacked: str | None = None,
) -> Sensitivity:
    """Prunes each layer alone, to each sparsity, and measures; nothing is trained. Li et al. 2017, arXiv 1608.08710, section 3.2.

    A layer is an array, a layer of a stacked one, a group (all its layers alike), or one layer's elements of a stacked group.
    Masks are those that `sparsify` would make, by one compiled function whose inputs are the layer and the sparsity; parameters
    stay partitioned as they are.

        curves = prune.analyse(jax.jit(lambda params: accuracy(params, batch)), params)
        tx = optax.chain(tx, prune.sparsify(sparsity=0.8, allocation=prune.from_sensitivity(curves)))

    Args:
        quality: params -> scalar, higher is better: a jitted function, or one on the host that evaluates. It is called as it is,
            once for each layer and sparsity.
        params: of the model, arrays on any mesh; they are left as they are.
        sparsities: rising fractions to drop, in [0, 1).
        criterion, pattern, where, stacked: as in `sparsify`. Criteria that need gradients are refused; `given` takes scores.

    Raises:
        ValueError: as `sparsify`; sparsities that do not rise; a pattern whose sparsity is fixed; a quality that is no scalar, or
            NaN: it names the layer and the sparsity.
    """
    chosen = plan.make(criterion, sparsity=0.0, pattern=pattern, where=where, stacked=stacked)
    params = jax.tree.map(jnp.asarray, params)
    found = _free(chosen, plan.parts(chosen, params))
    _check(chosen, sparsities)
    rows, sizes = _rows(chosen, found, params), _sizes(found)
    cut = jax.jit(lambda params, kept: masked(params, _masks(chosen, found, params, kept)))
    dense = _scalar(quality(params), "the dense parameters")
    curves, places = [], []
    for row in rows:
        least = 1 if chosen.groups else 0  # as `sparsify`: a layer without neurons is no layer
        counts = [min(round(float(share) * row.units), row.units - least) for share in sparsities]
        measured = {0: dense}
        for count in counts:  # a small group comes to the same count more than once
            if count not in measured:
                kept = [size - count if i in row.problems else size for i, size in enumerate(sizes)]
                measured[count] = _scalar(quality(cut(params, words(kept))), f"{row.name} at sparsity {count / row.units:.3g}")
        curves.append([measured[count] for count in counts])
        places.append([count / row.units for count in counts])
    names, _, units, weights = zip(*rows)
    return Sensitivity(names, np.array(places), np.array(curves), dense, units, weights)


def _free(chosen: Plan, found: Sequence[Part]) -> list[Part]:
    """The parts whose sparsity can vary."""
    free = [part for part in found if chosen.groups or getattr(plan.pattern_of(chosen, part.name), "choose", None) is None]
    if not free:
        raise ValueError("the pattern is the same everywhere, whatever the sparsity; give one whose sparsity can vary")
    return free


def _check(chosen: Plan, sparsities: Sequence[float]) -> None:
    check_range({f"point {i}": float(value) for i, value in enumerate(sparsities)})
    if any(a >= b for a, b in itertools.pairwise(sparsities)):
        raise ValueError(f"the sparsities of the analysis are {tuple(sparsities)}; expected rising ones")
    if chosen.criterion.gradients:
        raise ValueError(f"{chosen.criterion.name} needs gradients, which the analysis does not take; give scores: given(scores)")


def _sizes(found: Sequence[Part]) -> list[int]:
    """Units of each problem."""
    return [part.units for part in found for _ in range(max(part.layers, 1))]


def _rows(chosen: Plan, found: Sequence[Part], params: Params) -> list[_Row]:
    rows, first = [], 0
    for part in found:
        problems = range(first, first + max(part.layers, 1))
        first = problems.stop
        if not chosen.groups:
            rows += [_Row(name, (i,), part.units, part.weights) for name, i in zip(part.names, problems)]
            continue
        owned = _owned(chosen.groups[part.name], params)
        rows.append(_Row(part.name, tuple(problems), part.units, owned))
        if part.layers > 1:
            rows += [_Row(f"{part.name}/{i}", (at,), part.units, owned // part.layers) for i, at in enumerate(problems)]
    return rows


def _owned(group: Any, params: Params) -> int:
    """Weights that a group's elements own."""
    leaves = trees.paths(params)
    axes = [(leaves[member.path].shape, member) for member in group.members]
    return sum(math.prod(shape) // shape[member.axis] * member.index.size for shape, member in axes)


def _masks(chosen: Plan, found: Sequence[Part], params: Params, kept: Words) -> Params:
    """Masks with exactly so many units in each problem, as a tree like the parameters; traced."""
    raw = plan.scores(chosen, Seen(params, params, chosen.criterion.init(params)), [part.name for part in found])
    patterns = [None if chosen.groups else plan.pattern_of(chosen, part.name) for part in found]
    stacks = [int(bool(part.layers)) for part in found]
    scores = [raw[part.name] for part in found]
    units = [score if p is None else p.pool(score, stack) for score, p, stack in zip(scores, patterns, stacks)]
    ranked = threshold.rank(units, kept, stacks=stacks).masks
    masks = {
        part.name: mask if p is None else p.expand(mask, tuple(score.shape))
        for part, p, mask, score in zip(found, patterns, ranked, scores)
    }
    if chosen.groups:
        return keep.masks(list(chosen.groups.values()), masks, params)
    return trees.map_with_path(lambda path, _: masks.get(path, jnp.ones((), bool)), params)


def _scalar(value: Any, where: str) -> float:
    if np.ndim(value):
        raise ValueError(f"the quality has shape {list(np.shape(value))}; expected a scalar, higher is better")
    if math.isnan(found := float(value)):
        raise ValueError(f"the quality of {where} is NaN; expected a number, higher is better, so see what makes it NaN there")
    return found
