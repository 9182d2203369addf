"""Terms of losses that are fused with the models' last layer: `Outputs.head` in place of logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import jax

from bmjax.losses.makers import _Loss, _loss, cut, different, of_targets
from bmjax.losses.schedules import Schedule
from bmjax.losses.tiles import Chunks, Head
from bmjax.parallel import collectives
from bmjax.types import Batch, Context, Mean, Outputs, Term


def on_head(
    fn: Callable[..., jax.Array],
    weight: float | Schedule = 1.0,
    *,
    vocabulary: int | None = None,
    chunks: Chunks = Chunks(),  # noqa: B008  # a tuple of numbers
    **kw: Any,
) -> Term:
    """The term of a loss on heads: `on_head(distill.vocabulary.kd, temperature=2.0)`, `on_head(losses.head_cross_entropy)`.

    Where no other term reads the logits, the compiler drops them: no array of [batch, time, vocabulary] is left in the step.

    Args:
        fn: (student's head, teacher's head, chunks=..., **kw) -> values [...], one for each item. `labels` gets the
            targets, as the second argument in place of a teacher; where the batch was mixed, the value is that of both targets,
            mixed.
        weight: multiplies the values; an optax schedule follows the step.
        vocabulary: the classes from this one on are left out in both networks, as padding at the end of one of them must be.
        chunks: how much of the logits exists on a device at a time; how classes and batch are split, the executor knows.
        kw: further arguments of `fn`, or schedules in place of numbers, as for `on_logits`.

    Raises:
        ValueError: an `fn` without `chunks`, an argument that it does not take, a temperature that is not above 0 or not finite;
            at the first use: no teacher, a model that gives no head, vocabularies that differ, values of another shape than the
            items'.
    """
    if "chunks" not in inspect.signature(fn).parameters:
        name = getattr(fn, "__name__", fn)
        raise ValueError(f"{name} takes no chunks, so is none on heads; take one such as distill.vocabulary.kd, or on_logits")
    found = _loss(fn, weight, kw, ("labels",), further=("chunks",))

    def apply(ctx: Context, student: Outputs, teacher: Outputs | None, batch: Batch) -> Mean:
        loss = found.at(ctx.step)
        heads = _heads(loss, student, teacher, vocabulary)
        items, scale = heads[0].hidden.shape[:-1], cast(jax.Array, loss.weight)

        def value(labels: dict[str, jax.Array]) -> jax.Array:
            values = loss.call(*heads, **labels, chunks=here(chunks))
            if values.shape != items:
                raise ValueError(f"{loss.name} returned {list(values.shape)} for items {list(items)}; return a value for each")
            return scale * values

        return Mean.of(of_targets(loss, value, batch), batch["weights"])

    return Term(lambda key, student, teacher: ({}, {}), apply, schedules=found.schedules)


def here(chunks: Chunks) -> Chunks:
    """One device's chunks as those of all devices among which the compiler splits what is seen here."""
    rows, parts = collectives.automatic()
    return Chunks(chunks.tokens * rows, chunks.classes * parts, parts)


def head_of(name: str, whose: str, outputs: Outputs) -> Head:
    """The head. Raises ValueError if the model gives none."""
    if outputs.head is None:
        raise ValueError(
            f"{name} works on heads, and the {whose} gives none; fill Outputs.head with (hidden, kernel, bias), or take a term "
            "on logits"
        )
    return Head(*outputs.head)


def _heads(loss: _Loss, student: Outputs, teacher: Outputs | None, vocabulary: int | None) -> list[Head]:
    """The heads that a loss compares, cut to the vocabulary. Raises ValueError where there are none, or they do not fit."""
    heads = [head_of(loss.name, "student", student)]
    if not loss.alone:
        if teacher is None:
            raise ValueError(f"the term {loss.name} needs a teacher; give the step one, or leave {loss.name} out")
        heads.append(head_of(loss.name, "teacher", teacher))
    heads = [_cut(loss.name, head, vocabulary) for head in heads]
    classes = [head.kernel.shape[1] for head in heads]
    if len({*classes}) > 1:
        raise ValueError(different(loss.name, *classes))
    return heads


def _cut(name: str, head: Head, vocabulary: int | None) -> Head:
    kernel, bias = cut(name, head.kernel, vocabulary), head.bias
    return Head(head.hidden, kernel, None if bias is None else cut(name, bias, vocabulary))
