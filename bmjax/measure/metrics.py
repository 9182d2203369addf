"""Quality of a classifier, exact over shards and ragged batches: whole numbers on the device, float64 totals on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bmjax.types import Batch


class Tally(NamedTuple):
    """What one batch adds to the quality figures; tallies are added on the host.

    Attributes:
        confusion: int [classes, classes], rows are targets, columns predictions.
        nll: float scalar, sum of the negative log-likelihoods in nats.
        bin_count, bin_hits: int [bins], items and correct items by confidence.
        bin_confidence: float [bins], sum of the confidences.
        agreement: int scalar, items whose prediction is the teacher's; None without a teacher.
        count: int scalar, items that are not padding.
    """

    confusion: Any
    nll: Any
    bin_count: Any
    bin_hits: Any
    bin_confidence: Any
    agreement: Any
    count: Any  # type: ignore[assignment]  # shadows tuple.count, on purpose


class Evaluation(NamedTuple):
    """The result of `evaluate`: the figures, and item by item in the order of the ids, so that two models' results pair.

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


def tally(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, teacher_logits: jax.Array | None = None, bins: int = 15
) -> Tally:
    """Counts one batch; a pure function to be jitted, on sharded and padded batches too.

    Args:
        logits: [B, classes] or [B, T, classes] float.
        targets: [B] or [B, T] int.
        weights: [B] or [B, T]; a mask: 0 leaves an item out, anything above counts it once.
        teacher_logits: like logits.
        bins: confidence bins of equal width for the calibration error (Guo et al. 2017, equation 5).
    """
    classes = logits.shape[-1]
    logits = logits.reshape(-1, classes).astype(jnp.float32)
    kept = weights.reshape(-1) > 0
    # Padding, and labels that are no class, go out of range, where a scatter drops them; `summary` finds the latter missing.
    targets = targets.reshape(-1)
    valid = kept & (targets >= 0) & (targets < classes)
    row = jnp.where(valid, targets, classes)
    predictions = jnp.argmax(logits, axis=-1)
    confusion = jnp.zeros((classes, classes), jnp.int32).at[row, predictions].add(1, mode="drop")

    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, jnp.where(valid, targets, 0)[:, None], axis=-1)[:, 0]
    confidence = jnp.exp(jnp.max(log_probs, axis=-1))
    inside = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    bin_of = jnp.where(kept, inside, bins)
    hits = valid & (predictions == targets)
    agreement = None
    if teacher_logits is not None:
        agrees = predictions == jnp.argmax(teacher_logits.reshape(-1, classes), axis=-1)
        agreement = jnp.sum(kept & agrees, dtype=jnp.int32)
    return Tally(
        confusion=confusion,
        nll=-jnp.sum(jnp.where(valid, picked, 0.0)),
        bin_count=jnp.zeros(bins, jnp.int32).at[bin_of].add(1, mode="drop"),
        bin_hits=jnp.zeros(bins, jnp.int32).at[bin_of].add(hits.astype(jnp.int32), mode="drop"),
        bin_confidence=jnp.zeros(bins, jnp.float32).at[bin_of].add(confidence, mode="drop"),
        agreement=agreement,
        count=jnp.sum(kept, dtype=jnp.int32),
    )


def add(a: Tally, b: Tally) -> Tally:
    """The sum of two tallies on the host, in int64 and float64."""

    def widen(x: Any) -> np.ndarray:
        x = np.asarray(x)
        return x.astype(np.float64 if np.issubdtype(x.dtype, np.floating) else np.int64)

    return jax.tree.map(lambda x, y: widen(x) + widen(y), a, b)


def summary(tally: Tally) -> dict[str, Any]:
    """The quality figures as plain floats, ints and lists.

    Keys: accuracy; precision, recall and f1 (each {macro, micro, weighted}); per_class (a list of {precision, recall, f1,
    support}); nll (mean, nats); ece; teacher_agreement (None without a teacher); confusion; count. As in scikit-learn, 0 / 0 is 0
    and the macro average goes over the classes that occur among targets or predictions.

    Raises:
        ValueError: nothing was counted, labels are no class of the model, or logits are NaN.
    """
    tally = add(tally, jax.tree.map(np.zeros_like, tally))
    count = int(tally.count)
    if count == 0:
        raise ValueError("the evaluation split is empty: no example has a weight above 0")
    confusion = tally.confusion
    if confusion.sum() != count:
        outside = count - int(confusion.sum())
        raise ValueError(f"{outside} of {count} targets are no class of the model; expected labels 0 to {len(confusion) - 1}")
    if np.isnan(tally.nll):
        raise ValueError("the model's logits hold NaN; it has diverged, or the inputs hold NaN")
    averages, per_class = _precision_recall_f1(confusion)
    return {
        "accuracy": float(np.trace(confusion) / count),
        **averages,
        "per_class": per_class,
        "nll": float(tally.nll / count),
        "ece": float(np.sum(np.abs(tally.bin_hits - tally.bin_confidence)) / count),
        "teacher_agreement": None if tally.agreement is None else float(tally.agreement / count),
        "confusion": confusion.tolist(),
        "count": count,
    }


def evaluate(
    logits_fn: Callable[[Batch], jax.Array],
    batches: Iterable[Batch],
    *,
    classes: int,
    teacher_logits_fn: Callable[[Batch], jax.Array] | None = None,
) -> Evaluation:
    """Scores a model on batches, one step in flight; padding (weight 0) is dropped.

    Args:
        logits_fn: batch -> logits [B, classes] or [B, T, classes]; jitted by the caller.
        batches: dicts with "inputs", "targets", "weights" (0 or 1) and "id", on the host or on devices.
        classes: number of classes of the data.
        teacher_logits_fn: like logits_fn, for the agreement with the teacher.

    Raises:
        ValueError: no batches, or a model whose logits have other classes; further as `summary`.
    """
    total: Tally | None = None
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def collect(results: tuple[Tally, jax.Array, Batch]) -> None:
        nonlocal total
        counted, predictions, batch = jax.device_get(results)
        total = counted if total is None else add(total, counted)
        columns.append(_kept(predictions, batch))

    waiting = None
    for batch in batches:
        if waiting is None:
            _check_classes(logits_fn, batch, classes)
        logits = logits_fn(batch)
        teacher = None if teacher_logits_fn is None else teacher_logits_fn(batch)
        labels = {name: batch[name] for name in ("targets", "weights", "id")}
        results = _score(getattr(logits, "sharding", None))(logits, labels, teacher)
        if waiting is not None:
            collect(waiting)
        waiting = results
    if waiting is None:
        raise ValueError("the evaluation split is empty: it gave no batch")
    collect(waiting)
    assert total is not None
    predictions, targets, ids = (np.concatenate(column) for column in zip(*columns))
    order = np.argsort(ids, kind="stable")
    return Evaluation(summary(total), predictions[order], targets[order], ids[order])


@functools.lru_cache(maxsize=8)
def _score(sharding: Any) -> Callable[..., tuple[Tally, jax.Array, dict[str, jax.Array]]]:
    """The jitted scoring of one batch; on a mesh everything comes back replicated, so that each process can read it."""

    def score(
        logits: jax.Array, labels: dict[str, jax.Array], teacher: jax.Array | None
    ) -> tuple[Tally, jax.Array, dict[str, jax.Array]]:
        return tally(logits, labels["targets"], labels["weights"], teacher), jnp.argmax(logits, axis=-1), labels

    if isinstance(sharding, NamedSharding):
        return jax.jit(score, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.jit(score)


def _check_classes(logits_fn: Callable[[Batch], jax.Array], batch: Batch, classes: int) -> None:
    found = jax.eval_shape(logits_fn, batch).shape
    if found[-1] != classes or found[:-1] != np.shape(batch["targets"]):
        expected = [*np.shape(batch["targets"]), classes]
        raise ValueError(f"the model gives logits of shape {list(found)}, but the data needs {expected}: do the classes agree?")


def _kept(predictions: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(predictions, targets, ids) of the items that are not padding; a token has its example's id."""
    kept = batch["weights"] > 0
    ids = np.broadcast_to(batch["id"].reshape(batch["id"].shape + (1,) * (kept.ndim - 1)), kept.shape)
    return predictions[kept], batch["targets"][kept], ids[kept]


def _precision_recall_f1(confusion: np.ndarray) -> tuple[dict[str, dict[str, float]], list[dict[str, float]]]:
    """({name: {macro, micro, weighted}}, one dict a class)."""
    hits, support, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    occurs = (support + predicted) > 0

    def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
        return np.divide(top, bottom, out=np.zeros(len(top)), where=bottom > 0)

    by_class = {"precision": ratio(hits, predicted), "recall": ratio(hits, support), "f1": ratio(2 * hits, support + predicted)}
    averages = {
        name: {
            "macro": float(values[occurs].mean()),
            "micro": float(hits.sum() / support.sum()),  # one label an item: all three equal the accuracy
            "weighted": float(np.average(values, weights=support)),
        }
        for name, values in by_class.items()
    }
    per_class = [
        {**{name: float(values[i]) for name, values in by_class.items()}, "support": int(support[i])}
        for i in range(len(confusion))
    ]
    return averages, per_class
