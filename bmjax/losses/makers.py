"""Terms of pure functions on logits and on features, such as those of `bmjax.distill`.

What a function `(student, teacher, ...)` is given beside the two, it says by the names of its arguments:

- `labels`: the batch's targets; as the second argument, of a loss on outputs, it stands in the place of a teacher;
- `weights` [B]: the function relates examples. It sees the global batch at once and returns one number, and an example of weight
  0 must not move it;
- `mask` [B, T], on features: the function relates the positions of an example. It sees the examples one by one, and where the
  batch has a weight for each position, which of them count; None where all do.

What is not finite at weight 0 is 0: a teacher that is NaN on padding reaches no gradient.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.losses import schedules
from bmjax.losses.schedules import Schedule
from bmjax.parallel import collectives
from bmjax.types import Batch, Context, Mean, Outputs, Params, Term

_GIVEN = {"labels", "weights", "mask"}


class _Loss(NamedTuple):
    """A function that a term is made of, called `name`, with the arguments and the weight that the term was given."""

    name: str
    fn: Callable[..., jax.Array]
    weight: Any  # a number, or a schedule
    kw: Mapping[str, Any]
    scheduled: Mapping[str, Schedule]  # those of `kw` that follow the step
    given: frozenset[str]  # which of `labels`, `weights` and `mask` it is to be given
    required: frozenset[str]  # which of them have no default
    alone: bool  # needs no teacher

    def at(self, step: jax.Array) -> _Loss:
        """With the numbers of a step in place of the schedules."""
        numbers = {name: schedules.at(schedule, step) for name, schedule in self.scheduled.items()}
        return self._replace(weight=schedules.at(self.weight, step), kw={**self.kw, **numbers})

    def call(self, *args: Any, **more: Any) -> jax.Array:
        """Raises ValueError if a scheduled argument is one that the function must know before it is compiled, or on no array."""
        try:
            found = self.fn(*args, **self.kw, **more)
        except jax.errors.ConcretizationTypeError:
            if not self.scheduled:
                raise
            raise ValueError(
                f"{self.name} must know {' and '.join(self.scheduled)} before it is compiled; give it a number in place of the "
                "schedule, or schedule the term's weight"
            ) from None
        if not isinstance(found, jax.Array | np.ndarray | np.generic | int | float):
            raise ValueError(f"{self.name} returned {type(found).__name__}; expected an array")
        return jnp.asarray(found)

    @property
    def schedules(self) -> dict[str, Schedule]:
        """All that follows the step, by name."""
        return {**self.scheduled, **({"weight": self.weight} if callable(self.weight) else {})}


def _loss(
    fn: Callable[..., jax.Array],
    weight: float | Schedule,
    kw: Mapping[str, Any],
    gives: Collection[str],
    trained: Mapping[str, Any] | None = None,
    per_device: bool = False,
    further: Collection[str] = (),
) -> _Loss:
    """Raises ValueError on numbers that are not finite, a bad temperature, arguments that the function does not take, and such as
    it takes beside those that a maker `gives`, and `further` ones that it always gives.
    """
    name, signature = str(getattr(getattr(fn, "func", fn), "__name__", type(fn).__name__)), inspect.signature(fn)
    parameters = signature.parameters
    schedules.check(f"the weight of {name}", weight)
    names, fixed = [*parameters], {*kw, *(trained or {})}
    if twice := sorted({*kw} & {*(trained or {})}):
        raise ValueError(f"{name} was given {twice[0]!r} twice, as an argument and in trained; leave one out")
    for key, start in (trained or {}).items():
        if not callable(start):
            raise ValueError(f"{name}: trained has {key!r} as {start!r}; give a function (key, student feature, teacher feature)")
    second = names[1] if len(names) > 1 else ""
    free = [key for key in names[2:] if key not in ("weights", "mask", "labels")]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in fixed - {*names[2:]}:
            raise ValueError(f"{name} takes no argument {key!r}; it takes {', '.join(free) or 'none'}")
    scheduled = schedules.found_in(fn, kw)
    for key, value in kw.items():
        if key in scheduled or isinstance(value, int | float):
            temperature = key == "temperature"
            schedules.check("the distillation temperature" if temperature else f"{key} of {name}", value, positive=temperature)
    bound = {*getattr(fn, "keywords", ())} if isinstance(fn, functools.partial) else set()
    given = _GIVEN & {*names} - fixed - bound
    if missing := sorted(given - {*gives}):
        raise ValueError(f"{name} takes an argument {missing[0]!r}, and here there is none; a loss is given {' or '.join(gives)}")
    if {"weights", "mask"} <= given:
        raise ValueError(f"{name} takes weights and mask; a loss relates examples or the positions of one, so take one of them")
    if per_device and "weights" not in given:
        raise ValueError(f"{name} sees items one by one, and per_device is for losses that relate examples; leave it out")
    try:
        signature.bind(*[None] * (1 if second == "labels" else 2), **dict.fromkeys({*given, *fixed, *further}))
    except TypeError as error:
        raise ValueError(
            f"{name} cannot be called with what student and teacher give: {error}; give arguments by name, those that train as "
            "trained={name: start}"
        ) from None
    required = {key for key in given if parameters[key].default is inspect.Parameter.empty}
    return _Loss(name, fn, weight, kw, scheduled, frozenset(given), frozenset(required), second == "labels")


def on_logits(
    fn: Callable[..., jax.Array],
    weight: float | Schedule = 1.0,
    *,
    per_device: bool = False,
    vocabulary: int | None = None,
    **kw: Any,
) -> Term:
    """The term of a loss on logits, such as `distill.kd`: `on_logits(distill.kd, temperature=2.0)`.

    Args:
        fn: (student logits [..., C], teacher logits [..., C], **kw) -> values [...], one for each item; or, with an argument
            `weights` [...], one number for all. `labels` gets the targets; where the batch was mixed, the value is that of both
            targets, mixed.
        weight: multiplies the values; an optax schedule follows the step.
        per_device: a loss over the whole batch (`dist`) sees only the examples of one shard of `data`; the term is then the mean
            of the shards' losses, weighted by their examples. For the executors that split the batch by hand (replicated, pmap,
            hybrid); where the compiler splits it (partitioned), there is no such shard to see.
        vocabulary: the classes from this one on are left out in both networks, as padding at the end of one of them must be.
        kw: further arguments of `fn`; in place of a number, a schedule: `temperature=optax.linear_schedule(8.0, 1.0, 100)`.

    Raises:
        ValueError: an argument that `fn` does not take, a temperature that is not above 0 or not finite (a schedule's at step 0),
            per_device for an `fn` without `weights`; at the first use: per_device where the compiler splits the batch, no
            teacher, logits of another shape, values of another shape than the items', or a schedule for a
            number that `fn` must know before it is compiled.
    """
    found = _loss(fn, weight, kw, ("labels", "weights"), per_device=per_device)
    relates = "weights" in found.given

    def apply(ctx: Context, student: Outputs, teacher: Outputs | None, batch: Batch) -> Mean:
        loss = found.at(ctx.step)
        weights = batch["weights"]
        logits = cut(loss.name, student.logits, vocabulary)
        pair = cleaned((logits,) if loss.alone else (logits, _teachers(loss.name, logits, teacher, vocabulary)), weights)

        def value(labels: dict[str, jax.Array]) -> jax.Array:
            values = loss.call(*pair, **labels)
            if values.shape != logits.shape[:-1]:
                raise ValueError(
                    f"{loss.name} returned {list(values.shape)} for logits {list(logits.shape)}; return a value for each item, "
                    "or take an argument `weights` and return one number"
                )
            return loss.weight * values

        if relates:
            items = weights.reshape(weights.shape + (1,) * (logits.ndim - 1 - weights.ndim))
            return _across(ctx, loss, pair, jnp.broadcast_to(items, logits.shape[:-1]), batch, per_device)
        return Mean.of(of_targets(loss, value, batch), weights)

    return Term(lambda key, student, teacher: ({}, {}), apply, relates_examples=relates, schedules=found.schedules)


def cleaned(arrays: Any, weights: jax.Array) -> Any:
    """Arrays [B, ...] with 0 for what is NaN or infinite at weight 0: its slope times 0 would be NaN.

    By items where an array begins with the axes of the weights, else by whole examples.
    """

    def one(x: jax.Array) -> jax.Array:
        if len(x) != len(weights):
            return x  # which the loss is to refuse
        at = weights if x.shape[: weights.ndim] == weights.shape else weights.reshape(len(weights), -1).max(axis=1)
        return jnp.where((at > 0).reshape(at.shape + (1,) * (x.ndim - at.ndim)) | jnp.isfinite(x), x, 0)

    return jax.tree.map(one, arrays)


def of_targets(loss: _Loss, value: Callable[[dict[str, jax.Array]], jax.Array], batch: Batch) -> jax.Array:
    """value({"labels": targets}) or, if the loss takes no labels, value({}); where targets were mixed, that of both, mixed."""
    if "labels" not in loss.given:
        return value({})
    values = value({"labels": batch["targets"]})
    if "mix" not in batch:
        return values
    mix = batch["mix"].reshape(batch["mix"].shape + (1,) * (values.ndim - batch["mix"].ndim))
    return mix * values + (1 - mix) * value({"labels": batch["targets_b"]})


def cut(name: str, x: jax.Array, vocabulary: int | None) -> jax.Array:
    """[..., V] without the classes from `vocabulary` on; None leaves all. Raises ValueError if there are fewer classes."""
    if vocabulary is None:
        return x
    if not 0 < vocabulary <= x.shape[-1]:
        raise ValueError(f"{name}: vocabulary is {vocabulary}, and there are {x.shape[-1]} classes; expected 1 to {x.shape[-1]}")
    return x[..., :vocabulary]


def different(name: str, mine: int, theirs: int) -> str:
    """What is wrong with two vocabularies of different size."""
    return (
        f"the student has {mine} classes and the teacher {theirs}; {name} needs the same classes. If the larger one only has "
        f"padding at its end, vocabulary={min(mine, theirs)} leaves that out"
    )


def _teachers(name: str, mine: jax.Array, teacher: Outputs | None, vocabulary: int | None) -> jax.Array:
    """The teacher's logits. Raises ValueError where there are none, or of another shape, which might broadcast in silence."""
    if teacher is None:
        raise ValueError(f"the term {name} needs a teacher; give the step one, or leave {name} out")
    logits = cut(name, teacher.logits, vocabulary)
    theirs = logits.shape
    if mine.shape[-1] != theirs[-1]:
        raise ValueError(different(name, mine.shape[-1], theirs[-1]))
    if mine.shape != theirs:
        raise ValueError(
            f"the student's logits are {list(mine.shape)} and the teacher's {list(theirs)}; {name} needs the same shape"
        )
    return logits


def _across(
    ctx: Context,
    loss: _Loss,
    pair: tuple[Any, ...],
    items: jax.Array,
    batch: Batch,
    per_device: bool,
    own: Params | None = None,
) -> Mean:
    """One number over the global batch, counted once for each unit of weight, as a mean of items would be."""
    labels, weights = {"labels": batch["targets"]} if "labels" in loss.given else {}, batch["weights"]
    if labels and "mix" in batch:
        raise ValueError(f"{loss.name} relates examples by their labels, and each has two mixed ones here; leave mixing out")
    if not per_device:
        pair, items, labels = ctx.all_gather((pair, items, labels))
    elif collectives.split_by_compiler():
        raise ValueError(
            f"{loss.name} has per_device=True, and here the compiler splits the batch, where no device has examples of its own; "
            "take the executor replicated or pmap on a mesh of data alone, or leave per_device out"
        )
    value = loss.call(*pair, weights=items, **labels, **(own or {}))
    if value.shape:
        raise ValueError(f"{loss.name} takes `weights` and returned {list(value.shape)}; it must return one number")
    return Mean.of(jnp.broadcast_to(loss.weight * value, weights.shape), weights)
