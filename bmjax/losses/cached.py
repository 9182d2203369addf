"""The terms of losses against a teacher's cached outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bmjax.data import RecordLayout
from bmjax.data.teacher_record import BATCH_KEY
from bmjax.losses import schedules
from bmjax.losses.heads import head_of, here
from bmjax.losses.schedules import Schedule
from bmjax.losses.tiles import Chunks
from bmjax.types import Batch, Context, Mean, Outputs, Term


def on_cached(
    fn: Callable[..., jax.Array], layout: RecordLayout, weight: float | Schedule = 1.0, temperature: float = 1.0, **kw: Any
) -> Term:
    """The term of a loss on a teacher's cached outputs: `on_cached(distill.cached_kd, cache.layout, temperature=2.0)`.

    The records come with the batch, as `TeacherCache.beside` puts them there, and are unpacked in the step. No teacher runs.

    Args:
        fn: (student logits [..., C], classes [..., k], log-probabilities [..., k], tail [...], temperature=..., **kw) -> values
            [...], one for each item; see `distill.cached_kd`.
        layout: how the records are packed.
        weight: multiplies the values; an optax schedule follows the step.
        temperature: one of `layout.temperatures`; the teacher's side is at it.
        kw: further arguments of `fn`.

    Raises:
        ValueError: an argument that `fn` does not take, a weight that is not finite, a temperature that is not cached; at the
            first use: a batch without records or with others, logits of other classes, or values that are not one for each item.
    """

    def value(student: Outputs, *teacher: jax.Array) -> jax.Array:
        return fn(student.logits, *teacher, temperature=temperature, **kw)

    return _term(fn, value, layout, weight, temperature, kw)


def on_cached_head(
    fn: Callable[..., jax.Array],
    layout: RecordLayout,
    weight: float | Schedule = 1.0,
    temperature: float = 1.0,
    *,
    chunks: Chunks = Chunks(),  # noqa: B008  # a tuple of numbers
    **kw: Any,
) -> Term:
    """`on_cached` of a loss on the student's head: `on_cached_head(distill.on_top_k_head(distill.kd), cache.layout)`.

    Where no other term reads the logits, no array of [batch, time, vocabulary] is left in the step.

    Args:
        fn: (student's head, classes [..., k], log-probabilities [..., k], tail [...], temperature=..., chunks=..., **kw) ->
            values [...]; see `distill.on_top_k_head`.
        layout, weight, temperature, kw: as for `on_cached`.
        chunks: how much of the logits exists on a device at a time; how classes and batch are split, the executor knows.

    Raises:
        ValueError: as `on_cached`; an `fn` without `chunks`; at the first use: a model that gives no head.
    """
    name = _name(fn)
    if "chunks" not in inspect.signature(fn).parameters:
        raise ValueError(f"{name} takes no chunks, so it is no loss on heads; take distill.on_top_k_head of one, or on_cached")

    def value(student: Outputs, *teacher: jax.Array) -> jax.Array:
        return fn(head_of(name, "student", student), *teacher, temperature=temperature, chunks=here(chunks), **kw)

    return _term(fn, value, layout, weight, temperature, kw)


def _name(fn: Callable[..., jax.Array]) -> str:
    return str(getattr(getattr(fn, "func", fn), "__name__", type(fn).__name__))


def _term(
    fn: Callable[..., jax.Array],
    value: Callable[..., jax.Array],
    layout: RecordLayout,
    weight: float | Schedule,
    temperature: float,
    kw: dict[str, Any],
) -> Term:
    """The term of (student's outputs, classes, log-probabilities, tail) -> values, which calls `fn`. Raises as `on_cached`."""
    name, parameters = _name(fn), inspect.signature(fn).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in {*kw} - {*[*parameters][4:]}:
            raise ValueError(f"{name} takes no argument {key!r}; it takes {', '.join([*parameters][4:]) or 'none'}")
    schedules.check(f"the weight of {name}", weight)
    layout.tail_of(temperature)

    def apply(ctx: Context, student: Outputs, teacher: Outputs | None, batch: Batch) -> Mean:
        shape, records = student.logits.shape, batch.get(BATCH_KEY)
        if records is None:
            raise ValueError(
                f"the term {name} reads a teacher's cached outputs, and the batch has none; take the split from "
                "TeacherCache.beside(split)"
            )
        expected = (*shape[:-1], layout.words)
        if shape[-1] != layout.vocabulary or records.shape != expected:
            raise ValueError(
                f"the cached outputs are {list(records.shape)}, of {layout.vocabulary} classes, for logits "
                f"{list(shape)}; {name} needs {list(expected)}, of {shape[-1]}"
            )
        values = value(student, *layout.unpack(jnp.asarray(records), temperature))
        if values.shape != shape[:-1]:
            raise ValueError(f"{name} returned {list(values.shape)} for logits {list(shape)}; return a value for each item")
        return Mean.of(schedules.at(weight, ctx.step) * values, batch["weights"])

    followed = {"weight": weight} if callable(weight) else {}
    return Term(lambda key, student, teacher: ({}, {}), apply, schedules=followed)
