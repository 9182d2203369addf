"""Losses on the insides of transformers: who attends to whom, how values relate, hidden states (MiniLM, TinyBERT).

`mask` [B, T] says which positions count: the others are neither asked nor attended to. Of scores, a position that may not see
itself does not count either: no causal or packed row has one, and padding that a model has masked is one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bmjax.distill.features import hint
from bmjax.distill.numerics import relative_entropy
from bmjax.distill.shapes import check_axes

_MASKED = -1e9  # a score of less says that the pair is masked
_NEVER = -1e30


def attention_relation(s: jax.Array, t: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean over examples, heads and queries of KL(A_t || A_s), A the softmax of the scores (Wang et al. 2020, MiniLM, eq. 7).

    The usual weight is 1, on the last layer.

    Args:
        s, t: student's and teacher's attention scores before the softmax [B, heads, T, T] float, queries before keys; masked
            pairs are -inf or below -1e9.
        mask: [B, T] bool; None for all.

    Returns:
        float32 scalar, 0 at s = t.

    Raises:
        ValueError: other axes, or shapes that differ, such as another number of heads.
    """
    s, t = _scores("attention_relation", s, t)
    kept = _kept("attention_relation", t, mask)
    # What is masked may be NaN: it is replaced before anything is made of it, as 0 times NaN would reach the gradient.
    asked, seen = kept[:, None, :, None], kept[:, None, None]
    pair = (jnp.where(asked, jnp.where(seen, jnp.maximum(x, _NEVER), _NEVER), 0.0) for x in (t, s))
    return _over_queries(relative_entropy(*(jax.nn.log_softmax(x) for x in pair)), kept)


def value_relation(s: jax.Array, t: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean over examples, heads and positions of KL(R_t || R_s), R = softmax(V V' / sqrt(d)) (MiniLM, eq. 8-10).

    The width of the heads may differ. Queries or keys in the place of values give the relations of MiniLMv2 (Wang et al. 2021).
    The usual weight is 1, on the last layer.

    Args:
        s, t: student's and teacher's values [B, T, heads, d] float.
        mask: [B, T] bool; None for all.

    Returns:
        float32 scalar, 0 at s = t.

    Raises:
        ValueError: other axes, or another number of examples, positions or heads.
    """
    for x in (s, t):
        check_axes("value_relation", x, "B, T, heads, d")
    if mask is not None and all(mask.shape == x.shape[:2] for x in (s, t)):
        s, t = (jnp.where(mask[..., None, None], x, 0.0) for x in (s, t))  # products of NaN and their slopes are NaN
    return attention_relation(_products(s), _products(t), mask)


def _products(x: jax.Array) -> jax.Array:
    x = jnp.asarray(x, jnp.float32)
    return jnp.einsum("bqhd,bkhd->bhqk", x, x, precision="highest") / x.shape[-1] ** 0.5


def attention_scores(s: jax.Array, t: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean of (s - t)^2 over the scores before the softmax (Jiao et al. 2020, TinyBERT, eq. 7). The usual weight is 1 a layer.

    Args, errors as for `attention_relation`. Pairs that are masked in either network do not count.

    Returns:
        float32 scalar, 0 at s = t: the mean over the examples of each one's mean over its pairs.
    """
    s, t = _scores("attention_scores", s, t)
    kept = _kept("attention_scores", t, mask)
    pairs = (kept[:, None, :, None] & kept[:, None, None, :]) & ~(s <= _MASKED) & ~(t <= _MASKED)  # NaN is not masked
    gap = jnp.square(jnp.where(pairs, s, 0.0) - jnp.where(pairs, t, 0.0))
    return jnp.mean(jnp.sum(gap, (1, 2, 3)) / jnp.maximum(jnp.sum(pairs, (1, 2, 3)), 1))


def hidden_states(s: jax.Array, t: jax.Array) -> jax.Array:
    """Mean of (s W - t)^2 over all entries of the hidden states (Jiao et al. 2020, TinyBERT, eq. 8-9).

    The usual weight is 1 a layer. W is the projection of `losses.on_features(hidden_states, layers, project="linear")`.

    Args:
        s, t: student's (projected) and teacher's hidden states or embeddings [..., width] float, of equal shape.

    Returns:
        float32 scalar, 0 at s W = t.

    Raises:
        ValueError: shapes that differ.
    """
    return hint(s, t)


def _scores(name: str, s: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    for x in (s, t):
        check_axes(name, x, "B, heads, T, T")
    if s.shape != t.shape:
        raise ValueError(
            f"{name}: the student has [B, heads, T, T] of {list(s.shape)}, the teacher {list(t.shape)}; they must agree"
        )
    return jnp.asarray(s, jnp.float32), jnp.asarray(t, jnp.float32)


def _kept(name: str, scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    kept = jnp.ones((len(scores), scores.shape[-1]), bool) if mask is None else mask
    if kept.shape != (len(scores), scores.shape[-1]):
        raise ValueError(f"{name}: a mask {list(kept.shape)} for scores {list(scores.shape)}; expected [B, T]")
    return kept & ~(jnp.diagonal(scores, axis1=-2, axis2=-1) <= _MASKED).all(axis=1)  # NaN is not masked


def _over_queries(values: jax.Array, kept: jax.Array) -> jax.Array:
    """The mean of values [B, heads, T]: over each example's queries that count, then over heads and examples."""
    asked = kept[:, None].astype(jnp.float32)
    return jnp.mean(jnp.sum(values * asked, -1) / jnp.maximum(jnp.sum(asked, -1), 1.0))
