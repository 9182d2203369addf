"""Quality of a classifier, exact over shards and ragged batches: whole numbers on the device, float64 totals on the host."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


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
    weights = weights.reshape(weights.shape + (1,) * (targets.ndim - weights.ndim))
    kept = jnp.broadcast_to(weights > 0, targets.shape).reshape(-1)
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
