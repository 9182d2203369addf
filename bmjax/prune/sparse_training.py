"""Training that is sparse from the start: the number of weights stays, and which they are may change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bmjax import trees
from bmjax.prune import kinds, masking, packing, plan, threshold
from bmjax.prune.allocation import Allocation, Part, erdos_renyi_kernel
from bmjax.prune.criteria import Seen, draw, random
from bmjax.prune.masking import Masking, SparsifyState
from bmjax.prune.patterns import Sparsity
from bmjax.prune.plan import Plan
from bmjax.prune.words import minus, scaled, words
from bmjax.types import Params

_Grow = Callable[[Part, jax.Array, jax.Array], jax.Array]  # (part, its gradient, step) -> scores


def static_sparse(
    optimizer: optax.GradientTransformation,
    *,
    sparsity: Sparsity | None = None,
    allocation: Allocation | None = None,
    masks: Params | None = None,
    where: str | None = None,
    stacked: str | None = None,
    seed: int = 0,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Random masks from the first step on that never change; or given ones, such as those of a lottery ticket.

    Args:
        optimizer: any optax optimiser; as in `around`.
        sparsity, where, stacked, packed: as in `sparsify`.
        allocation: `erdos_renyi_kernel()` if none.
        masks: a tree like the parameters, as `prune.masks` gives it; then the arguments before and `seed` say nothing.
        seed: of the choice of weights.

    Raises:
        ValueError: as `sparsify`, or masks beside a sparsity; at `init` masks that do not fit the parameters.
    """
    if masks is not None:
        if sparsity is not None or allocation is not None:
            raise ValueError("masks are given, and a sparsity or allocation too; leave one of them out")
        return masking.wrap(optimizer, _fixed(masks, packed))
    chosen = _random(sparsity, allocation, where, stacked, seed)
    return masking.wrap(
        optimizer, Masking("static_sparse", lambda params: _start(chosen, params, packed), _still, gradients=True)
    )


def sparse_evolution(
    optimizer: optax.GradientTransformation,
    *,
    sparsity: Sparsity,
    end: int,
    begin: int = 0,
    every: int = 100,
    drop: float = 0.3,
    allocation: Allocation | None = None,
    where: str | None = None,
    stacked: str | None = None,
    seed: int = 0,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """SET: now and then the smallest weights of each array go, and as many grow at random. Mocanu et al. 2018, arXiv 1707.04780.

    Args:
        optimizer: any optax optimiser, which works on kept weights only; as in `around`.
        sparsity, where, stacked, packed: as in `sparsify`.
        end: the last step that may change masks; the drop fraction is 0 there.
        begin, every: the first change is `every` steps after `begin`.
        drop: fraction of an array's weights that go at first, in (0, 1); it falls by a cosine to 0 at `end`.
        allocation: `erdos_renyi_kernel()` if none.
        seed: of the first choice and of what grows.

    Raises:
        ValueError: as `sparsify`, or a value out of range.
    """
    grow = lambda part, gradient, step: draw(seed, f"grow/{part.name}", gradient.shape, step)
    chosen = _random(sparsity, allocation, where, stacked, seed)
    return masking.wrap(optimizer, _evolving("sparse_evolution", chosen, grow, begin, end, every, drop, packed))


def rigl(
    optimizer: optax.GradientTransformation,
    *,
    sparsity: Sparsity,
    end: int,
    begin: int = 0,
    every: int = 100,
    drop: float = 0.3,
    allocation: Allocation | None = None,
    where: str | None = None,
    stacked: str | None = None,
    seed: int = 0,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """RigL: as `sparse_evolution`, but those weights grow whose gradient is largest. Evci et al. 2020, arXiv 1911.11134.

    A weight that grows starts at zero, with moments at zero.

    Args:
        optimizer, sparsity, end, begin, every, drop, allocation, where, stacked, seed, packed: as in `sparse_evolution`.

    Raises:
        ValueError: as `sparse_evolution`.
    """
    grow = lambda part, gradient, step: jnp.abs(gradient)
    chosen = _random(sparsity, allocation, where, stacked, seed)
    return masking.wrap(optimizer, _evolving("rigl", chosen, grow, begin, end, every, drop, packed))


def ac_dc(
    optimizer: optax.GradientTransformation,
    *,
    sparsity: Sparsity,
    phase: int,
    end: int,
    begin: int = 0,
    allocation: Allocation | None = None,
    where: str | None = None,
    stacked: str | None = None,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AC/DC: phases in which only the largest weights live alternate with dense ones. Peste et al. 2021, arXiv 2106.12379.

    Args:
        optimizer: any optax optimiser; as in `around`.
        sparsity, allocation, where, stacked, packed: as in `sparsify`.
        phase: steps of a phase.
        end: from here on the weights are sparse for good.
        begin: steps of dense training before the first sparse phase.

    Raises:
        ValueError: as `sparsify`, or a value out of range.
    """
    for what, value in (("phase", phase), ("begin", begin), ("end", end)):
        kinds.whole(f"{what} of ac_dc, in steps,", value)
    if phase < 1 or not 0 <= begin < end:
        raise ValueError(f"ac_dc is given phase {phase}, begin {begin} and end {end}; expected phase >= 1 and 0 <= begin < end")
    if begin + phase >= end:
        raise ValueError(
            f"ac_dc is given phase {phase}, begin {begin} and end {end}, so no dense phase would come; give a smaller phase"
        )
    chosen = plan.make(sparsity=sparsity, allocation=allocation, where=where, stacked=stacked)

    def init(params: Params) -> SparsifyState:
        found = plan.parts(chosen, params)
        names = set(plan.targets(chosen, found))
        true = jnp.ones((), bool)
        whole = trees.map_with_path(lambda path, leaf: jnp.ones(leaf.shape, bool) if path in names else true, params)
        return masking.blank(whole, thresholds=plan.problems(chosen, found, plan.targets(chosen, found)), packed=packed)

    def advance(gradients: Params, state: SparsifyState, params: Params) -> tuple[Params, SparsifyState]:
        step = state.count
        sparse = ((step - begin) // phase % 2 == 0) | (step >= end)
        turns = (step == end) | ((step >= begin) & (step < end) & ((step - begin) % phase == 0))

        def renew(held: SparsifyState, gradients: Params) -> tuple[SparsifyState, Params]:
            found = plan.parts(chosen, params)
            raw = {path: jnp.abs(leaf) for path, leaf in trees.paths(params).items()}
            raw = {part.name: raw[part.name] for part in found if part.name in plan.targets(chosen, found)}
            choice = plan.choose(chosen, found, raw, jnp.int32(0), None, held.cuts)
            masks = trees.map_with_path(lambda path, _: choice.masks.get(path, jnp.ones((), bool)), params)
            masks = jax.tree.map(lambda mask: mask | ~sparse, masks)
            new = held._replace(masks=_stored(masks, packed), nans=held.nans + choice.nans, cuts=choice.cuts)
            return new, masking.without_fresh(gradients, new, held)

        gradients, state = masking.when_with_gradients(turns, renew, state, gradients)
        return gradients, state._replace(count=optax.safe_increment(step))

    return masking.wrap(optimizer, Masking("ac_dc", init, advance, gradients=True))


def rewind(early: Params, masks: Params) -> Any:
    """A lottery ticket: early weights, zero where the masks drop them. Frankle and Carbin 2019, arXiv 1803.03635.

    Train it on with `static_sparse(optimizer, masks=masks)`.

    Args:
        early: parameters at the start, or some steps after it (Frankle et al. 2020, arXiv 1912.05671).
        masks: a tree like them, as `prune.masks` gives it.

    Raises:
        ValueError: the masks do not fit the parameters.
    """
    _check_masks(masks, early)
    return jax.tree.map(lambda p, mask: jnp.where(mask, p, jnp.zeros((), p.dtype)), early, masks)


def _random(sparsity: Sparsity | None, allocation: Allocation | None, where: str | None, stacked: str | None, seed: int) -> Plan:
    spread = allocation or erdos_renyi_kernel()
    if spread.across or spread.adapt is not None:
        raise ValueError(f"the allocation {spread.name} goes by scores, and random masks have none; take one that goes by shapes")
    return plan.make(random(seed), sparsity=sparsity, allocation=spread, where=where, stacked=stacked)


def _start(chosen: Plan, params: Params, packed: bool) -> SparsifyState:
    found = plan.parts(chosen, params)
    names = [part.name for part in found if part.name in plan.targets(chosen, found)]
    raw = plan.scores(chosen, Seen(params, params), names)
    choice = plan.choose(chosen, found, raw, jnp.int32(0), None, None)
    masks = trees.map_with_path(lambda path, _: choice.masks.get(path, jnp.ones((), bool)), params)
    return masking.blank(masks, packed=packed)


def _fixed(masks: Params, packed: bool) -> Masking:
    def init(params: Params) -> SparsifyState:
        _check_masks(masks, params)
        return masking.blank(jax.tree.map(jnp.asarray, masks), packed=packed)

    return Masking("static_sparse", init, _still, gradients=True)


def _still(gradients: Params, state: SparsifyState, params: Params) -> tuple[Params, SparsifyState]:
    return gradients, state._replace(count=optax.safe_increment(state.count))


def _check_masks(masks: Params, params: Params) -> None:
    have, want = trees.paths(masks), trees.paths(params)
    for path, leaf in want.items():
        if path not in have:
            raise ValueError(f"the masks do not fit the parameters: {path} is missing")
        if np.shape(have[path]) not in ((), tuple(leaf.shape)) or have[path].dtype != bool:
            raise ValueError(
                f"the masks do not fit the parameters: {path} is {have[path].dtype} {list(np.shape(have[path]))}, "
                f"expected bool {list(leaf.shape)}, or a scalar True"
            )


def _stored(masks: Params, packed: bool) -> Any:
    return jax.tree.map(packing.pack, masks) if packed else masks


def _evolving(name: str, chosen: Plan, grow: _Grow, begin: int, end: int, every: int, drop: float, packed: bool) -> Masking:
    kinds.number("the drop fraction", drop)
    for what, value in (("begin", begin), ("end", end), ("every", every)):
        kinds.whole(f"{what} of {name}, a step,", value)
    if every < 1 or not 0 <= begin < end or not 0 < drop < 1:
        raise ValueError(
            f"{name} is given begin {begin}, end {end}, every {every} and drop {drop}; "
            "expected 0 <= begin < end, every >= 1 and drop in (0, 1)"
        )
    if begin + every > end:
        raise ValueError(
            f"{name} is given begin {begin}, end {end} and every {every}, so masks would never change; give a smaller every, or "
            "take static_sparse"
        )

    def advance(gradients: Params, state: SparsifyState, params: Params) -> tuple[Params, SparsifyState]:
        step = state.count
        due = (step > begin) & (step <= end) & ((step - begin) % every == 0)
        fraction = 0.5 * drop * (1 + jnp.cos(math.pi * jnp.clip((step - begin) / (end - begin), 0.0, 1.0)))

        def renew(held: SparsifyState, gradients: Params) -> tuple[SparsifyState, Params]:
            found = [part for part in plan.parts(chosen, params) if part.name in plan.targets(chosen, plan.parts(chosen, params))]
            old = trees.paths(packing.unpacked(held.masks, params))
            weights, slopes = trees.paths(params), trees.paths(gradients)
            scores = [grow(part, slopes[part.name], step) for part in found]
            nans = sum((jnp.sum(jnp.isnan(score), dtype=jnp.int32) for score in scores), start=jnp.int32(0))
            masks, cuts = _exchange(chosen, found, [old[part.name] for part in found], weights, scores, fraction, held.cuts)
            whole = trees.map_with_path(lambda path, _: masks.get(path, jnp.ones((), bool)), params)
            new = held._replace(masks=_stored(whole, packed), nans=held.nans + nans, cuts=cuts)
            return new, masking.without_fresh(gradients, new, held)

        gradients, state = masking.when_with_gradients(due, renew, state, gradients)
        return gradients, state._replace(count=optax.safe_increment(step))

    def init(params: Params) -> SparsifyState:
        found = plan.parts(chosen, params)
        thresholds = 2 * plan.problems(chosen, found, plan.targets(chosen, found))  # of what stays, and of what grows
        return _start(chosen, params, packed)._replace(cuts=jnp.zeros((thresholds,), jnp.uint32))

    return Masking(name, init, advance, gradients=True)


def _exchange(
    chosen: Plan,
    found: Sequence[Part],
    old: Sequence[jax.Array],
    weights: dict[str, jax.Array],
    scores: Sequence[jax.Array],
    fraction: jax.Array,
    near: jax.Array,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """New masks, and their thresholds: a fraction of the smallest weights goes, and as many of the others grow, by score."""
    asked, stacks = plan.targets(chosen, found), [int(bool(part.layers)) for part in found]
    live = [part.units - round(float(share) * part.units) for part in found for share in np.atleast_1d(asked[part.name])]
    moved = scaled(words(live), fraction, 1e-3)  # the cosine is rounded
    held = [jnp.where(mask, jnp.abs(weights[part.name]), -jnp.inf) for part, mask in zip(found, old)]
    kept, first = threshold.rank(held, minus(words(live), moved), stacks=stacks, near=near[: len(live)])
    others = [jnp.where(k, -jnp.inf, s) for k, s in zip(kept, scores)]
    grown, second = threshold.rank(others, moved, stacks=stacks, near=near[len(live) :])
    return {part.name: k | g for part, k, g in zip(found, kept, grown)}, jnp.concatenate([first, second])
