"""Terms of pure functions on logits and on features, such as those of `bmjax.distill`.

What a function `(student, teacher, ...)` is given beside the two, it says by the names of its arguments:

- `labels`: the batch's targets; as the second argument it stands in the place of a teacher;
- `weights` [B]: the function relates examples. It sees the global batch at once and returns one number, and an example of weight
  0 must not move it;
- `mask` [B, T]: the function relates the positions of an example. It sees the examples one by one, and where the batch has a
  weight for each position, which of them count.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bmjax.types import Batch, Context, Mean, Outputs, Params, Term


class _Loss(NamedTuple):
    """A function that a term is made of: its name, and which of `labels`, `weights` and `mask` it is to be given."""

    name: str
    call: Callable[..., jax.Array]
    given: frozenset[str]
    alone: bool  # needs no teacher


def _loss(fn: Callable[..., jax.Array], weight: float, kw: Mapping[str, Any], trained: Mapping[str, Any]) -> _Loss:
    """Raises ValueError on a weight that is not finite, arguments that the function does not take, and a bad temperature."""
    name, parameters = str(getattr(getattr(fn, "func", fn), "__name__", type(fn).__name__)), inspect.signature(fn).parameters
    if not math.isfinite(weight):
        raise ValueError(f"the weight of {name} is {weight}; expected a finite number")
    names, fixed = [*parameters], {*kw, *trained}
    second = names[1] if len(names) > 1 else ""
    free = [key for key in names[2:] if key not in ("weights", "mask", "labels")]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in fixed - {*names[2:]}:
            raise ValueError(f"{name} takes no argument {key!r}; it takes {', '.join(free) or 'none'}")
    temperature = kw.get("temperature", 1.0)
    if isinstance(temperature, int | float) and not 0 < temperature < math.inf:
        raise ValueError(f"the distillation temperature is {temperature}; expected a number above 0")
    given = {"labels", "weights", "mask"} & {*names} - fixed
    return _Loss(name, lambda *args, **more: fn(*args, **kw, **more), frozenset(given), second == "labels")


def on_logits(fn: Callable[..., jax.Array], weight: float = 1.0, *, per_device: bool = False, **kw: Any) -> Term:
    """The term of a loss on logits, such as `distill.kd`: `on_logits(distill.kd, temperature=2.0)`.

    Args:
        fn: (student logits [..., C], teacher logits [..., C], **kw) -> values [...], one for each item; or, with an argument
            `weights` [...], one number for all. `labels` gets the targets; where the batch was mixed, the value is that of both
            targets, mixed.
        weight: multiplies the values.
        per_device: a loss over the whole batch (`dist`) sees one device's examples only, where an executor splits the batch by
            hand; the term is then the mean of the devices' losses, weighted by their examples.
        kw: further arguments of `fn`.

    Raises:
        ValueError: an argument that `fn` does not take, a temperature that is not above 0 or not finite; at the first use: no
            teacher, logits of another shape, or values of another shape than the items'.
    """
    loss = _loss(fn, weight, kw, {})
    relates = "weights" in loss.given

    def apply(ctx: Context, student: Outputs, teacher: Outputs | None, batch: Batch) -> Mean:
        logits, weights = student.logits, batch["weights"]
        pair = (logits,) if loss.alone else (logits, _teachers(loss.name, logits, teacher))

        def value(targets: jax.Array) -> jax.Array:
            values = loss.call(*pair, **({"labels": targets} if "labels" in loss.given else {}))
            if values.shape != logits.shape[:-1]:
                raise ValueError(
                    f"{loss.name} returned {list(values.shape)} for logits {list(logits.shape)}; return a value for each item, "
                    "or take an argument `weights` and return one number"
                )
            return weight * values

        if relates:
            items = weights.reshape(weights.shape + (1,) * (logits.ndim - 1 - weights.ndim))
            return _across(ctx, loss, pair, jnp.broadcast_to(items, logits.shape[:-1]), weights, weight, per_device)
        if "labels" not in loss.given or "mix" not in batch:
            return Mean.of(value(batch["targets"]), weights)
        mix = batch["mix"].reshape(batch["mix"].shape + (1,) * (logits.ndim - 1 - batch["mix"].ndim))
        return Mean.of(mix * value(batch["targets"]) + (1 - mix) * value(batch["targets_b"]), weights)

    return Term(lambda key, student, teacher: ({}, {}), apply, relates_examples=relates)


def _teachers(name: str, mine: jax.Array, teacher: Outputs | None) -> jax.Array:
    """The teacher's logits. Raises ValueError where there are none, or of another shape, which might broadcast in silence."""
    if teacher is None:
        raise ValueError(f"the term {name} needs a teacher; give the step one, or leave {name} out")
    theirs = teacher.logits.shape
    if mine.shape[-1] != theirs[-1]:
        raise ValueError(f"the student has {mine.shape[-1]} classes and the teacher {theirs[-1]}; {name} needs the same classes")
    if mine.shape != theirs:
        raise ValueError(
            f"the student's logits are {list(mine.shape)} and the teacher's {list(theirs)}; {name} needs the same shape"
        )
    return teacher.logits


def _across(
    ctx: Context,
    loss: _Loss,
    pair: tuple[Any, ...],
    items: jax.Array,
    weights: jax.Array,
    weight: float,
    per_device: bool,
    own: Params | None = None,
) -> Mean:
    """One number over the global batch, counted once for each unit of weight, as a mean of items would be."""
    if not per_device:
        pair, items = ctx.all_gather((pair, items))
    value = loss.call(*pair, weights=items, **(own or {}))
    if value.shape:
        raise ValueError(f"{loss.name} takes `weights` and returned {list(value.shape)}; it must return one number")
    return Mean.of(jnp.broadcast_to(weight * value, weights.shape), weights)


def on_features(
    fn: Callable[..., jax.Array],
    layers: Mapping[str, str],
    project: str | None = None,
    weight: float = 1.0,
    *,
    together: bool = False,
    per_device: bool = False,
    trained: Mapping[str, Callable[[jax.Array, Any, Any], Params]] | None = None,
    **kw: Any,
) -> Term:
    """The term of a loss on features: `on_features(distill.hint, {"layers/1": "layers/5"}, project="linear")`.

    Its value is the sum over the pairs of layers. The projections and what else is trained are the term's own parameters: they
    train in the same step, and are in no export.

    Args:
        fn: (student feature [B, ...], teacher feature [B, ...], **kw) -> one number, the mean over the examples. Without an
            argument `weights` or `mask` it is called for each item alone, with a batch of 1: for each example, or, where the
            batch has weights [B, T], for each position.
        layers: {the student's feature: the teacher's}, names as in `Model.features`.
        project: "linear": one learned linear map for each pair and token from the student's width to the teacher's, which starts
            as the identity where the widths agree; "auto": only where they differ; None: the features as they are.
        weight: multiplies the sum.
        together: `fn` gets the lists of all features at once, in the order of `layers`, as `distill.fsp` needs.
        per_device: as for `on_logits`.
        trained: {argument of fn: (key, student feature, teacher feature) -> its parameters to start with}, for each pair. The
            features are given as abstract shapes, the student's as projected.
        kw: further arguments of `fn`.

    Raises:
        ValueError: no layers, another projection, an argument that `fn` does not take; at init: no teacher, another number of
            axes or examples, or what `fn` itself refuses, such as another width.
    """
    loss = _loss(fn, weight, kw, trained or {})
    if not layers:
        raise ValueError(f"{loss.name} was given no layers; name them as {{student's: teacher's}}")
    if project not in (None, "linear", "auto"):
        raise ValueError(f"{loss.name}: project is {project!r}; expected 'linear', 'auto' or None")
    pairs = tuple(layers.items())
    plan = _Layers(pairs, (pairs,) if together else tuple((pair,) for pair in pairs), together)

    def init(key: jax.Array, student: Outputs, teacher: Outputs | None) -> tuple[Params, Any]:
        if teacher is None:
            raise ValueError(f"the term {loss.name} needs a teacher; give the step one, or leave {loss.name} out")
        params = _begin(key, loss, plan, project, trained or {}, student, teacher)
        return params if jax.tree.leaves(params) else {}, {}

    def apply(ctx: Context, student: Outputs, teacher: Outputs, batch: Batch) -> Mean:
        params, parts = ctx.params or {"project": {}, "trained": {}}, []
        for index, group in enumerate(plan.groups):
            pair = _features(params, plan, group, student, teacher)
            own = params["trained"].get(str(index), {})
            parts.append(_on_pair(ctx, loss, pair, batch["weights"], weight, per_device, own))
        return Mean(sum((part.total for part in parts), start=jnp.float32(0)), parts[0].count)

    return Term(init, apply, tuple(layers), tuple(dict.fromkeys(layers.values())), "weights" in loss.given)


class _Layers(NamedTuple):
    """Pairs of layers (student's, teacher's), and the groups of them that a loss compares at once."""

    pairs: tuple[tuple[str, str], ...]
    groups: tuple[tuple[tuple[str, str], ...], ...]
    together: bool


def _begin(
    key: jax.Array,
    loss: _Loss,
    plan: _Layers,
    project: str | None,
    trained: Mapping[str, Callable[..., Params]],
    student: Outputs,
    teacher: Outputs,
) -> Params:
    """{"project": {index of the pair: ...}, "trained": {index of the group: ...}}; raises what the loss says to the shapes."""
    params: dict[str, Any] = {"project": {}, "trained": {}}
    for index, (mine, theirs) in enumerate(plan.pairs):
        s, t = student.features[mine].shape, teacher.features[theirs].shape
        if project == "linear" or (project == "auto" and s[-1] != t[-1]):
            params["project"][str(index)] = _projection(jax.random.fold_in(key, index), s[-1], t[-1])
    for index, group in enumerate(plan.groups):
        features = functools.partial(_features, plan=plan, group=group)
        pair = jax.eval_shape(lambda p, s, t, features=features: features(p, student=s, teacher=t), params, student, teacher)
        own_key = jax.random.fold_in(key, len(plan.pairs) + index)
        try:
            begin = {name: make(own_key, *pair) for name, make in trained.items()}
            jax.eval_shape(lambda pair, begin: loss.call(*pair, **begin), pair, begin)
        except ValueError as error:
            names = ", ".join(f"{mine} -> {theirs}" for mine, theirs in group)
            raise ValueError(f"{error} ({names})") from None
        params["trained"][str(index)] = begin
    return params


def _projection(key: jax.Array, width: int, target: int) -> Params:
    kernel = jnp.eye(width) if width == target else jax.nn.initializers.lecun_normal()(key, (width, target))
    return {"kernel": kernel, "bias": jnp.zeros(target)}


def _features(
    params: Params, plan: _Layers, group: tuple[tuple[str, str], ...], student: Outputs, teacher: Outputs
) -> tuple[Any, Any]:
    """The features of a group of layers, the student's projected; lists of them if they go together."""
    mine, theirs = [], []
    for names in group:
        s, t = student.features[names[0]], teacher.features[names[1]]
        if (own := params["project"].get(str(plan.pairs.index(names)))) is not None:
            s = s @ own["kernel"] + own["bias"]
        mine.append(s)
        theirs.append(t)
    return (mine, theirs) if plan.together else (mine[0], theirs[0])


def _on_pair(
    ctx: Context, loss: _Loss, pair: tuple[Any, Any], weights: jax.Array, weight: float, per_device: bool, own: Params
) -> Mean:
    """The loss on one pair of features, or of lists of them, over the batch."""
    if "weights" in loss.given:
        # A padded position is 0 in both networks; an example counts by the mean weight of its positions.
        at = lambda x: weights.reshape(weights.shape + (1,) * (x.ndim - weights.ndim)) > 0
        kept = pair if weights.ndim == 1 else jax.tree.map(lambda x: jnp.where(at(x), x, 0), pair)
        items = weights.reshape(len(weights), -1).mean(-1)
        return _across(ctx, loss, kept, items, weights, weight, per_device, own)
    if "mask" in loss.given:
        masks = {"mask": weights > 0} if weights.ndim > 1 else {}

        def alone(pair: tuple[Any, Any], masks: dict[str, jax.Array]) -> jax.Array:
            pair, masks = jax.tree.map(lambda x: x[None], (pair, masks))
            return loss.call(*pair, **masks, **own)

        values = jax.vmap(alone)(pair, masks)
        values = jnp.broadcast_to(values.reshape(values.shape + (1,) * (weights.ndim - 1)), weights.shape)
        return Mean.of(weight * values, weights)
    for x in jax.tree.leaves(pair):
        if x.shape[: weights.ndim] != weights.shape:
            raise ValueError(
                f"{loss.name} compares items with the weights {list(weights.shape)}, and a feature is {list(x.shape)}; its first "
                "axes must be those of the weights"
            )
    item = lambda pair: loss.call(*jax.tree.map(lambda x: x[None], pair), **own)
    for _ in range(weights.ndim):
        item = jax.vmap(item)
    return Mean.of(weight * item(pair), weights)
