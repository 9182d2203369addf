"""What a user asks for, checked against the parameters, and the choice that follows from scores."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bmjax import trees
from bmjax.prune import checks, kinds, threshold
from bmjax.prune.allocation import Allocation, Part, Targets, uniform
from bmjax.prune.criteria import Criterion, Seen, magnitude
from bmjax.prune.patterns import SCANNED, Pattern, Sparsity, chosen, unstructured
from bmjax.prune.schedules import Schedule, constant
from bmjax.trace import keep
from bmjax.types import Params


class Plan(NamedTuple):
    """All choices of a `sparsify`; its arguments are described there."""

    criterion: Criterion
    sparsity: Sparsity | None
    pattern: Pattern | Mapping[str, Pattern]
    allocation: Allocation
    schedule: Schedule
    every: int
    where: str | None
    stacked: str | None

    @property
    def groups(self) -> dict[str, Any]:
        """The groups by name, if elements of groups are chosen."""
        return {} if isinstance(self.pattern, Mapping) else {group.name: group for group in self.pattern.groups}


class Choice(NamedTuple):
    """What stays.

    Attributes:
        masks: {path: bool like the array} of what is pruned.
        keeps: {group: bool} if elements of groups are chosen.
        cuts: uint32, the thresholds found: first guesses for the next time.
        nans: int32 scalar, scores that were NaN.
    """

    masks: dict[str, jax.Array]
    keeps: dict[str, jax.Array]
    cuts: jax.Array
    nans: jax.Array


def make(
    criterion: Criterion | None = None,
    *,
    sparsity: Sparsity | None = None,
    pattern: Pattern | Mapping[str, Pattern] | None = None,
    allocation: Allocation | None = None,
    schedule: Schedule | None = None,
    every: int = 1,
    where: str | None = None,
    stacked: str | None = None,
) -> Plan:
    """The plan with its defaults.

    Raises:
        ValueError: what is of another kind, or cannot work with any parameters.
    """
    plan = Plan(
        magnitude() if criterion is None else criterion,
        sparsity,
        unstructured() if pattern is None else pattern,
        uniform() if allocation is None else allocation,
        constant() if schedule is None else schedule,
        every,
        where,
        stacked,
    )
    checks.check(plan)
    return plan


def pattern_of(plan: Plan, path: str) -> Pattern | None:
    """The pattern of an array; None if none of several is for it."""
    if isinstance(plan.pattern, Mapping):
        return next((pattern for regex, pattern in plan.pattern.items() if re.search(regex, path)), None)
    return plan.pattern


def parts(plan: Plan, params: Params) -> list[Part]:
    """What takes part, in the tree's order.

    Raises:
        ValueError: a name, regex or pattern that does not fit the parameters, weights that are no floats, or nothing to prune.
    """
    if plan.groups:
        kinds.floats(trees.paths(params), [member.path for group in plan.groups.values() for member in group.members])
        keep.masks(list(plan.groups.values()), {}, params)  # raises where a group's member is not there
        sizes = {name: (group.size, group.stack) for name, group in plan.groups.items()}
        return [Part(name, (size,), stack, size, (name,) * max(stack, 1)) for name, (size, stack) in sizes.items()]
    leaves, found = trees.paths(params), []
    for path in chosen(params, plan.where):
        pattern = pattern_of(plan, path)
        if pattern is None:
            continue
        kinds.floats(leaves, [path])
        shape = tuple(leaves[path].shape)
        at = re.search(plan.stacked, path) if plan.stacked is not None else None
        layers = shape[0] if at is not None and len(shape) > 2 else 0
        inner = shape[1:] if layers else shape
        scanned = plan.stacked is None and len(shape) > 2 and re.search(SCANNED, path)  # a layer's rank does not go by `stacked`
        pattern.check(path, shape[1:] if scanned else inner)
        names = tuple(f"{path[: at.end()]}{i}/{path[at.end() :]}" for i in range(layers)) if at and layers else (path,)
        whole = jax.eval_shape(lambda x, p=pattern, k=bool(layers): p.pool(x, int(k)), jax.ShapeDtypeStruct(shape, jnp.float32))
        found.append(Part(path, inner, layers, int(np.prod(whole.shape[1:] if layers else whole.shape)), names))
    _check_regexes(plan, params, found)
    return found


def _check_regexes(plan: Plan, params: Params, found: Sequence[Part]) -> None:
    names = ", ".join(part.name for part in found)
    if not found:
        raise ValueError(f"none of the patterns by path is for any of {', '.join(chosen(params, plan.where))}")
    if isinstance(plan.pattern, Mapping):
        for regex in plan.pattern:
            if not any(re.search(regex, part.name) for part in found):
                raise ValueError(f"the pattern of {regex!r} matches none of the weights to prune: {names}")
    if plan.stacked not in (None, SCANNED) and not any(re.search(str(plan.stacked), path) for path in trees.paths(params)):
        raise ValueError(f"stacked={plan.stacked!r} matches none of the parameters {', '.join(trees.paths(params))}")


def targets(plan: Plan, found: Sequence[Part]) -> Targets:
    """The sparsity asked of each part.

    Raises:
        ValueError: it does not go with a pattern's own, or is below where the schedule starts.
    """
    own: Targets = {}
    for part in found:
        pattern = None if plan.groups else pattern_of(plan, part.name)
        if pattern is not None and pattern.implied is not None:
            own[part.name] = np.full((part.layers,) if part.layers else (), pattern.implied)
    spread = [part for part in found if part.name not in own]
    if not spread:
        asked = plan.sparsity
        if (asked is not None and asked != next(iter(own.values())).flat[0]) or plan.allocation.name != "uniform":
            implied = next(iter(own.values())).flat[0]
            raise ValueError(
                f"sparsity {asked} with the allocation {plan.allocation.name} is asked of a pattern that is {implied:g} sparse "
                "everywhere; leave both out"
            )
    both = {**(plan.allocation.targets(spread, plan.sparsity) if spread else {}), **own}
    both = {part.name: both[part.name] for part in found if part.name in both}
    below = plan.allocation.outliers.spread if plan.allocation.outliers else 0.0  # so much lower a target may move
    for name, target in both.items():
        if (target - (0.0 if name in own else below) < plan.schedule.initial).any():
            lowest = target.min() - (0.0 if name in own else below)
            raise ValueError(
                f"the schedule starts at sparsity {plan.schedule.initial:g}, above the target {lowest:g} of {name}; "
                "what is dropped stays dropped, so start lower"
            )
    return both


def scores(plan: Plan, seen: Seen, names: Sequence[str]) -> dict[str, jax.Array]:
    """{name: scores} of weights, or of elements of groups."""
    if plan.groups:
        return plan.criterion.elements([plan.groups[name] for name in names], seen)
    found = trees.paths(plan.criterion.weights(seen))
    return {name: found[name] for name in names}


def choose(
    plan: Plan,
    found: Sequence[Part],
    raw: Mapping[str, jax.Array],
    step: jax.Array,
    old: Mapping[str, jax.Array] | None,
    near: Any,
) -> Choice:
    """What stays at a step.

    Args:
        plan: the choices.
        found: from `parts`.
        raw: from `scores`.
        step: int32 scalar, which the schedule is asked about.
        old: {name: bool like the scores} of what may stay; None if everything may.
        near: cuts of the choice before, or None.
    """
    asked = targets(plan, found)
    nans = sum((jnp.sum(jnp.isnan(score), dtype=jnp.int32) for score in raw.values()), start=jnp.int32(0))
    # What was dropped ranks below all that was not, so it stays dropped, and a kept zero is not mistaken for it.
    held = raw if old is None else {name: jnp.where(old[name], score, -jnp.inf) for name, score in raw.items()}
    masks, spread = {}, []
    for part in found:
        if part.name not in asked:
            continue
        pattern = None if plan.groups else pattern_of(plan, part.name)
        if pattern is not None and pattern.choose is not None:
            masks[part.name] = pattern.choose(part.name, held[part.name], plan.schedule(step, float(asked[part.name].flat[0])))
        else:
            spread.append(part)
    chosen_units, cuts = _allocate(plan, spread, held, asked, step, near)
    for part, units in zip(spread, chosen_units):
        pattern = None if plan.groups else pattern_of(plan, part.name)
        masks[part.name] = units if pattern is None else pattern.expand(units, tuple(raw[part.name].shape))
    if old is not None:
        masks = {name: mask & old[name] for name, mask in masks.items()}
    masks = {part.name: masks[part.name] for part in found if part.name in masks}
    return Choice({} if plan.groups else masks, masks if plan.groups else {}, cuts, nans)


def problems(plan: Plan, found: Sequence[Part], asked: Targets) -> int:
    """How many thresholds there are to find."""
    free = [part for part in found if part.name in asked and not _chooses(plan, part)]
    if not free:
        return 0
    return 1 if plan.allocation.across else sum(max(part.layers, 1) for part in free)


def _chooses(plan: Plan, part: Part) -> bool:
    pattern = None if plan.groups else pattern_of(plan, part.name)
    return pattern is not None and pattern.choose is not None


def _allocate(
    plan: Plan, spread: Sequence[Part], held: Mapping[str, jax.Array], asked: Targets, step: jax.Array, near: Any
) -> tuple[list[jax.Array], jax.Array]:
    if not spread:
        return [], jnp.zeros((0,), jnp.uint32)
    units = []
    for part in spread:
        pattern = None if plan.groups else pattern_of(plan, part.name)
        units.append(held[part.name] if pattern is None else pattern.pool(held[part.name], int(bool(part.layers))))
    allocation, names = plan.allocation, [part.name for part in spread]
    sizes = [part.units for part in spread for _ in range(max(part.layers, 1))]
    stacks = [int(bool(part.layers)) for part in spread]
    if allocation.across:
        single = float(asked[names[0]].flat[0])
        wanted = threshold.remaining([sum(sizes)], [single], plan.schedule(step, single))
        ranked = threshold.rank(_comparable(allocation, spread, units), wanted, across=True, near=near)
        return ranked.masks, ranked.cuts
    goal: jax.Array | list[float] = [float(share) for name in names for share in np.atleast_1d(asked[name])]
    if allocation.adapt is not None:
        adapted = allocation.adapt(dict(zip(names, units)), {name: asked[name] for name in names})
        goal = jnp.concatenate([jnp.atleast_1d(adapted[name]) for name in names])
    fraction = plan.schedule(step, jnp.asarray(goal, jnp.float32))
    # A layer without neurons is no layer.
    wanted = threshold.remaining(sizes, goal, fraction, least=1 if plan.groups else 0)
    ranked = threshold.rank(units, wanted, stacks=stacks, near=near)
    return ranked.masks, ranked.cuts


def _comparable(allocation: Allocation, spread: Sequence[Part], units: Sequence[jax.Array]) -> list[jax.Array]:
    """Scores that one threshold may rank: normalised, and infinite for what the floor keeps."""
    if allocation.normalise:
        units = [leaf / jnp.sqrt(jnp.mean(jnp.square(jnp.where(jnp.isfinite(leaf), leaf, 0.0))) + 1e-30) for leaf in units]
    if not allocation.floor:
        return list(units)
    stacks = [int(bool(part.layers)) for part in spread]
    least = [math.ceil(allocation.floor * part.units) for part in spread for _ in range(max(part.layers, 1))]
    safe = threshold.rank(units, least, stacks=stacks).masks
    return [jnp.where(keep & (leaf > -jnp.inf), jnp.inf, leaf) for keep, leaf in zip(safe, units)]
