"""Pruning of single weights, neighbours, blocks and channels as config."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import optax

from bmjax import trace, trees
from bmjax.config import above, at_least, field, within
from bmjax.prune import allocation, criteria, patterns, schedules, sparse_training
from bmjax.prune.allocation import Allocation
from bmjax.prune.criteria import Criterion
from bmjax.prune.straight import StraightThrough, straight_through
from bmjax.prune.transform import around, sparsify
from bmjax.trace import Sides
from bmjax.types import Params, View

_SCORES: dict[str, Callable[..., Criterion]] = {
    "magnitude": criteria.magnitude,
    "random": criteria.random,
    "saliency": criteria.saliency,
    "movement": criteria.movement,
    "fisher": criteria.fisher,
    "taylor": criteria.taylor,
}
_GRADIENTS = ("saliency", "movement", "fisher", "taylor")  # the scores that go by gradients, and whose statistics decay
_ALLOCATIONS: dict[str, Callable[..., Allocation]] = {
    "uniform": allocation.uniform,
    "global": allocation.global_threshold,
    "erdos_renyi": allocation.erdos_renyi,
    "erdos_renyi_kernel": allocation.erdos_renyi_kernel,
    "owl": allocation.owl,
}
_SCORED = ("score", "criterion", "decay", "pattern", "allocation", "floor", "normalise", "schedule", "rounds")
_MOVED = ("allocation", "begin", "end", "interval", "drop", "packed")
_SETTINGS = {  # what each method looks at, beside sparsity and where
    "gradual": (*_SCORED, "begin", "end", "interval", "packed"),
    "straight_through": (*_SCORED, "begin", "end", "interval", "packed"),
    "static": ("allocation", "packed"),
    "set": _MOVED,
    "rigl": _MOVED,
    "ac_dc": ("allocation", "floor", "normalise", "begin", "end", "phase", "packed"),
}
_SHAPED = ("static", "set", "rigl")  # whose first masks are random


def _check_regex(value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is not a regular expression: {error}") from None


@dataclasses.dataclass
class Sparsity:
    """Pruning during training; a sparsity of 0 prunes nothing."""

    sparsity: float = field(0.0, "fraction of the kernels' weights that end as zero", check=within(0, 1, open_high=True))
    method: str = field(
        "gradual",
        "gradual: what goes stays away; straight_through: weights stay dense and the forward pass sees masked ones; sparse from "
        "the start: static, set, rigl; ac_dc: sparse and dense phases in turn",
        choices=tuple(_SETTINGS),
    )
    where: str = field("", "regex of the parameters to prune; empty takes all kernels but embedding and head", check=_check_regex)
    score: str = field("magnitude", "what a weight is worth", choices=tuple(_SCORES))
    decay: float | None = field(
        None,
        "of the statistics of saliency, movement, fisher or taylor; none: 0, 1, 0.99 or 0.9",
        check=within(0, 1),
    )
    pattern: str = field("unstructured", "what goes together: unstructured, n:m such as 2:4, a block such as 4x4, or channel")
    allocation: str = field(
        "",
        "how the sparsity is spread over the kernels; empty is uniform, and erdos_renyi_kernel for static, set and rigl",
        choices=("", *_ALLOCATIONS),
    )
    floor: float = field(
        0.0, "fraction of each kernel that the global allocation leaves at least", check=within(0, 1, open_high=True)
    )
    normalise: bool = field(False, "the global allocation divides scores by their kernel's root mean square")
    schedule: str = field("cubic", "gradually, or all at `end`", choices=("cubic", "linear", "iterative", "one_shot"))
    rounds: int = field(5, "of the iterative schedule", check=at_least(2))
    begin: float | None = field(
        None,
        "fraction of the steps after which pruning, or the moving of masks, begins; none is 0.2, and 0 for set and rigl",
        check=within(0, 1),
    )
    end: float = field(0.7, "fraction of the steps after which the target is reached, or masks stay", check=above(0))
    interval: int = field(10, "steps between new masks", check=at_least(1))
    drop: float = field(
        0.3, "set and rigl: fraction of the weights that move at first", check=(lambda value: 0 < value < 1, "in (0, 1)")
    )
    phase: float = field(0.05, "ac_dc: fraction of the steps that a sparse or dense phase takes", check=above(0))
    packed: bool = field(False, "keep masks at one bit a weight")
    criterion: Criterion | None = field(None, "your own instead of `score`; it sees the raw gradients")

    @property
    def works(self) -> bool:
        """Whether anything is pruned; n:m needs no sparsity."""
        return bool(self.sparsity) or self.neighbours

    @property
    def neighbours(self) -> bool:
        """Whether the pattern is n:m, which needs each kernel's inputs."""
        return ":" in self.pattern

    @property
    def sided(self) -> bool:
        """Whether it matters which axes of a kernel are inputs and which are outputs."""
        return self.works and (self.pattern != "unstructured" or "erdos_renyi" in self._spread)

    @property
    def views(self) -> tuple[View, ...]:
        """What the forward pass, and the export, sees of the parameters: the masked ones of straight_through."""
        return (self._straight(1, 0, None).view,) if self.works and self.method == "straight_through" else ()

    def validate(self) -> None:
        """Raises ValueError for settings that cannot go together, or that the method would not look at."""
        begin = self._begin
        if not begin < self.end <= 1:
            raise ValueError(f"pruning begins at {begin} and ends at {self.end}; expected begin < end <= 1")
        pattern = self._pattern(None)
        self._check_looked_at()
        if pattern.implied is not None and self.sparsity not in (0.0, pattern.implied):
            raise ValueError(f"the pattern is {self.pattern}, so {pattern.implied:g} sparse, and sparsity is {self.sparsity:g}")
        if pattern.implied is not None and self.allocation not in ("", "uniform"):
            raise ValueError(
                f"the pattern {self.pattern} is the same everywhere; the allocation {self.allocation} cannot spread it"
            )
        if self.method in _SHAPED and self.allocation in ("global", "owl"):
            raise ValueError(
                f"the masks of {self.method} are random at first and have no scores, by which the allocation {self.allocation} "
                "goes; take uniform, erdos_renyi or erdos_renyi_kernel"
            )
        gradients = self.score in _GRADIENTS if self.criterion is None else self.criterion.gradients
        if self.method == "straight_through" and gradients:
            score = self.score if self.criterion is None else self.criterion.name
            raise ValueError(
                f"straight_through takes gradients where weights are hidden, which the score {score} is not meant for; "
                "take magnitude or random, or method=gradual"
            )
        self._criterion(0)  # raises for a decay that it does not take

    def _check_looked_at(self) -> None:
        """Raises ValueError if a setting is given that says nothing."""
        plain = Sparsity()
        changed = [entry.name for entry in dataclasses.fields(self) if getattr(self, entry.name) != getattr(plain, entry.name)]
        looked_at = ("sparsity", "method", "where", *_SETTINGS[self.method])
        if unused := [name for name in changed if name not in looked_at]:
            raise ValueError(
                f"{unused[0]} is {getattr(self, unused[0])!r}, which the method {self.method} does not look at; leave it out "
                f"(it looks at {', '.join(looked_at)})"
            )
        if self.method != "gradual" and not self.works:
            raise ValueError(f"the method is {self.method} and the sparsity 0, which prunes nothing; set sparsity")
        if (self.floor or self.normalise) and self.allocation != "global":
            name = "floor" if self.floor else "normalise"
            raise ValueError(
                f"{name} is of the global allocation, and allocation is {self.allocation or 'uniform'}; set it to global"
            )
        if self.decay is not None and (self.score not in _GRADIENTS or self.criterion is not None):
            score = self.score if self.criterion is None else "your own"
            raise ValueError(f"decay is of the scores {', '.join(_GRADIENTS)}, and the score is {score}; leave it out")

    @property
    def _begin(self) -> float:
        return self.begin if self.begin is not None else 0.0 if self.method in ("set", "rigl") else 0.2

    def _pattern(self, sides: Mapping[str, Sides] | None) -> patterns.Pattern:
        if self.pattern in ("unstructured", "channel"):
            return patterns.unstructured() if self.pattern == "unstructured" else patterns.channel()
        if found := re.fullmatch(r"(\d+):(\d+)", self.pattern):
            n, m = int(found[1]), int(found[2])
            return patterns.n_m(n, m, None if sides is None else {path: side.inputs[-1] for path, side in sides.items()})
        if found := re.fullmatch(r"(\d+)x(\d+)", self.pattern):
            return patterns.block(int(found[1]), int(found[2]))
        raise ValueError(f"there is no pattern {self.pattern!r}; there are unstructured, n:m (2:4), a block (4x4) and channel")

    def _criterion(self, seed: int) -> Criterion:
        if self.criterion is not None:
            return self.criterion
        make = _SCORES[self.score]
        return make(seed) if self.score == "random" else make() if self.decay is None else make(self.decay)

    def _patterns(self, sides: Mapping[str, Sides] | None) -> patterns.Pattern | dict[str, patterns.Pattern]:
        """The pattern; of blocks and channels one for each kernel whose sides are known, and it as it is for the others."""
        plain = self._pattern(sides)
        if not sides or plain.implied is not None or self.pattern == "unstructured":
            return plain
        return {f"^{re.escape(path)}$": patterns.matrix(plain, side) for path, side in sides.items()} | {"": plain}

    @property
    def _spread(self) -> str:
        return self.allocation or ("erdos_renyi_kernel" if self.method in _SHAPED else "uniform")

    def _allocation(self, sides: Mapping[str, Sides] | None) -> Allocation:
        if self._spread == "global":
            return allocation.global_threshold(floor=self.floor, normalise=self.normalise)
        return _ALLOCATIONS[self._spread](*([sides] if "erdos_renyi" in self._spread else []))

    def _span(self, steps: int) -> tuple[int, int]:
        """(first step, last step), both before the run ends, whose last update is number `steps` - 1."""
        end = max(min(int(self.end * steps), steps - 1), 1)
        return min(int(self._begin * steps), end - 1), end

    def _schedule(self, steps: int) -> schedules.Schedule:
        begin, end = self._span(steps)
        if self.schedule == "one_shot":
            return schedules.one_shot(end)
        if self.schedule == "iterative":
            return schedules.iterative(begin, end, self.rounds)
        return {"cubic": schedules.cubic, "linear": schedules.linear}[self.schedule](begin, end)

    def sides(self, fn: Callable[..., Any], params: Params, batch: Any) -> dict[str, Sides] | None:
        """{path: which axes are inputs and outputs} of the kernels to prune, where that matters; else None. Shapes are enough.

        Args:
            fn: (params, batch) -> what the model makes of it.
            params, batch: arrays or ShapeDtypeStructs.

        Raises:
            ValueError: n:m, and the inputs of a kernel are not found (names the path, the shape and why).
        """
        if not self.sided:
            return None
        leaves, found = trees.paths(params), trace.linears(fn, params, batch)
        known, wanted = found.sides(), patterns.chosen(params, self.where or None)
        if self.neighbours:
            for path in wanted:
                if path not in known or not known[path].inputs:
                    why = found.left.get(path) or "it has no inputs to choose from"
                    raise ValueError(
                        f"the pattern {self.pattern} runs along a layer's inputs, and those of {path} {list(leaves[path].shape)} "
                        f"are not found: {why}; name the other kernels with config.prune.where"
                    )
        return {path: known[path] for path in wanted if path in known}

    def after(
        self, tx: optax.GradientTransformation, steps: int, *, seed: int = 0, sides: Mapping[str, Sides] | None = None
    ) -> optax.GradientTransformation:
        """The optimiser with pruning behind it, or around it, in a run of `steps` updates.

        Args:
            tx: the optimiser.
            steps: of the run.
            seed: of random scores and masks, in [0, 2^32).
            sides: from `sides`; without them kernels whose axes do not say what they are, are refused at `init`.
        """
        if not self.works:
            return tx
        if self.method == "straight_through":
            return optax.chain(tx, self._straight(steps, seed, sides).tx)
        if self.method == "gradual":
            criterion, how = self._criterion(seed), self._gradual(steps, sides)
            if self.criterion is not None or criterion.gradients:
                return around(tx, criterion, **how)
            return optax.chain(tx, sparsify(criterion, **how))
        shared = {**self._shared(sides), "sparsity": self.sparsity}
        if self.method == "static":
            return sparse_training.static_sparse(tx, seed=seed, **shared)
        begin, end = self._span(steps)
        if self.method == "ac_dc":
            return sparse_training.ac_dc(tx, phase=max(round(self.phase * steps), 1), begin=begin, end=end, **shared)
        make = sparse_training.rigl if self.method == "rigl" else sparse_training.sparse_evolution
        return make(tx, begin=begin, end=end, every=self.interval, drop=self.drop, seed=seed, **shared)

    def _straight(self, steps: int, seed: int, sides: Mapping[str, Sides] | None) -> StraightThrough:
        return straight_through(self._criterion(seed), **self._gradual(steps, sides))

    def _shared(self, sides: Mapping[str, Sides] | None) -> dict[str, Any]:
        """What all methods take alike."""
        fixed = {"where": self.where or None, "stacked": patterns.SCANNED, "packed": self.packed}
        return {**fixed, "allocation": self._allocation(sides)}

    def _gradual(self, steps: int, sides: Mapping[str, Sides] | None) -> dict[str, Any]:
        return {
            "sparsity": None if self.neighbours else self.sparsity,
            "pattern": self._patterns(sides),
            "schedule": self._schedule(steps),
            "every": self.interval,
            **self._shared(sides),
        }
