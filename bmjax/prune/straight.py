"""Straight-through masks: weights stay dense, and the forward pass sees zeros."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bmjax import trace
from bmjax.prune import masking, plan
from bmjax.prune.allocation import Allocation
from bmjax.prune.criteria import Criterion
from bmjax.prune.masking import SparsifyState
from bmjax.prune.patterns import Pattern, Sparsity
from bmjax.prune.report import masks
from bmjax.prune.schedules import Schedule, periodic
from bmjax.prune.transform import gradual
from bmjax.types import Params


class StraightThrough(NamedTuple):
    """The two halves of a straight-through method.

    Attributes:
        tx: goes last into the optimiser's chain: it makes masks of the updated weights and changes no update.
        view: (params, opt_state, step) -> what the forward pass sees, and what is exported.
    """

    tx: optax.GradientTransformationExtraArgs
    view: Any


def straight_through(
    criterion: Criterion | None = None,
    *,
    sparsity: Sparsity | None = None,
    pattern: Pattern | Mapping[str, Pattern] | None = None,
    allocation: Allocation | None = None,
    schedule: Schedule | None = None,
    every: int = 10,
    where: str | None = None,
    stacked: str | None = None,
    packed: bool = False,
) -> StraightThrough:
    """Trains dense weights through masks that follow them: what is hidden keeps learning and may come back.

        st = prune.straight_through(sparsity=0.9)
        tx = optax.chain(optax.adamw(1e-3), st.tx)
        loss = trace.where_used(lambda params: model(st.view(params, opt_state), batch))

    Without `trace.where_used` the loss is the same, and the masked weights are a copy of the whole model.

    The gradient of a hidden weight is that of the weight the forward pass saw in its place. Bengio et al. 2013, arXiv 1308.3432;
    with n:m Zhou et al. 2021 (SR-STE, without its decay), arXiv 2102.04010; by magnitude with the top fraction Jayakumar et al.
    2020 (Top-KAST, dense backward pass).

    Args:
        criterion, sparsity, pattern, allocation, where, stacked, packed: as in `sparsify`; the criterion is one of weights.
        schedule: `periodic()` if none. Masks go on following the weights after its end, at its target.
        every: steps from one making of masks to the next. Every step has the masks of its own weights at 1; at 10 they cost less
            and lag behind.

    Raises:
        ValueError: as `sparsify`; a criterion of gradients, which are those of the weights before the update.
    """
    if criterion is not None and criterion.gradients:
        raise ValueError(
            f"straight_through ranks weights after their update, and {criterion.name} ranks them by gradients; take magnitude(), "
            "random() or given(...)"
        )
    chosen = plan.make(
        criterion,
        sparsity=sparsity,
        pattern=pattern,
        allocation=allocation,
        schedule=schedule or periodic(),
        every=every,
        where=where,
        stacked=stacked,
    )

    return StraightThrough(masking.remember(gradual(chosen, packed=packed, free=True)), through_masks)


def through_masks(params: Params, opt_state: Any, step: Any = None) -> Any:
    """The view of `straight_through`, which needs nothing but the masks in the optimiser's state: the parameters, zero where
    they are hidden.

    Raises:
        ValueError: another transform with a state follows in the chain, so that the masks are not of updated weights.
    """
    chains = jax.tree.leaves(opt_state, is_leaf=_holds_masks)
    for parts in filter(_holds_masks, chains):
        after = itertools.dropwhile(lambda part: not isinstance(part, SparsifyState), parts)
        if jax.tree.leaves(list(after)[1:]):
            raise ValueError("straight_through's tx is followed by another transform; put it last: optax.chain(optimiser, st.tx)")
    return jax.tree.map(lambda p, mask: p if mask.ndim == 0 else _shown(p, mask), params, masks(opt_state, params))


def _holds_masks(node: Any) -> bool:
    """Whether it is the state of a chain with masks in it."""
    return type(node) is tuple and any(isinstance(part, SparsifyState) for part in node)


@jax.custom_jvp
def _masked(p: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, p, jnp.zeros((), p.dtype))


@_masked.defjvp
def _masked_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]) -> tuple[jax.Array, jax.Array]:
    return _masked(*primals), tangents[0]


_shown = trace.late(_masked)
