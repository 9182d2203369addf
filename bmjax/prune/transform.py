"""Pruning as an optax transform: the masks live in the optimiser's state, and no training loop needs a hook."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bmjax import trees
from bmjax.prune.allocation import Allocation, uniform
from bmjax.prune.criteria import Criterion, Seen, magnitude
from bmjax.prune.patterns import Pattern, Sparsity, left_out, masked, unstructured
from bmjax.prune.schedules import Schedule, constant
from bmjax.types import Params


class SparsifyState(NamedTuple):
    """State of `sparsify`.

    Attributes:
        count: int32 scalar, updates so far.
        masks: tree like the parameters: bool arrays where weights are pruned, a scalar True elsewhere.
        keeps: {group name: bool [size] or [stack, size]}; empty for single weights.
        nans: int32 scalar, NaN scores that the latest masks were made from. They rank lowest, so they are dropped first.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as optax's states do
    masks: Params
    keeps: dict[str, jax.Array]
    nans: jax.Array


class AroundState(NamedTuple):
    """State of `around`: that of the optimiser inside, and the pruning's."""

    inner: Any
    pruning: SparsifyState


class _Plan(NamedTuple):
    criterion: Criterion
    sparsity: Sparsity
    pattern: Pattern
    allocation: Allocation
    schedule: Schedule
    every: int
    where: str | None

    def check(self) -> None:
        """Raises ValueError for what cannot work with any parameters."""
        named = self.sparsity if isinstance(self.sparsity, Mapping) else {"": self.sparsity}
        if not named:
            raise ValueError("the sparsity is an empty mapping; expected a fraction, or one for each name")
        for name, value in named.items():
            if not 0.0 <= value < 1.0:
                of = f" of {name!r}" if name else ""
                raise ValueError(f"the sparsity{of} is {value}; expected a fraction to drop, at least 0 and below 1")
        if self.every < 1:
            raise ValueError(f"masks are to be made every {self.every} steps; expected 1 or more")
        if self.pattern.groups:
            self._check_groups(named)
        elif self.allocation.across and isinstance(self.sparsity, Mapping):
            raise ValueError("a global threshold takes one sparsity for all weights; use uniform() for one by name")
        for regex in [*(named if not self.pattern.groups else ()), *([self.where] if self.where is not None else [])]:
            try:
                re.compile(regex)
            except re.error as error:
                raise ValueError(f"{regex!r} is not a regular expression: {error}") from None

    def _check_groups(self, named: Mapping[str, float]) -> None:
        if self.where is not None:
            raise ValueError(
                f"where={self.where!r} is given with the groups pattern, whose members say what is pruned; leave it out"
            )
        if self.allocation.across:
            raise ValueError("a global threshold cannot compare elements of different groups or layers; use uniform()")
        known = [group.name for group in self.pattern.groups]
        unknown = [name for name in named if name and name not in known]
        if unknown:
            raise ValueError(f"a sparsity is given for {unknown[0]!r}; the groups are {', '.join(known)}")


def _plan(
    criterion: Criterion | None,
    sparsity: Sparsity,
    pattern: Pattern | None,
    allocation: Allocation | None,
    schedule: Schedule | None,
    every: int,
    where: str | None,
) -> _Plan:
    choices = (criterion or magnitude(), sparsity, pattern or unstructured(), allocation or uniform(), schedule or constant())
    plan = _Plan(*choices, every, where)
    plan.check()
    return plan


def _init(plan: _Plan, params: Params) -> SparsifyState:
    targets = plan.pattern.targets(params, plan.sparsity, plan.where)
    # Not for its result: it raises now what would otherwise be raised when the first step is traced.
    jax.eval_shape(lambda p: plan.pattern.scores(plan.criterion, Seen(p, p), list(targets)), params)
    choice = plan.pattern.whole(params, list(targets))
    masks = plan.pattern.masks(choice, params)
    keeps = choice if plan.pattern.groups else {}
    return SparsifyState(jnp.zeros((), jnp.int32), masks, keeps, jnp.zeros((), jnp.int32))


def _choice(plan: _Plan, state: SparsifyState, seen: Seen, targets: dict[str, float]) -> tuple[dict[str, jax.Array], jax.Array]:
    """What stays from this step on, and how many scores were NaN."""
    old = state.keeps or {name: trees.paths(state.masks)[name] for name in targets}
    scores = plan.pattern.scores(plan.criterion, seen, list(targets))
    nans = sum(jnp.sum(jnp.isnan(score), dtype=jnp.int32) for score in scores.values())
    # What was dropped ranks below all that was not, so it stays dropped, and a kept zero is not mistaken for it.
    scores = {name: jnp.where(old[name], score, -jnp.inf) for name, score in scores.items()}
    new = plan.allocation.choose(scores, targets, plan.schedule(state.count), bool(plan.pattern.groups))
    return {name: new[name] & old[name] for name in new}, jnp.asarray(nans, jnp.int32)


def _advance(plan: _Plan, incoming: Params, state: SparsifyState, params: Params) -> SparsifyState:
    """The state after this update; new masks if the schedule asks for them now.

    Scores read the weights that the gradients were taken at, not the updated ones: |w g| needs both at one point, and a branch
    that reads the updates would keep the compiler from fusing the optimiser with what follows (5% of a small step).
    """
    begin, end = plan.schedule.begin, plan.schedule.end
    step = state.count
    due = (step >= begin) & (step <= end) & (((step - begin) % plan.every == 0) | (step == end))
    targets = plan.pattern.targets(params, plan.sparsity, plan.where)

    def renew() -> tuple[Params, dict[str, jax.Array], jax.Array]:
        choice, nans = _choice(plan, state, Seen(masked(params, state.masks), incoming), targets)
        return plan.pattern.masks(choice, params), choice if plan.pattern.groups else {}, nans

    masks, keeps, nans = jax.lax.cond(due, renew, lambda: (state.masks, state.keeps, state.nans))
    return SparsifyState(optax.safe_increment(step), masks, keeps, nans)


def _emit(masks: Params, updates: Params, params: Params) -> Params:
    """Kept weights take their update; -param lands the others on zero exactly."""
    return jax.tree.map(lambda mask, u, p: u if mask.ndim == 0 else jnp.where(mask, u, -p), masks, updates, params)


def sparsify(
    criterion: Criterion | None = None,
    *,
    sparsity: Sparsity,
    pattern: Pattern | None = None,
    allocation: Allocation | None = None,
    schedule: Schedule | None = None,
    every: int = 1,
    where: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes while an optimiser trains. It comes last in an optax chain.

    After `optax.apply_updates` a pruned weight is exactly zero and a kept one has taken its update unchanged. Masks are made
    from the weights as they were before the update, where the gradient was taken; a weight that was dropped stays dropped. (A
    weight that is NaN or infinite cannot be brought to zero by adding; the update may be NaN.)

    Args:
        criterion: what a weight is worth; `magnitude()` if none.
        sparsity: fraction to drop, in [0, 1), of each array or group; or {regex or group name: fraction}. The first regex that
            is found in a path counts; what no name is given for stays whole.
        pattern: what is dropped together; `unstructured()` if none.
        allocation: how the sparsity is spread; `uniform()` if none.
        schedule: fraction of the sparsity by step; `constant()` if none. Masks are also made at its end, and never after.
        every: steps from one making of masks to the next.
        where: regex of the parameters to prune. Without one: those called `kernel` with two axes or more, but no embedding,
            norm or head (`patterns.left_out` is the rule); in a tree without kernels all with two axes or more.

    Returns:
        A transform whose state is a `SparsifyState`. If the parameters are {"model": ..., "loss": ...} only the model's are
        pruned, and paths are relative to it.

    Raises:
        ValueError: a value out of range, or at `init` a name, regex, group or score that does not fit the parameters.
    """
    plan = _plan(criterion, sparsity, pattern, allocation, schedule, every, where)

    def update(updates: Params, state: SparsifyState, params: Params = None, **_: Any) -> tuple[Params, SparsifyState]:
        if params is None:
            raise ValueError("sparsify needs the parameters: call update(updates, state, params)")
        state = _advance(plan, updates, state, params)
        return _emit(state.masks, updates, params), state

    return optax.GradientTransformationExtraArgs(lambda params: _init(plan, params), update)


def _zero_dropped(inner: Any, masks: Params, params: Params) -> Any:
    """Zeros every leaf of an optimiser's state that holds one number a weight, where the weight is dropped.

    Such a leaf is known by its place and not by its class: its path ends in the parameter's and it has its shape.
    """
    # Longest path first: "b/kernel" must not take what belongs to "a/b/kernel".
    known = sorted(trees.paths(masks).items(), key=lambda item: -len(item[0]))
    shapes = {path: leaf.shape for path, leaf in trees.paths(params).items()}

    def zeroed(path: str, leaf: Any) -> Any:
        for param_path, mask in known:
            if (path == param_path or path.endswith("/" + param_path)) and jnp.shape(leaf) == shapes[param_path]:
                return leaf if mask.ndim == 0 else jnp.where(mask, leaf, jnp.zeros_like(leaf))
        return leaf

    return trees.map_with_path(zeroed, inner)


def around(
    optimizer: optax.GradientTransformation,
    criterion: Criterion | None = None,
    *,
    sparsity: Sparsity,
    pattern: Pattern | None = None,
    allocation: Allocation | None = None,
    schedule: Schedule | None = None,
    every: int = 1,
    where: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`sparsify` as a wrapper of a whole optimiser, which then works on the kept weights only.

    Beside what `sparsify` does: the optimiser sees gradients that are zero where weights are dropped (so clipping by global
    norm measures kept gradients only), and its state holds zeros there (moments, accumulated gradients, whatever has the
    parameters' shapes). The criterion sees the raw gradients.

    Args:
        optimizer: any optax optimiser: a chain, masked, partition, MultiSteps, inject_hyperparams.
        criterion, sparsity, pattern, allocation, schedule, every, where: as in `sparsify`.

    Raises:
        ValueError: as `sparsify`.
    """
    plan = _plan(criterion, sparsity, pattern, allocation, schedule, every, where)
    wrapped = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> AroundState:
        return AroundState(wrapped.init(params), _init(plan, params))

    def update(gradients: Params, state: AroundState, params: Params = None, **extra: Any) -> tuple[Params, AroundState]:
        if params is None:
            raise ValueError("around needs the parameters: call update(gradients, state, params)")
        seen = masked(gradients, state.pruning.masks)
        updates, inner = wrapped.update(seen, state.inner, params, **extra)
        pruning = _advance(plan, gradients, state.pruning, params)
        inner = _zero_dropped(inner, pruning.masks, params)
        return _emit(pruning.masks, updates, params), AroundState(inner, pruning)

    return optax.GradientTransformationExtraArgs(init, update)


def prunes(opt_state: Any) -> bool:
    """Whether an optimiser's state, real or abstract, holds masks."""
    return bool(_found(opt_state))


def _found(opt_state: Any) -> list[SparsifyState]:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, SparsifyState))
    return [leaf for leaf in leaves if isinstance(leaf, SparsifyState)]


def _states(opt_state: Any) -> list[SparsifyState]:
    found = _found(opt_state)
    if not found:
        raise ValueError("the optimiser's state holds no masks; build the optimiser with sparsify(...) or around(...)")
    return found


def masks(opt_state: Any) -> Params:
    """The masks in an optimiser's state, however deep it is nested.

    Returns:
        A tree like the parameters: bool arrays where weights are pruned, a scalar True elsewhere. If the state holds several
        (`optax.partition`, two `sparsify`), a weight stays where all of them keep it.

    Raises:
        ValueError: the state holds none.
    """

    def absent(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def both(a: Any, b: Any) -> Any:
        return b if absent(a) else a if absent(b) else a & b

    first, *others = [state.masks for state in _states(opt_state)]
    for other in others:
        first = jax.tree.map(both, first, other, is_leaf=absent)
    return first


def keeps(opt_state: Any) -> dict[str, jax.Array]:
    """The elements that stay, {group name: bool [size] or [stack, size]}, from an optimiser's state however deep.

    Raises:
        ValueError: the state holds none, because single weights are pruned or nothing is.
    """
    found: dict[str, jax.Array] = {}
    for state in _states(opt_state):
        for name, keep in state.keeps.items():
            found[name] = found[name] & keep if name in found else keep
    if not found:
        raise ValueError("the optimiser's state holds masks of single weights and no groups; use pattern=groups(...)")
    return found


class Row(NamedTuple):
    """One parameter, or all of them, in a sparsity report.

    Attributes:
        path: of the parameter.
        size: number of weights.
        zeros: how many are zero, pruned or not.
        sparsity: zeros / size.
        note: "pruned", or why it is left out.
    """

    path: str
    size: int
    zeros: int
    sparsity: float
    note: str


class Report(NamedTuple):
    """What `sparsity_report` returns.

    Attributes:
        rows: one for each parameter, in the tree's order.
        total: all parameters together.
        nans: NaN scores that the latest masks were made from; other than 0 it means that training has diverged.
    """

    rows: tuple[Row, ...]
    total: Row
    nans: int


def sparsity_report(params: Params, opt_state: Any) -> Report:
    """How much of each parameter is zero, and which are pruned at all. A mask alone makes nothing smaller or faster.

    Raises:
        ValueError: the state holds no masks.
    """
    found = trees.paths(masks(opt_state))
    rows = []
    for path, leaf in trees.paths(params).items():
        zeros = leaf.size - int(jnp.count_nonzero(leaf))
        pruned = path in found and found[path].ndim > 0
        note = "pruned" if pruned else left_out(path, leaf.ndim) or "not selected"
        rows.append(Row(path, leaf.size, zeros, zeros / max(leaf.size, 1), note))
    size, zeros = sum(row.size for row in rows), sum(row.zeros for row in rows)
    total = Row("total", size, zeros, zeros / max(size, 1), "")
    return Report(tuple(rows), total, sum(int(state.nans) for state in _states(opt_state)))
