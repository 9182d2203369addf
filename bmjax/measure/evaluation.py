"""Scoring a model on batches: a classifier item by item, a language model sequence by sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bmjax.measure.metrics import Tally, add, summary, tally
from bmjax.measure.tokens import TokenEvaluation, gather_tokens, tally_tokens
from bmjax.types import Batch

KINDS = ("classes", "tokens")
CONFUSION = 1024  # most classes of [B, T] targets that are counted as classes where no kind is given: the matrix is their square


class Evaluation(NamedTuple):
    """The result of `evaluate` for a classifier: the figures, and item by item in the order of the ids, so that two models pair.

    Attributes:
        summary: see `summary`.
        predictions, targets, ids: int [n]; n counts examples, or tokens for logits [B, T, classes].
    """

    summary: dict[str, Any]
    predictions: np.ndarray
    targets: np.ndarray
    ids: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Bool [n]."""
        return self.predictions == self.targets


def evaluate(
    logits_fn: Callable[[Batch], jax.Array],
    batches: Iterable[Batch],
    *,
    classes: int,
    teacher_logits_fn: Callable[[Batch], jax.Array] | None = None,
    kind: str = "",
    text_bytes: int | None = None,
) -> Evaluation | TokenEvaluation:
    """Scores a model on batches, one step in flight; padding (weight 0) is dropped.

    Args:
        logits_fn: batch -> logits [B, classes] or [B, T, classes]; jitted by the caller.
        batches: dicts with "inputs", "targets", "weights" (0 or 1; [B], or [B, T] for tokens) and "id", on host or devices.
        classes: number of classes of the data, or of tokens in the vocabulary.
        teacher_logits_fn: like logits_fn, for the agreement with the teacher.
        kind: "classes" gives an `Evaluation`, "tokens" a `TokenEvaluation`; "" takes the latter for targets [B, T] of more than
            `CONFUSION` classes.
        text_bytes: of all batches together, see `summary_of_tokens`.

    Raises:
        ValueError: no batches, a model whose logits have other classes, an unknown kind; further as `summary` or
            `summary_of_tokens`.
    """
    if kind not in ("", *KINDS):
        raise ValueError(f"the kind of data is {kind!r}; expected one of {', '.join(KINDS)}")
    scored = _scored(logits_fn, batches, classes, teacher_logits_fn, kind)
    kind, first = next(scored, ("", None))
    if first is None:
        raise ValueError("the evaluation split is empty: it gave no batch")
    if kind == "tokens":
        return gather_tokens([first, *(part for _, part in scored)], text_bytes)
    total, *columns = first
    kept = [_kept(*columns)]
    for _, (counted, *columns) in scored:
        total = add(total, counted)
        kept.append(_kept(*columns))
    predictions, targets, ids = (np.concatenate(column) for column in zip(*kept))
    order = np.argsort(ids, kind="stable")
    return Evaluation(summary(total), predictions[order], targets[order], ids[order])


def _scored(
    logits_fn: Callable[[Batch], jax.Array],
    batches: Iterable[Batch],
    classes: int,
    teacher_logits_fn: Callable[[Batch], jax.Array] | None,
    kind: str,
) -> Iterator[tuple[str, Any]]:
    """(kind, what `_score` gives of a batch, on the host), each read when the next batch is on its way."""
    waiting = None
    for batch in batches:
        if waiting is None:
            kind = _check(logits_fn, batch, classes, kind)
        logits = logits_fn(batch)
        teacher = None if teacher_logits_fn is None else teacher_logits_fn(batch)
        labels = {name: batch[name] for name in ("targets", "weights", "id")}
        results = _score(kind, getattr(logits, "sharding", None))(logits, labels, teacher)
        if waiting is not None:
            yield kind, jax.device_get(waiting)
        waiting = results
    if waiting is not None:
        yield kind, jax.device_get(waiting)


@functools.lru_cache(maxsize=8)
def _score(kind: str, sharding: Any) -> Callable[..., Any]:
    """The jitted scoring of one batch; on a mesh everything comes back replicated, so that each process can read it."""

    def classes(logits: jax.Array, labels: dict[str, jax.Array], teacher: jax.Array | None) -> tuple[Tally, jax.Array, Any]:
        return tally(logits, labels["targets"], labels["weights"], teacher), jnp.argmax(logits, axis=-1), labels

    def tokens(logits: jax.Array, labels: dict[str, jax.Array], teacher: jax.Array | None) -> tuple[Any, jax.Array]:
        return tally_tokens(logits, labels["targets"], labels["weights"], teacher), labels["id"]

    score = tokens if kind == "tokens" else classes
    if isinstance(sharding, NamedSharding):
        return jax.jit(score, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.jit(score)


def _check(logits_fn: Callable[[Batch], jax.Array], batch: Batch, classes: int, kind: str) -> str:
    """The kind of the data. Raises ValueError where logits, targets and kind do not fit each other."""
    found, targets = jax.eval_shape(logits_fn, batch).shape, np.shape(batch["targets"])
    if found[-1] != classes or found[:-1] != targets:
        raise ValueError(
            f"the model gives logits of shape {list(found)}, but the data needs {[*targets, classes]}: do the classes agree?"
        )
    if kind == "tokens" and len(targets) != 2:
        raise ValueError(f"targets have shape {list(targets)}; expected [B, T] for tokens")
    return kind or ("tokens" if len(targets) == 2 and classes > CONFUSION else "classes")


def _kept(predictions: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(predictions, targets, ids) of the items that are not padding; a token has its example's id."""
    targets = batch["targets"]
    weights, ids = (
        np.broadcast_to(array.reshape(array.shape + (1,) * (targets.ndim - array.ndim)), targets.shape)
        for array in (batch["weights"], batch["id"])
    )
    kept = weights > 0
    return predictions[kept], targets[kept], ids[kept]
