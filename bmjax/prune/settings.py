"""Pruning of single weights, neighbours, blocks and channels as config."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import optax

from bmjax.config import above, at_least, field, within
from bmjax.prune import allocation, criteria, patterns, schedules
from bmjax.prune.criteria import Criterion
from bmjax.prune.transform import around, sparsify

_SCORES: dict[str, Callable[[], Criterion]] = {
    "magnitude": criteria.magnitude,
    "random": criteria.random,
    "saliency": criteria.saliency,
    "movement": criteria.movement,
    "fisher": criteria.fisher,
    "taylor": criteria.taylor,
}
_ALLOCATIONS = {
    "uniform": allocation.uniform,
    "global": allocation.global_threshold,
    "erdos_renyi": allocation.erdos_renyi,
    "erdos_renyi_kernel": allocation.erdos_renyi_kernel,
    "owl": allocation.owl,
}


@dataclasses.dataclass
class Sparsity:
    """Pruning during training; a sparsity of 0 prunes nothing."""

    sparsity: float = field(0.0, "fraction of the kernels' weights that end as zero", check=within(0, 1, open_high=True))
    score: str = field("magnitude", "what a weight is worth", choices=tuple(_SCORES))
    pattern: str = field("unstructured", "what goes together: unstructured, n:m such as 2:4, a block such as 4x4, or channel")
    allocation: str = field("uniform", "how the sparsity is spread over the kernels", choices=tuple(_ALLOCATIONS))
    schedule: str = field("cubic", "gradually, or all at `end`", choices=("cubic", "linear", "iterative", "one_shot"))
    rounds: int = field(5, "of the iterative schedule", check=at_least(2))
    begin: float = field(0.2, "fraction of the steps after which pruning begins", check=within(0, 1))
    end: float = field(0.7, "fraction of the steps after which the target is reached", check=above(0))
    interval: int = field(10, "steps between new masks", check=at_least(1))
    packed: bool = field(False, "keep masks at one bit a weight")
    criterion: Criterion | None = field(None, "your own instead of `score`; it sees the raw gradients")

    @property
    def works(self) -> bool:
        """Whether anything is pruned; n:m needs no sparsity."""
        return bool(self.sparsity) or ":" in self.pattern

    def validate(self) -> None:
        """Raises ValueError if pruning does not end after it begins and before the run does, or for a pattern that is none."""
        if not self.begin < self.end <= 1:
            raise ValueError(f"pruning begins at {self.begin} and ends at {self.end}; expected begin < end <= 1")
        pattern = self._pattern()
        if pattern.implied is not None and self.sparsity not in (0.0, pattern.implied):
            raise ValueError(f"the pattern is {self.pattern}, so {pattern.implied:g} sparse, and sparsity is {self.sparsity:g}")
        if pattern.implied is not None and self.allocation != "uniform":
            raise ValueError(
                f"the pattern {self.pattern} is the same everywhere; the allocation {self.allocation} cannot spread it"
            )

    def _pattern(self) -> patterns.Pattern:
        if self.pattern in ("unstructured", "channel"):
            return patterns.unstructured() if self.pattern == "unstructured" else patterns.channel()
        if found := re.fullmatch(r"(\d+):(\d+)", self.pattern):
            return patterns.n_m(int(found[1]), int(found[2]))
        if found := re.fullmatch(r"(\d+)x(\d+)", self.pattern):
            return patterns.block(int(found[1]), int(found[2]))
        raise ValueError(f"there is no pattern {self.pattern!r}; there are unstructured, n:m (2:4), a block (4x4) and channel")

    def _schedule(self, steps: int) -> schedules.Schedule:
        begin, end = int(self.begin * steps), max(int(self.end * steps), 1)
        begin = min(begin, end - 1)
        if self.schedule == "one_shot":
            return schedules.one_shot(end)
        if self.schedule == "iterative":
            return schedules.iterative(begin, end, self.rounds)
        return {"cubic": schedules.cubic, "linear": schedules.linear}[self.schedule](begin, end)

    def after(self, tx: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        """The optimiser with pruning chained behind it (around it, where gradients are scored) in a run of `steps` updates."""
        if not self.works:
            return tx
        pattern = self._pattern()
        how: dict[str, Any] = {
            "sparsity": None if pattern.implied is not None else self.sparsity,
            "pattern": pattern,
            "allocation": _ALLOCATIONS[self.allocation](),
            "schedule": self._schedule(steps),
            "every": self.interval,
            "stacked": patterns.SCANNED,
            "packed": self.packed,
        }
        criterion = self.criterion or _SCORES[self.score]()
        if self.criterion is not None or criterion.gradients:
            return around(tx, criterion, **how)
        return optax.chain(tx, sparsify(criterion, **how))
