"""The least that a language model of bytes must beat: a table of which token follows which."""

from __future__ import annotations

import numpy as np


def bigram_bits(train_tokens: np.ndarray, test_tokens: np.ndarray, vocabulary: int, smoothing: float = 1.0) -> float:
    """Bits per token of an add-smoothed bigram model, fitted on one stream of tokens and scored on another.

    p(b | a) = (count(a, b) + smoothing) / (count(a) + smoothing * vocabulary), counted over neighbours; the first token of a
    stream is context only. Chen and Goodman (1999), section 2.1. Memory grows with the training tokens, not with the square
    of the vocabulary.

    Args:
        train_tokens, test_tokens: int [n], or [rows, n] where no row is the neighbour of another. What a language model sees of
            inputs [rows, T] with targets [rows, T] is concatenate([inputs[:, :1], targets], axis=1).
        vocabulary: number of tokens that there are.
        smoothing: above 0.

    Raises:
        ValueError: a token outside the vocabulary, no two neighbours, or a smoothing that is not above 0.
    """
    if not smoothing > 0:
        raise ValueError(f"smoothing is {smoothing}; expected a number above 0, or what never followed has no probability")
    train, test = (_pairs(tokens, vocabulary, name) for tokens, name in ((train_tokens, "train"), (test_tokens, "test")))
    seen, counts = np.unique(train, return_counts=True)
    contexts = np.bincount(train // vocabulary, minlength=vocabulary)
    place = np.minimum(np.searchsorted(seen, test), len(seen) - 1)
    followed = np.where(seen[place] == test, counts[place], 0)
    bits = np.log2(contexts[test // vocabulary] + smoothing * vocabulary) - np.log2(followed + smoothing)
    return float(bits.mean())


def _pairs(tokens: np.ndarray, vocabulary: int, name: str) -> np.ndarray:
    """Every two neighbours as the one number first * vocabulary + second, int64 [pairs]."""
    tokens = np.asarray(tokens)
    if tokens.ndim not in (1, 2) or tokens.shape[-1] < 2 or tokens.size == 0 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"the {name} tokens are {tokens.dtype} of shape {list(tokens.shape)}; expected integers [n] or [rows, n], n above 1"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"the {name} tokens go from {low} to {high}; expected 0 to {vocabulary - 1}")
    tokens = tokens.astype(np.int64)
    return (tokens[..., :-1] * vocabulary + tokens[..., 1:]).reshape(-1)
