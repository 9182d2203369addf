"""The term of a loss against a teacher's cached outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bmjax.data import RecordLayout
from bmjax.data.teacher_record import BATCH_KEY
from bmjax.losses import schedules
from bmjax.losses.schedules import Schedule
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
    name, parameters = str(getattr(getattr(fn, "func", fn), "__name__", type(fn).__name__)), inspect.signature(fn).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in {*kw} - {*[*parameters][4:]}:
            raise ValueError(f"{name} takes no argument {key!r}; it takes {', '.join([*parameters][4:]) or 'none'}")
    schedules.check(f"the weight of {name}", weight)
    layout.tail_of(temperature)

    def apply(ctx: Context, student: Outputs, teacher: Outputs | None, batch: Batch) -> Mean:
        logits, records = student.logits, batch.get(BATCH_KEY)
        if records is None:
            raise ValueError(
                f"the term {name} reads a teacher's cached outputs, and the batch has none; take the split from "
                "TeacherCache.beside(split)"
            )
        expected = (*logits.shape[:-1], layout.words)
        if logits.shape[-1] != layout.vocabulary or records.shape != expected:
            raise ValueError(
                f"the cached outputs are {list(records.shape)}, of {layout.vocabulary} classes, for logits "
                f"{list(logits.shape)}; {name} needs {list(expected)}, of {logits.shape[-1]}"
            )
        values = fn(logits, *layout.unpack(jnp.asarray(records), temperature), temperature=temperature, **kw)
        if values.shape != logits.shape[:-1]:
            raise ValueError(
                f"{name} returned {list(values.shape)} for logits {list(logits.shape)}; return a value for each item"
            )
        return Mean.of(schedules.at(weight, ctx.step) * values, batch["weights"])

    followed = {"weight": weight} if callable(weight) else {}
    return Term(lambda key, student, teacher: ({}, {}), apply, schedules=followed)
