"""Unstructured pruning as config."""

from __future__ import annotations

import dataclasses
from typing import Any

import optax

from bmjax.config import above, at_least, field, within
from bmjax.prune.allocation import global_threshold, uniform
from bmjax.prune.criteria import Criterion
from bmjax.prune.schedules import cubic, one_shot
from bmjax.prune.transform import around, sparsify


@dataclasses.dataclass
class Sparsity:
    """Magnitude pruning of single weights during training; a sparsity of 0 prunes nothing."""

    sparsity: float = field(0.0, "fraction of the kernels' weights that end as zero", check=within(0, 1, open_high=True))
    allocation: str = field("uniform", "the same sparsity in each kernel, or one threshold", choices=("uniform", "global"))
    schedule: str = field("cubic", "gradually, or all at `end`", choices=("cubic", "one_shot"))
    begin: float = field(0.2, "fraction of the steps after which pruning begins", check=within(0, 1))
    end: float = field(0.7, "fraction of the steps after which the target is reached", check=above(0))
    interval: int = field(10, "steps between new masks", check=at_least(1))
    criterion: Criterion | None = field(None, "your own; it sees the raw gradients. none goes by magnitude")

    def validate(self) -> None:
        """Raises ValueError if pruning does not end after it begins and before the run does."""
        if not self.begin < self.end <= 1:
            raise ValueError(f"pruning begins at {self.begin} and ends at {self.end}; expected begin < end <= 1")

    def after(self, tx: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        """The optimiser with pruning chained behind it (around it, for a criterion of one's own) in a run of `steps` updates."""
        if not self.sparsity:
            return tx
        begin, end = int(self.begin * steps), max(int(self.end * steps), 1)
        how: dict[str, Any] = {
            "sparsity": self.sparsity,
            "allocation": {"uniform": uniform, "global": global_threshold}[self.allocation](),
            "schedule": cubic(min(begin, end - 1), end) if self.schedule == "cubic" else one_shot(end),
            "every": self.interval,
        }
        return optax.chain(tx, sparsify(**how)) if self.criterion is None else around(tx, self.criterion, **how)
