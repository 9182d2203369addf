"""Terms of pure functions on features, between layers that a dict or a map pairs; `makers` says what a function is given."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from bmjax.config import misfit
from bmjax.losses.makers import _across, _Loss, _loss, cleaned, of_targets
from bmjax.losses.schedules import Schedule
from bmjax.types import Batch, Context, Mean, Outputs, Params, Term

# (the student's feature names, the teacher's) -> {student's: teacher's}
LayerMap: TypeAlias = Callable[[tuple[str, ...], tuple[str, ...]], Mapping[str, str]]


def on_features(
    fn: Callable[..., jax.Array],
    layers: Mapping[str, str] | LayerMap,
    project: str | None = None,
    weight: float | Schedule = 1.0,
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
        layers: {the student's feature: the teacher's}, names as in `Model.features`; or a map such as `distill.uniform()`, a
            function of both models' names to these pairs, which is asked once both are known.
        project: "linear": one learned linear map for each pair and token from the student's width to the teacher's, which starts
            as the identity where the widths agree; "auto": only where they differ; None: the features as they are.
        weight: multiplies the sum; an optax schedule follows the step.
        together: `fn` gets the lists of all features at once, in the order of `layers`, as `distill.fsp` needs.
        per_device: as for `on_logits`.
        trained: {argument of fn: (key, student feature, teacher feature) -> its parameters to start with}, for each pair. The
            features are given as abstract shapes, the student's as projected.
        kw: further arguments of `fn`.

    Raises:
        ValueError: no layers, another projection, an argument that `fn` does not take; where a map meets the models: no
            teacher, a model without names, or what the map refuses; at init: no teacher, another number of axes or examples, or
            what `fn` itself refuses, such as another width.
    """
    loss = _loss(fn, weight, kw, ("labels", "weights", "mask"), trained, per_device)
    if loss.alone:
        raise ValueError(f"{loss.name} takes labels in the place of the teacher's features; put them behind both networks'")
    if not layers:
        raise ValueError(f"{loss.name} was given no layers; name them as {{student's: teacher's}}")
    named = isinstance(layers, Mapping) and all(isinstance(name, str) for pair in layers.items() for name in pair)
    if not callable(layers) and not named:
        raise ValueError(f"{loss.name} was given the layers {layers!r}; name them as {{student's: teacher's}}")
    if project not in (None, "linear", "auto"):
        raise ValueError(f"{loss.name}: project is {project!r}; expected 'linear', 'auto' or None")
    if callable(layers):
        options = {"together": together, "per_device": per_device, "trained": trained, **kw}
        return _once_known(loss, layers, lambda pairs: on_features(fn, pairs, project, weight, **options))
    pairs = tuple(layers.items())
    plan = _Layers(pairs, (pairs,) if together else tuple((pair,) for pair in pairs), together)

    def init(key: jax.Array, student: Outputs, teacher: Outputs | None) -> tuple[Params, Any]:
        if teacher is None:
            raise ValueError(f"the term {loss.name} needs a teacher; give the step one, or leave {loss.name} out")
        params = _begin(key, loss.at(jnp.int32(0)), plan, project, trained or {}, student, teacher)
        return params if jax.tree.leaves(params) else {}, {}

    def apply(ctx: Context, student: Outputs, teacher: Outputs, batch: Batch) -> Mean:
        params, parts, current = ctx.params or {"project": {}, "trained": {}}, [], loss.at(ctx.step)
        for index, group in enumerate(plan.groups):
            pair = _features(params, plan, group, student, teacher)
            own = params["trained"].get(str(index), {})
            parts.append(_on_pair(ctx, current, pair, batch, per_device, own))
        return Mean(sum((part.total for part in parts), start=jnp.float32(0)), parts[0].count)

    features = tuple(layers), tuple(dict.fromkeys(layers.values()))
    return checked(Term(init, apply, *features, "weights" in loss.given, schedules=loss.schedules))


def checked(term: Term) -> Term:
    """The term, which looks for its features when it meets the models."""

    def bind(student: Any, teacher: Any) -> Term:
        asked = (("the student", student, term.student_features), ("the teacher", teacher, term.teacher_features))
        for whose, model, wanted in asked:
            known = getattr(model, "features", ())
            if missing := [name for name in wanted if known and name not in known]:
                raise ValueError(f"{whose} has no feature {missing[0]!r}; {nearest(missing[0], known)}")
        return term

    return term._replace(bind=bind)


def _once_known(loss: _Loss, layers: LayerMap, make: Callable[[Mapping[str, str]], Term]) -> Term:
    """The term whose layers a map tells when it meets the models."""

    def bind(student: Any, teacher: Any) -> Term:
        if teacher is None:
            raise ValueError(f"the term {loss.name} needs a teacher; give the step one, or leave {loss.name} out")
        names = feature_names(student, "the student"), feature_names(teacher, "the teacher")
        found = None if misfit(layers, ("the student's names", "the teacher's")) else layers(*names)
        if not isinstance(found, Mapping):
            raise ValueError(
                f"the layers of {loss.name} are no map of (the student's names, the teacher's) to {{student's: teacher's}}, as "
                "distill.uniform() is"
            )
        term = make(found)
        bound: Term = term if term.bind is None else term.bind(student, teacher)
        return bound

    def early(*_: Any) -> Any:
        raise ValueError(f"the layers of {loss.name} are not known yet: take term.bind(student, teacher), as train.Problem does")

    return Term(early, early, relates_examples="weights" in loss.given, schedules=loss.schedules, bind=bind)


def feature_names(model: Any, whose: str) -> tuple[str, ...]:
    """The names that a model can capture. Raises ValueError if it does not say; `whose` is it, in the message."""
    names = tuple(getattr(model, "features", ()))
    if not names:
        raise ValueError(
            f"{whose} does not say which features it has (an adapter does with features=...); name the layers as "
            "{student's: teacher's}"
        )
    return names


def nearest(name: str, names: Sequence[str]) -> str:
    """ "the nearest are ..." of some names, for a message."""
    return f"the nearest are {', '.join(difflib.get_close_matches(name, names, n=4, cutoff=0)) or 'none'}"


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
            if not loss.required - {"weights"}:  # what labels and masks will look like is not known yet
                given = {"weights": jnp.ones(len(jax.tree.leaves(pair)[0]))} if "weights" in loss.required else {}
                jax.eval_shape(lambda pair, begin, given=given: loss.call(*pair, **begin, **given), pair, begin)
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


def _on_pair(ctx: Context, loss: _Loss, pair: tuple[Any, Any], batch: Batch, per_device: bool, own: Params) -> Mean:
    """The loss on one pair of features, or of lists of them, over the batch."""
    weights = batch["weights"]
    by_example = weights.reshape(len(weights), -1)
    if "weights" in loss.given:
        # A padded position is 0 in both networks; an example counts by the mean weight of its positions.
        at = lambda x: weights.reshape(weights.shape + (1,) * (x.ndim - weights.ndim)) > 0
        if weights.ndim > 1:
            _check_items(loss, pair, weights)
        kept = cleaned(pair, weights) if weights.ndim == 1 else jax.tree.map(lambda x: jnp.where(at(x), x, 0), pair)
        return _across(ctx, loss, kept, by_example.mean(-1), batch, per_device, own)
    if "mask" in loss.given:
        # Not by positions: [B, heads, T, T] begins with other axes than the weights, whatever their sizes.
        pair, given = cleaned(pair, by_example.max(-1)), {"mask": weights > 0 if weights.ndim > 1 else None}
        values = of_targets(loss, lambda labels: _one_by_one(loss, pair, {**given, **labels}, own, 1), batch)
        values = jnp.broadcast_to(values.reshape(values.shape + (1,) * (weights.ndim - 1)), weights.shape)
        return Mean.of(loss.weight * values, weights)
    _check_items(loss, pair, weights)
    pair = cleaned(pair, weights)

    def value(labels: dict[str, jax.Array]) -> jax.Array:
        # One label for an example holds for all of its positions.
        further = lambda x: x.reshape(x.shape + (1,) * (weights.ndim - x.ndim))
        wide = lambda x: jnp.broadcast_to(further(x), weights.shape + x.shape[weights.ndim :])
        labels = {name: wide(x) for name, x in labels.items()}
        return _one_by_one(loss, pair, labels, own, weights.ndim)

    values = of_targets(loss, value, batch)
    return Mean.of(loss.weight * values, weights)


def _check_items(loss: _Loss, pair: tuple[Any, Any], weights: jax.Array) -> None:
    """Raises ValueError unless features begin with the axes of the weights."""
    for x in jax.tree.leaves(pair):
        if x.shape[: weights.ndim] != weights.shape:
            raise ValueError(
                f"{loss.name} compares items with the weights {list(weights.shape)}, and a feature is {list(x.shape)}; its first "
                "axes must be those of the weights"
            )


def _one_by_one(loss: _Loss, pair: tuple[Any, Any], given: dict[str, Any], own: Params, axes: int) -> jax.Array:
    """The loss of each item alone, as a batch of 1; items are those of the first `axes` axes."""

    def alone(pair: tuple[Any, Any], given: dict[str, Any]) -> jax.Array:
        pair, given = jax.tree.map(lambda x: x[None], (pair, given))
        return loss.call(*pair, **given, **own)

    for _ in range(axes):
        alone = jax.vmap(alone)
    return alone(pair, given)
