"""Masks that live in an optimiser's state, and the three ways to use them: dropped last, around an optimiser, or only remembered.

Every method of this package is a `Masking`: a state to begin with and how it advances with each update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bmjax import trees
from bmjax.prune import kinds, packing
from bmjax.prune.patterns import masked
from bmjax.trace import zeros
from bmjax.types import Params


class SparsifyState(NamedTuple):
    """Masks and what makes the next ones.

    Attributes:
        count: int32 scalar, updates so far.
        masks: tree like the parameters: bool arrays where weights are pruned (or uint8, eight to a word, where packed), a scalar
            True elsewhere.
        keeps: {group name: bool [size] or [stack, size]}; empty for single weights.
        nans: int32 scalar, NaN scores that masks were made from so far. They rank lowest, so they are dropped first.
        cuts: uint32, the latest thresholds, from which the next search starts.
        statistics: what the criterion remembers of all steps.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as optax's states do
    masks: Params
    keeps: dict[str, jax.Array]
    nans: jax.Array
    cuts: jax.Array
    statistics: Any


class AroundState(NamedTuple):
    """State of a wrapped optimiser: that of the optimiser inside, and the pruning's."""

    inner: Any
    pruning: SparsifyState


class Masking(NamedTuple):
    """A method that makes masks.

    Attributes:
        name: for messages.
        init: params -> state before the first update.
        advance: (gradients or updates, state, params) -> the same without those of weights that have just grown, and the state
            after it.
        gradients: True if it must see raw gradients.
    """

    name: str
    init: Callable[[Params], SparsifyState]
    advance: Callable[[Params, SparsifyState, Params], tuple[Params, SparsifyState]]
    gradients: bool


def blank(masks: Params, *, keeps: Any = None, thresholds: int = 0, statistics: Any = (), packed: bool = False) -> SparsifyState:
    """The state before the first update."""
    stored = jax.tree.map(packing.pack, masks) if packed else masks
    zero = jnp.zeros((), jnp.int32)
    return SparsifyState(zero, stored, keeps or {}, zero, jnp.zeros((thresholds,), jnp.uint32), statistics)


def when(due: jax.Array, renew: Callable[[SparsifyState], SparsifyState], state: SparsifyState) -> SparsifyState:
    """`renew(state)` if it is due, else the state.

    A loop of one round or none, and no `cond`: under `vmap` a `cond` turns into a choice between both results, and every model
    would rank its weights at every step, where a loop runs only while one of them is due.
    """
    return when_with_gradients(due, lambda state, _: (renew(state), ()), state, ())[1]


def when_with_gradients(
    due: jax.Array,
    renew: Callable[[SparsifyState, Params], tuple[SparsifyState, Params]],
    state: SparsifyState,
    gradients: Params,
) -> tuple[Params, SparsifyState]:
    """As `when`, with gradients that go through the loop, where `renew` may change them in place.

    They also order things: masks are renewed after the forward pass has read the old ones, and before parameters are updated.
    Without that order the compiler copies masks, and parameters that scores are made of, at every step.

    Returns:
        (gradients, state).
    """

    def body(carry: Any) -> Any:
        going, (masks, keeps, nans, cuts), gradients = carry
        new, gradients = renew(state._replace(masks=masks, keeps=keeps, nans=nans, cuts=cuts), gradients)
        # Always true, which the compiler does not know: what a loop leaves alone it would take out of it.
        gradients = jax.tree.map(lambda g: jnp.where(going, g, 0), gradients)
        return jnp.zeros_like(going), (new.masks, new.keeps, new.nans, new.cuts), gradients

    carried = (due, (state.masks, state.keeps, state.nans, state.cuts), gradients)
    _, (masks, keeps, nans, cuts), gradients = jax.lax.while_loop(lambda carry: carry[0], body, carried)
    return gradients, state._replace(masks=masks, keeps=keeps, nans=nans, cuts=cuts)


def without_fresh(gradients: Params, new: SparsifyState, old: SparsifyState) -> Params:
    """Gradients without those of weights that have just grown: these start with nothing."""
    masks = (packing.unpacked(state.masks, gradients) for state in (new, old))
    return masked(gradients, jax.tree.map(lambda new, old: old | ~new, *masks))


def due(step: jax.Array, begin: int, end: int | None, every: int) -> jax.Array:
    """True at begin, every so many steps after it, and at the end."""
    at = (step >= begin) & ((step - begin) % every == 0)
    return at if end is None else (at & (step <= end)) | (step == end)


def emit(masks: Params, updates: Params, params: Params) -> Params:
    """Kept weights take their update; -param lands the others on zero exactly."""
    return jax.tree.map(lambda mask, u, p: u if mask.ndim == 0 else jnp.where(mask, u, -p), masks, updates, params)


def last(masking: Masking) -> optax.GradientTransformationExtraArgs:
    """The masking as the last transform of a chain.

    Raises:
        ValueError: the masking needs raw gradients.
    """
    if masking.gradients:
        raise ValueError(
            f"{masking.name} needs raw gradients, which the last transform of a chain does not see; "
            "wrap the optimiser: around(optimizer, ...)"
        )

    def update(updates: Params, state: SparsifyState, params: Params = None, **_: Any) -> tuple[Params, SparsifyState]:
        _check_call("sparsify", params, params)
        updates, state = masking.advance(updates, state, params)
        return emit(packing.unpacked(state.masks, params), updates, params), state

    return optax.GradientTransformationExtraArgs(masking.init, update)


def remember(masking: Masking) -> optax.GradientTransformationExtraArgs:
    """The masking as a transform that changes no update: a param view shows the forward pass what its masks keep."""

    def update(updates: Params, state: SparsifyState, params: Params = None, **_: Any) -> tuple[Params, SparsifyState]:
        _check_call("straight_through", params, (updates, params))
        return masking.advance(updates, state, params)

    return optax.GradientTransformationExtraArgs(masking.init, update)


def wrap(optimizer: optax.GradientTransformation, masking: Masking) -> optax.GradientTransformationExtraArgs:
    """The masking around a whole optimiser, which works on kept weights only: see `around`."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        kinds.expect("optimiser", optimizer, optax.GradientTransformation)
    wrapped = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> AroundState:
        return AroundState(wrapped.init(params), masking.init(params))

    def update(gradients: Params, state: AroundState, params: Params = None, **extra: Any) -> tuple[Params, AroundState]:
        _check_call("around", params, (gradients, params))
        gradients, pruning = masking.advance(gradients, state.pruning, params)
        masks = packing.unpacked(pruning.masks, params)
        seen = masked(gradients, masks)
        places = trees.places(state.inner, params, lambda leaf, param: jnp.shape(leaf) == param.shape)  # one number a weight
        step = lambda seen, inner: wrapped.update(seen, inner, params, **extra)
        # Zeroed before the step: where the optimiser makes zeros of zeros, nothing is left to do after it, and the compiler can
        # update parameters and moments in place. Zeroed after it, all moments would be copied at every step.
        updates, inner = step(seen, _zeroed(state.inner, masks, places))
        safe = _kept_zero(step, seen, state.inner, places)
        inner = _zeroed(inner, masks, {path: name for path, name in places.items() if path not in safe})
        return emit(masks, updates, params), AroundState(inner, pruning)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_call(name: str, params: Params | None, seen: Any) -> None:
    """Raises ValueError without parameters, or where devices may hold different ones: then each would make its own masks."""
    if params is None:
        raise ValueError(f"{name} needs the parameters: call update(updates, state, params)")
    for path, leaf in trees.paths(seen).items():
        kind: Any = jax.typeof(leaf)
        varying = kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else getattr(kind, "vma", ())
        if varying:
            raise ValueError(
                f"{name} was given {path}, which differs between the devices along {', '.join(sorted(varying))}, so each would "
                "make its own masks; aggregate gradients first (jax.lax.pmean), and update outside of shard_map"
            )


def _zeroed(inner: Any, masks: Params, places: dict[str, str]) -> Any:
    """An optimiser's state with zeros where weights are dropped."""
    known = trees.paths(masks)

    def zero(path: str, leaf: Any) -> Any:
        mask = known[places[path]] if path in places else None
        return leaf if mask is None or mask.ndim == 0 else jnp.where(mask, leaf, jnp.zeros_like(leaf))

    return trees.map_with_path(zero, inner)


def _kept_zero(step: Callable[..., Any], gradients: Params, inner: Any, places: dict[str, str]) -> set[str]:
    """Paths of an optimiser's state that are zero after a step where they and the gradient were zero before it.

    None outside jit, where there is no program to make faster and reading the step would be done anew each time.
    """
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((gradients, inner))):
        return set()
    names = [*trees.paths(gradients), *(places.get(path) for path in trees.paths(inner))]
    found = zeros.zero_where(lambda gradients, inner: step(gradients, inner)[1], (gradients, inner), names)
    return {path for path, name in zip(trees.paths(inner), found) if path in places and name == places[path]}
