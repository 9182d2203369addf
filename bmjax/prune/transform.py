"""Pruning as an optax transform: the masks live in the optimiser's state, and no training loop needs a hook."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bmjax import trees
from bmjax.prune import masking, packing, plan
from bmjax.prune.allocation import Allocation, Part, Targets
from bmjax.prune.criteria import Criterion, Seen
from bmjax.prune.masking import Masking, SparsifyState
from bmjax.prune.patterns import Pattern, Sparsity, masked
from bmjax.prune.plan import Choice, Plan
from bmjax.prune.schedules import Schedule
from bmjax.trace import keep
from bmjax.types import Params


def gradual(chosen: Plan, *, packed: bool = False, free: bool = False) -> Masking:
    """The masking of a plan.

    Args:
        chosen: from `plan.make`.
        packed: keep masks at one bit a weight.
        free: masks may bring weights back, since nothing is really dropped.
    """

    def init(params: Params) -> SparsifyState:
        found = plan.parts(chosen, params)
        asked = plan.targets(chosen, found)
        pruned = [part for part in found if part.name in asked]
        if not free and not chosen.groups:
            _check_zeros(chosen, pruned, asked, params)
        statistics = chosen.criterion.init(params)
        # Not for its result: it raises now what would otherwise be raised when the first step is traced.
        jax.eval_shape(lambda p: plan.scores(chosen, Seen(p, p, statistics), [part.name for part in pruned]), params)
        keeps = {}
        if chosen.groups:
            keeps = {part.name: jnp.ones(keep.shape(chosen.groups[part.name]), bool) for part in pruned}
        whole = {part.name: jnp.ones(trees.paths(params)[part.name].shape, bool) for part in pruned if not chosen.groups}
        masks = _masks(chosen, Choice(whole, keeps, jnp.zeros(0), jnp.int32(0)), params)
        count = plan.problems(chosen, found, asked)
        return masking.blank(masks, keeps=keeps, thresholds=count, statistics=statistics, packed=packed)

    def advance(incoming: Params, state: SparsifyState, params: Params) -> tuple[Params, SparsifyState]:
        # Scores read the weights that the gradients were taken at, not the updated ones: |w g| needs both at one point, and a
        # branch that reads the updates would keep the compiler from fusing the optimiser with what follows. Free masks are made
        # of the updated weights, which the next forward pass shows, and which the caller computes as well, outside of the loop.
        updated = optax.apply_updates(params, incoming) if free else params

        def seen(state: SparsifyState) -> Seen:
            weights = updated if free else masked(params, packing.unpacked(state.masks, params))
            return Seen(weights, incoming, state.statistics)

        state = state._replace(statistics=chosen.criterion.observe(seen(state)))
        schedule = chosen.schedule
        now = masking.due(state.count, schedule.begin, schedule.end, chosen.every)
        if free:  # weights that are still there are followed for ever
            now |= masking.due(state.count, schedule.begin, None, chosen.every)
        state = masking.when(now, lambda held: _renewed(chosen, held, seen(held), params, packed, free), state)
        return incoming, state._replace(count=optax.safe_increment(state.count))

    return Masking(chosen.criterion.name, init, advance, chosen.criterion.gradients)


def _check_zeros(chosen: Plan, pruned: list[Part], asked: Targets, params: Params) -> None:
    """Raises ValueError for weights that are sparser than they are to become: those dropped earlier would come back."""
    leaves = trees.paths(params)
    if any(isinstance(leaves[part.name], (jax.core.Tracer, jax.ShapeDtypeStruct)) for part in pruned):
        return  # there are no numbers to look at
    with jax.ensure_compile_time_eval():  # `init` may be traced and close over numbers
        shares = {part.name: 1 - int(jnp.count_nonzero(leaves[part.name])) / leaves[part.name].size for part in pruned}
    if chosen.allocation.across:
        sizes = [leaves[name].size for name in shares]
        shares = {"all weights together": sum(s * n for s, n in zip(shares.values(), sizes)) / sum(sizes)}
        asked = {"all weights together": asked[pruned[0].name]}
    for name, share in shares.items():
        target = float(np.mean(asked[name]))
        if target + 1e-6 < share < 1:  # an array of nothing but zeros was only initialised so
            raise ValueError(
                f"{name}: {share:.4g} of the weights are zero already, and the target is {target:g}, so weights dropped earlier "
                "would come back; ask for more, or keep them with static_sparse(optimizer, masks=...)"
            )


def _renewed(chosen: Plan, state: SparsifyState, seen: Seen, params: Params, packed: bool, free: bool) -> SparsifyState:
    found = plan.parts(chosen, params)
    asked = plan.targets(chosen, found)
    pruned = [part for part in found if part.name in asked]
    before = trees.paths(packing.unpacked(state.masks, params))
    old = None if free else state.keeps or {part.name: before[part.name] for part in pruned}
    raw = plan.scores(chosen, seen, [part.name for part in pruned])
    choice = plan.choose(chosen, found, raw, state.count, old, state.cuts)
    masks = _masks(chosen, choice, params)
    stored = jax.tree.map(packing.pack, masks) if packed else masks
    return state._replace(masks=stored, keeps=choice.keeps, nans=state.nans + choice.nans, cuts=choice.cuts)


def _masks(chosen: Plan, choice: Choice, params: Params) -> Params:
    """The choice as a tree like the parameters, a scalar True for one that takes no part."""
    true = jnp.ones((), bool)
    if not chosen.groups:
        return trees.map_with_path(lambda path, _: choice.masks.get(path, true), params)
    touched = {member.path for name in choice.keeps for member in chosen.groups[name].members}
    full = keep.masks(list(chosen.groups.values()), choice.keeps, params)
    return trees.map_with_path(lambda path, mask: mask if path in touched else true, full)


def sparsify(
    criterion: Criterion | None = None,
    *,
    sparsity: Sparsity | None = None,
    pattern: Pattern | Mapping[str, Pattern] | None = None,
    allocation: Allocation | None = None,
    schedule: Schedule | None = None,
    every: int = 1,
    where: str | None = None,
    stacked: str | None = None,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Prunes while an optimiser trains. It comes last in an optax chain.

    After `optax.apply_updates` a pruned weight is exactly zero and a kept one has taken its update unchanged. Masks are made
    from the weights as they were before the update, where the gradient was taken; a weight that was dropped stays dropped. (A
    weight that is NaN or infinite cannot be brought to zero by adding; the update may be NaN.)

    Args:
        criterion: what a weight is worth; `magnitude()` if none.
        sparsity: fraction to drop, in [0, 1), of each array or group; or {regex or group name: fraction}. The first regex that
            is found in a path counts; what no name is given for stays whole. None where the pattern or the allocation says it.
        pattern: what is dropped together, or {path regex: pattern}; `unstructured()` if none.
        allocation: how the sparsity is spread; `uniform()` if none.
        schedule: how much of the sparsity by step; `constant()` if none. Masks are also made at its end, and never after.
        every: steps from one making of masks to the next.
        where: regex of the parameters to prune. Without one: those called `kernel` with two axes or more, but no embedding,
            norm or head (`patterns.left_out` is the rule); in a tree without kernels all with two axes or more.
        stacked: regex of the parameters of scanned layers, whose first axis is the layer: each layer is an array of its own.
            Without one an array is ranked as a whole.
        packed: keep masks at one bit a weight instead of a byte. The same results; see `packing`.

    Returns:
        A transform whose state is a `SparsifyState`.

    Raises:
        ValueError: a value out of range, a criterion that needs gradients, or at `init` a name, regex, group, pattern or score
            that does not fit the parameters, or a target below the share of weights that are zero already.
    """
    chosen = plan.make(
        criterion,
        sparsity=sparsity,
        pattern=pattern,
        allocation=allocation,
        schedule=schedule,
        every=every,
        where=where,
        stacked=stacked,
    )
    return masking.last(gradual(chosen, packed=packed))


def around(
    optimizer: optax.GradientTransformation,
    criterion: Criterion | None = None,
    *,
    sparsity: Sparsity | None = None,
    pattern: Pattern | Mapping[str, Pattern] | None = None,
    allocation: Allocation | None = None,
    schedule: Schedule | None = None,
    every: int = 1,
    where: str | None = None,
    stacked: str | None = None,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`sparsify` as a wrapper of a whole optimiser, which then works on the kept weights only.

    Beside what `sparsify` does: the optimiser sees gradients that are zero where weights are dropped (so clipping by global
    norm measures kept gradients only), and its state holds zeros there (moments, accumulated gradients, whatever has the
    parameters' shapes). The criterion sees the raw gradients.

    Args:
        optimizer: any optax optimiser: a chain, masked, partition, MultiSteps, inject_hyperparams.
        criterion, sparsity, pattern, allocation, schedule, every, where, stacked, packed: as in `sparsify`.

    Raises:
        ValueError: as `sparsify`, but for criteria that need gradients.
    """
    chosen = plan.make(
        criterion,
        sparsity=sparsity,
        pattern=pattern,
        allocation=allocation,
        schedule=schedule,
        every=every,
        where=where,
        stacked=stacked,
    )
    return masking.wrap(optimizer, gradual(chosen, packed=packed))
