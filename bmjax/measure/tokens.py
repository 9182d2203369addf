"""Quality of a language model: one row of sums a sequence on the device, float64 totals on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class TokenTally(NamedTuple):
    """What one batch adds to a language model's figures. A sequence's row depends on no other sequence and on no device.

    Attributes:
        nll: float32 [B], sum of the negative log-likelihoods of the sequence's tokens in nats.
        tokens: int32 [B], tokens that are not padding.
        hits: int32 [B], tokens that are the likeliest.
        outside: int32 [B], targets that are no token of the vocabulary.
        agreement: int32 [B], tokens whose prediction is the teacher's; None without a teacher.
        bin_count, bin_hits: int32 [B, bins], tokens and hits by confidence.
        bin_confidence: float32 [B, bins], sum of the confidences.
    """

    nll: Any
    tokens: Any
    hits: Any
    outside: Any
    agreement: Any
    bin_count: Any
    bin_hits: Any
    bin_confidence: Any


class TokenEvaluation(NamedTuple):
    """The result of `evaluate` for a language model: the figures, and sequence by sequence, so that two models' results pair.

    Attributes:
        summary: see `summary_of_tokens`.
        nll: float64 [n], sum of the negative log-likelihoods of the sequence's tokens in nats.
        hits, tokens: int64 [n], tokens predicted right, and tokens that count.
        ids: int [n], in rising order; sequences of padding alone are left out.
    """

    summary: dict[str, Any]
    nll: np.ndarray
    hits: np.ndarray
    tokens: np.ndarray
    ids: np.ndarray

    @property
    def bits(self) -> np.ndarray:
        """Float64 [n], bits per token of each sequence."""
        return self.nll / self.tokens / math.log(2)


def tally_tokens(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, teacher_logits: jax.Array | None = None, bins: int = 15
) -> TokenTally:
    """Sums one batch up by sequence; a pure function to be jitted, on sharded and padded batches too.

    No array but the logits is as large as they are, and none is as large as the square of the vocabulary.

    Args:
        logits: [B, T, V] float.
        targets: [B, T] int.
        weights: [B] or [B, T]; a mask: 0 leaves a token out, anything above counts it once.
        teacher_logits: like logits.
        bins: confidence bins of equal width for the calibration error, as in `tally`.
    """
    batch, length, vocabulary = logits.shape
    kept = jnp.broadcast_to((weights > 0).reshape(batch, -1), (batch, length))
    valid = kept & (targets >= 0) & (targets < vocabulary)
    logits = logits.astype(jnp.float32)
    total, best, predictions = jax.nn.logsumexp(logits, axis=-1), jnp.max(logits, axis=-1), jnp.argmax(logits, axis=-1)
    picked = jnp.take_along_axis(logits, jnp.where(valid, targets, 0)[..., None], axis=-1)[..., 0]
    hits = valid & (predictions == targets)
    confidence = jnp.exp(best - total)
    inside = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    member = kept[..., None] & (inside[..., None] == jnp.arange(bins))  # [B, T, bins]
    agreement = None if teacher_logits is None else _count(kept & (predictions == jnp.argmax(teacher_logits, axis=-1)))
    return TokenTally(
        nll=jnp.sum(jnp.where(valid, total - picked, 0.0), axis=1),
        tokens=_count(kept),
        hits=_count(hits),
        outside=_count(kept & ~valid),
        agreement=agreement,
        bin_count=_count(member),
        bin_hits=_count(member & hits[..., None]),
        bin_confidence=jnp.sum(jnp.where(member, confidence[..., None], 0.0), axis=1),
    )


def _count(marks: jax.Array) -> jax.Array:
    """How many of [B, T, ...] are true in each sequence."""
    return jnp.sum(marks, axis=1, dtype=jnp.int32)


def summary_of_tokens(tally: TokenTally, text_bytes: int | None = None) -> dict[str, Any]:
    """A language model's figures as plain floats and ints, every token counting the same.

    Args:
        tally: of all sequences; its arrays on the host.
        text_bytes: bytes of the text that all tokens counted here stand for together.

    Returns:
        nll (mean, nats); bits_per_token; bits_per_byte (all nats / ln 2 / `text_bytes`, None without them, or where there are
        none); perplexity; accuracy (of the likeliest token); ece; teacher_agreement (None without a teacher); count (tokens);
        sequences; text_bytes.

    Raises:
        ValueError: nothing was counted, targets are no token of the model, or logits are NaN.
    """
    count, outside = int(tally.tokens.sum(dtype=np.int64)), int(tally.outside.sum(dtype=np.int64))
    if count == 0:
        raise ValueError("the evaluation split is empty: no token has a weight above 0")
    if outside:
        raise ValueError(f"{outside} of {count} targets are no token of the model; check vocabulary and tokenizer")
    nats = float(tally.nll.sum(dtype=np.float64))
    nll = nats / count
    if math.isnan(nll):
        raise ValueError("the model's logits hold NaN; it has diverged, or the inputs hold NaN")
    hits, confidence = tally.bin_hits.sum(0, dtype=np.int64), tally.bin_confidence.sum(0, dtype=np.float64)
    return {
        "nll": nll,
        "bits_per_token": nll / math.log(2),
        "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else None,
        "perplexity": math.exp(nll) if nll < 700 else math.inf,
        "accuracy": float(tally.hits.sum(dtype=np.int64) / count),
        "ece": float(np.abs(hits - confidence).sum() / count),
        "teacher_agreement": None if tally.agreement is None else float(tally.agreement.sum(dtype=np.int64) / count),
        "count": count,
        "sequences": int(np.count_nonzero(tally.tokens)),
        "text_bytes": text_bytes,
    }


def gather_tokens(parts: Sequence[tuple[TokenTally, np.ndarray]], text_bytes: int | None = None) -> TokenEvaluation:
    """The evaluation of (tally, ids) of all batches, on the host. Raises ValueError as `summary_of_tokens`."""
    tallies, ids = zip(*parts)
    whole = jax.tree.map(lambda *rows: np.concatenate(rows), *tallies)
    summary, order = summary_of_tokens(whole, text_bytes), np.argsort(np.concatenate(ids), kind="stable")
    order = order[whole.tokens[order] > 0]
    columns = (whole.nll.astype(np.float64), whole.hits.astype(np.int64), whole.tokens.astype(np.int64), np.concatenate(ids))
    return TokenEvaluation(summary, *(column[order] for column in columns))
