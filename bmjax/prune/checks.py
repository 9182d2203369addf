"""Whether the choices of a plan are of the right kinds and go together, before there are parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bmjax.prune import kinds
from bmjax.prune.allocation import Allocation, check_range
from bmjax.prune.calibration import Method
from bmjax.prune.criteria import Criterion
from bmjax.prune.patterns import Pattern
from bmjax.prune.schedules import Schedule

if TYPE_CHECKING:
    from bmjax.prune.plan import Plan


def check(plan: Plan) -> None:
    """Raises ValueError for what is of another kind, or cannot work with any parameters."""
    _kinds(plan)
    _together(plan)


def _kinds(plan: Plan) -> None:
    if isinstance(plan.criterion, Method):
        raise ValueError(f"{plan.criterion.name} works on calibration data, without training: use prune.layerwise")
    kinds.expect("criterion", plan.criterion, Criterion)
    for pattern in plan.pattern.values() if isinstance(plan.pattern, Mapping) else [plan.pattern]:
        kinds.expect("pattern", pattern, Pattern)
    kinds.expect("allocation", plan.allocation, Allocation)
    kinds.expect("schedule", plan.schedule, Schedule)
    kinds.whole("the number of steps between masks, `every`,", plan.every)


def _together(plan: Plan) -> None:
    if plan.sparsity is not None:
        check_range(plan.sparsity if isinstance(plan.sparsity, Mapping) else {"": plan.sparsity})
    if plan.every < 1:
        raise ValueError(f"masks are to be made every {plan.every} steps; expected 1 or more")
    patterns = list(plan.pattern.values()) if isinstance(plan.pattern, Mapping) else [plan.pattern]
    if not patterns:
        raise ValueError("the pattern is an empty mapping; give a pattern, or {path regex: pattern}")
    if plan.groups:
        _groups(plan)
    elif any(pattern.groups for pattern in patterns):
        raise ValueError("a groups pattern spans arrays and cannot be one of several patterns by path; chain two transforms")
    if plan.allocation.across:
        _across(plan, patterns)
    regexes = list(plan.sparsity) if isinstance(plan.sparsity, Mapping) and not plan.groups else []
    regexes += list(plan.pattern) if isinstance(plan.pattern, Mapping) else []
    for regex in [*regexes, *(regex for regex in (plan.where, plan.stacked) if regex is not None)]:
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(f"{regex!r} is not a regular expression: {error}") from None


def _groups(plan: Plan) -> None:
    if plan.where is not None:
        raise ValueError(f"where={plan.where!r} is given with the groups pattern, whose members say what is pruned; leave it out")
    if plan.allocation.across:
        raise ValueError("a global threshold cannot compare elements of different groups or layers; use uniform()")
    if plan.stacked is not None:
        raise ValueError("`stacked` is given with the groups pattern, whose groups know their layers; leave it out")
    unknown = [name for name in (plan.sparsity if isinstance(plan.sparsity, Mapping) else {}) if name not in plan.groups]
    if unknown:
        raise ValueError(f"a sparsity is given for {unknown[0]!r}; the groups are {', '.join(plan.groups)}")


def _across(plan: Plan, patterns: Sequence[Pattern]) -> None:
    if isinstance(plan.sparsity, Mapping):
        raise ValueError("a global threshold takes one sparsity for all weights; use uniform() for one by name")
    if any(pattern.choose for pattern in patterns):
        raise ValueError(f"a global threshold cannot spread the pattern {patterns[0].name}, which is the same everywhere")
    if len({pattern.name for pattern in patterns}) > 1:
        raise ValueError("a global threshold cannot compare units of different patterns; use uniform()")
