"""Losses fused with the head's product, forward and backward: cross-entropy, and divergences that are sums over the classes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from bmjax.losses import tiles
from bmjax.losses.makers import different
from bmjax.losses.tiles import Chunks, Head, Plan, Tile
from bmjax.parallel import collectives

Summand: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]  # (log p_s, log p_t) of a class -> its part of the loss


def head_cross_entropy(
    head: tuple[jax.Array, jax.Array, jax.Array | None],
    labels: jax.Array,
    label_smoothing: float = 0.0,
    chunks: Chunks = Chunks(),  # noqa: B008  # a tuple of numbers
) -> jax.Array:
    """`cross_entropy` of the logits hidden @ kernel + bias, which never exist as a whole.

    Args:
        head: (hidden [..., D], kernel [D, V], bias [V] or None), float; products are summed in float32.
        labels: [...] int in [0, V); the value of any other is NaN.
        label_smoothing: as in `cross_entropy`.
        chunks: how much of the logits exists at a time.

    Returns:
        [...] float32.

    Raises:
        ValueError: shapes that do not go together.
    """
    hidden, kernel, bias = _flat("cross_entropy", head)
    if labels.shape != head[0].shape[:-1]:
        raise ValueError(f"cross_entropy: labels {list(labels.shape)} for hidden {list(head[0].shape)}; give one for each item")
    sizes = tiles.plan(len(hidden), kernel.shape[1], chunks)
    given = collectives.vary_as(Head(hidden, kernel, bias), (head, labels))
    return _cross_entropy(sizes, label_smoothing, given, labels.reshape(-1)).reshape(labels.shape)


def head_divergence(
    summand: Summand,
    student: tuple[jax.Array, jax.Array, jax.Array | None],
    teacher: tuple[jax.Array, jax.Array, jax.Array | None],
    temperature: float | jax.Array = 1.0,
    chunks: Chunks = Chunks(),  # noqa: B008  # a tuple of numbers
    *,
    name: str = "the divergence",
) -> jax.Array:
    """The sum over the classes of summand(log p_s, log p_t), p = softmax((hidden @ kernel + bias) / T).

    The forward pass computes every tile of the logits twice (for the normalisation, for the sum), the backward pass once. With
    g' the summand's derivative by log p_s, the gradient by a student's logit is (g' - p_s sum of g') / T; the teacher gets none.

    Args:
        summand: elementwise on float32 arrays of one shape; log-probabilities may be -inf. Its derivative must be finite there.
        student, teacher: heads, (hidden [..., D], kernel [D, V], bias [V] or None); each has its own D.
        temperature: above 0.
        chunks: how much of the logits exists at a time.
        name: for errors.

    Returns:
        [...] float32.

    Raises:
        ValueError: items or vocabularies that differ, or a head whose own shapes do not go together.
    """
    mine, theirs = _flat(name, student), _flat(name, teacher)
    if student[0].shape[:-1] != teacher[0].shape[:-1]:
        raise ValueError(
            f"{name}: the student's hidden is {list(student[0].shape)} and the teacher's {list(teacher[0].shape)}; all axes but "
            "the last must agree"
        )
    if mine.kernel.shape[1] != theirs.kernel.shape[1]:
        raise ValueError(different(name, mine.kernel.shape[1], theirs.kernel.shape[1]))
    sizes = tiles.plan(len(mine.hidden), mine.kernel.shape[1], chunks)
    theirs, scale = jax.lax.stop_gradient((theirs, jnp.float32(temperature)))
    mine, theirs, scale = collectives.vary_as((mine, theirs, scale), (mine, theirs, scale))
    return _divergence(summand, sizes, mine, theirs, scale).reshape(student[0].shape[:-1])


def _flat(name: str, head: tuple[jax.Array, jax.Array, jax.Array | None]) -> Head:
    """The head with hidden [items, D]. Raises ValueError unless its shapes go together."""
    hidden, kernel, bias = head
    fits = hidden.ndim > 0 and kernel.ndim == 2 and hidden.shape[-1] == kernel.shape[0]
    if not fits or (bias is not None and bias.shape != kernel.shape[1:]):
        shapes = ", ".join(f"{what} {list(x.shape)}" for what, x in zip(("hidden", "kernel", "bias"), head) if x is not None)
        raise ValueError(f"{name}: a head has {shapes}; expected hidden [..., D], kernel [D, V] and bias [V] or None")
    return Head(hidden.reshape(-1, hidden.shape[-1]), kernel, bias)


def _rounds(sizes: Plan, head: Head) -> Head:
    return head._replace(hidden=tiles.split(sizes, head.hidden))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(sizes: Plan, smoothing: float, head: Head, targets: jax.Array) -> jax.Array:
    return _cross_entropy_forward(sizes, smoothing, head, targets)[0]


def _cross_entropy_forward(sizes: Plan, smoothing: float, head: Head, targets: jax.Array) -> tuple[jax.Array, Any]:
    classes = sizes.partitions * sizes.width

    def tile(where: Tile, logits: list[jax.Array], sums: Any, target: jax.Array) -> tuple[jax.Array, ...]:
        largest, total, right, everything = sums
        chosen = where.fresh & (where.classes == target[:, None, None])
        right = right + jnp.where(chosen, logits[0], 0.0).sum(-1)
        if smoothing:
            everything = everything + jnp.where(where.fresh, logits[0], 0.0).sum(-1)
        return (*tiles.grown(largest, total, logits[0], where.fresh), right, everything)

    sums = tiles.sweep(
        sizes, [_rounds(sizes, head)], tile, tiles.nothing(sizes, -jnp.inf, 0.0, 0.0, 0.0), (tiles.split(sizes, targets),)
    )
    top, log_total = tiles.normalize(*sums[:2])
    there = tiles.split(sizes, (targets >= 0) & (targets < classes))
    value = log_total - (jnp.where(there, sums[2].sum(-1), jnp.nan) - top)
    if smoothing:
        value = (1 - smoothing) * value + smoothing * (log_total + top - sums[3].sum(-1) / classes)
    return tiles.join(sizes, value), (head, targets, top, log_total)


def _cross_entropy_backward(sizes: Plan, smoothing: float, kept: Any, cotangent: jax.Array) -> Any:
    head, targets, top, log_total = kept
    even = smoothing / (sizes.partitions * sizes.width)

    def slope(where: Tile, logits: list[jax.Array], target: jax.Array, top: jax.Array, log_total: jax.Array) -> jax.Array:
        probabilities = jnp.exp(tiles.log_probabilities(logits[0], top, log_total))
        return probabilities - even - jnp.where(where.classes == target[:, None, None], 1 - smoothing, 0.0)

    given = (tiles.split(sizes, targets), top, log_total)
    return tiles.pull_back(sizes, [_rounds(sizes, head)], slope, tiles.split(sizes, cotangent), given), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divergence(summand: Summand, sizes: Plan, student: Head, teacher: Head, temperature: jax.Array) -> jax.Array:
    heads = [_rounds(sizes, head) for head in (student, teacher)]
    return _sums(summand, sizes, heads, temperature, _normalizations(sizes, heads, temperature), slopes=False)[0]


def _divergence_forward(
    summand: Summand, sizes: Plan, student: Head, teacher: Head, temperature: jax.Array
) -> tuple[jax.Array, Any]:
    heads = [_rounds(sizes, head) for head in (student, teacher)]
    norms = _normalizations(sizes, heads, temperature)
    value, slopes = _sums(summand, sizes, heads, temperature, norms, slopes=True)
    return value, (student, teacher, temperature, norms, slopes)


def _divergence_backward(summand: Summand, sizes: Plan, kept: Any, cotangent: jax.Array) -> Any:
    student, teacher, temperature, norms, slopes = kept

    def slope(where: Tile, logits: list[jax.Array], total: jax.Array, *norms: jax.Array) -> jax.Array:
        log_s, log_t = _pair(logits, norms, temperature)
        return (_summands(summand, log_s, log_t)[1] - jnp.exp(log_s) * total[:, None, None]) / temperature

    heads = [_rounds(sizes, head) for head in (student, teacher)]
    return tiles.pull_back(sizes, heads, slope, tiles.split(sizes, cotangent), (slopes, *norms)), None, None


_divergence.defvjp(_divergence_forward, _divergence_backward)


def _normalizations(sizes: Plan, heads: list[Head], temperature: jax.Array) -> tuple[jax.Array, ...]:
    """Largest logit and log of the sum of the student's, then of the teacher's, each [rounds, n]."""

    def tile(where: Tile, logits: list[jax.Array], sums: Any) -> tuple[jax.Array, ...]:
        largest, total = sums
        return tiles.grown(largest, total, logits[0], where.fresh, temperature)

    sums = (tiles.sweep(sizes, [head], tile, tiles.nothing(sizes, -jnp.inf, 0.0)) for head in heads)
    return tuple(part for one in sums for part in tiles.normalize(one[0], one[1], temperature))


def _sums(
    summand: Summand, sizes: Plan, heads: list[Head], temperature: jax.Array, norms: tuple[jax.Array, ...], *, slopes: bool
) -> tuple[jax.Array, jax.Array | None]:
    """The loss [items], and the sum of its derivatives by log p_s [rounds, n]."""

    def tile(where: Tile, logits: list[jax.Array], sums: Any, *norms: jax.Array) -> tuple[jax.Array, ...]:
        log_s, log_t = _pair(logits, norms, temperature)
        found = _summands(summand, log_s, log_t) if slopes else (summand(log_s, log_t),)
        return tuple(before + jnp.where(where.fresh, x, 0.0).sum(-1) for before, x in zip(sums, found))

    sums = tiles.sweep(sizes, heads, tile, tiles.nothing(sizes, *(0.0, 0.0) if slopes else (0.0,)), norms)
    return tiles.join(sizes, sums[0].sum(-1)), sums[1].sum(-1) if slopes else None


def _summands(summand: Summand, log_s: jax.Array, log_t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The summand and its derivative by log p_s."""
    return jax.jvp(lambda x: summand(x, log_t), (log_s,), (jnp.ones_like(log_s),))


def _pair(logits: list[jax.Array], norms: tuple[jax.Array, ...], temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the student and of the teacher."""
    mine = tiles.log_probabilities(logits[0], norms[0], norms[1], temperature)
    return mine, tiles.log_probabilities(logits[1], norms[2], norms[3], temperature)
