"""Losses fused with the head's product, forward and backward: cross-entropy, and divergences that are sums over the classes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

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
    temperature: float | jax.Array | tuple[jax.Array, jax.Array] = 1.0,
    chunks: Chunks = Chunks(),  # noqa: B008  # a tuple of numbers
    *,
    without: jax.Array | None = None,
    name: str = "the divergence",
) -> jax.Array:
    """The sum over the classes of summand(log p_s, log p_t), p = softmax((hidden @ kernel + bias) / T).

    The forward pass computes every tile of the logits twice (for the normalisation, for the sum), the backward pass once. With
    g' the summand's derivative by log p_s, the gradient by a student's logit is (g' - p_s sum of g') / T; the teacher gets none.

    Args:
        summand: elementwise on float32 arrays of one shape; log-probabilities may be -inf. Its derivative must be finite there.
        student, teacher: heads, (hidden [..., D], kernel [D, V], bias [V] or None); each has its own D.
        temperature: above 0. A pair has one for each item [...], of the student and of the teacher; the student's gets its
            gradient then, and logits count as differences from their mean over the classes that are not -inf.
        chunks: how much of the logits exists at a time.
        without: [...] int, a class of each item that takes no part: its log-probabilities are -inf.
        name: for errors.

    Returns:
        [...] float32.

    Raises:
        ValueError: items or vocabularies that differ, or a head whose own shapes do not go together.
    """
    mine, theirs = _flat(name, student), _flat(name, teacher)
    items = student[0].shape[:-1]
    if items != teacher[0].shape[:-1]:
        raise ValueError(
            f"{name}: the student's hidden is {list(student[0].shape)} and the teacher's {list(teacher[0].shape)}; all axes but "
            "the last must agree"
        )
    if mine.kernel.shape[1] != theirs.kernel.shape[1]:
        raise ValueError(different(name, mine.kernel.shape[1], theirs.kernel.shape[1]))
    if without is not None and without.shape != items:
        raise ValueError(f"{name}: labels {list(without.shape)} for hidden {list(student[0].shape)}; give one for each item")
    sizes = tiles.plan(len(mine.hidden), mine.kernel.shape[1], chunks)
    given = temperature if isinstance(temperature, tuple) else (jax.lax.stop_gradient(jnp.float32(temperature)),) * 2
    own, other = (jnp.broadcast_to(t, items).reshape(-1).astype(jnp.float32) for t in given)
    theirs, other = jax.lax.stop_gradient((theirs, other))
    apart = None if without is None else without.reshape(-1)
    mine, theirs, own, other = collectives.vary_as((mine, theirs, own, other), (mine, theirs, own, other, apart))
    static = _Static(summand, sizes, isinstance(temperature, tuple))
    return _divergence(static, mine, theirs, own, other, apart).reshape(items)


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


class _Static(NamedTuple):
    """What is known of a divergence before it is compiled; `warm` if the student's temperatures get a gradient."""

    summand: Summand
    sizes: Plan
    warm: bool


class _Items(NamedTuple):
    """Of each item [rounds, n]: both temperatures, both normalisations, and the class that is left out."""

    own: jax.Array
    other: jax.Array
    norms: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    without: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(
    static: _Static, student: Head, teacher: Head, own: jax.Array, other: jax.Array, without: jax.Array | None
) -> jax.Array:
    heads = [_rounds(static.sizes, head) for head in (student, teacher)]
    return _sums(static, heads, _items(static.sizes, heads, own, other, without), slopes=False)[0]


def _divergence_forward(
    static: _Static, student: Head, teacher: Head, own: jax.Array, other: jax.Array, without: jax.Array | None
) -> tuple[jax.Array, Any]:
    heads = [_rounds(static.sizes, head) for head in (student, teacher)]
    items = _items(static.sizes, heads, own, other, without)
    value, slopes = _sums(static, heads, items, slopes=True)
    return value, (student, teacher, items, slopes)


def _divergence_backward(static: _Static, kept: Any, cotangent: jax.Array) -> Any:
    student, teacher, items, slopes = kept
    sizes = static.sizes
    by_own, more = jnp.zeros_like(cotangent), tuple[jax.Array, ...]()
    if static.warm:
        # By the temperature T: minus the sum over the classes of the slope by z / T times log p_s, over T.
        total, product, mean, beyond, kept_classes, whole = slopes
        # Logits that are centred first: what classes that are ruled out would take from the mean, all others give.
        shift = beyond / jnp.maximum(kept_classes, 1)
        moved = tiles.join(sizes, (total * mean - product - shift * whole) / items.own)
        more = (shift,)
        by_own = jnp.where(cotangent != 0, cotangent * moved, 0.0)

    def slope(where: Tile, logits: list[jax.Array], total: jax.Array, items: _Items, *shift: jax.Array) -> jax.Array:
        log_s, log_t = _pair(where, logits, items)
        slopes = _summands(static.summand, log_s, log_t)[1] - jnp.exp(log_s) * total[:, None, None]
        if shift:
            slopes = jnp.where(log_s > -jnp.inf, slopes + shift[0][:, None, None], 0.0)
        return tiles.over(slopes, items.own)

    heads = [_rounds(sizes, head) for head in (student, teacher)]
    grads = tiles.pull_back(sizes, heads, slope, tiles.split(sizes, cotangent), (slopes[0], items, *more))
    return grads, None, by_own, None, None


_divergence.defvjp(_divergence_forward, _divergence_backward)


def _items(sizes: Plan, heads: list[Head], own: jax.Array, other: jax.Array, without: jax.Array | None) -> _Items:
    """With the largest logit and the log of the sum of the student's, then of the teacher's."""
    # What pads the last round, by 0, has a temperature too.
    warm = [jnp.where(split > 0, split, 1.0) for split in (tiles.split(sizes, own), tiles.split(sizes, other))]
    apart = None if without is None else tiles.split(sizes, without)

    def tile(where: Tile, logits: list[jax.Array], sums: Any, temperature: jax.Array, *apart: jax.Array) -> tuple[jax.Array, ...]:
        return tiles.grown(sums[0], sums[1], _apart(where, logits[0], *apart), where.fresh, temperature)

    norms = []
    for head, temperature in zip(heads, warm):
        given = (temperature,) if apart is None else (temperature, apart)
        sums = tiles.sweep(sizes, [head], tile, tiles.nothing(sizes, -jnp.inf, 0.0), given)
        norms.append(tiles.normalize(sums[0], sums[1], temperature))
    return _Items(warm[0], warm[1], (*norms[0], *norms[1]), apart)


def _sums(static: _Static, heads: list[Head], items: _Items, *, slopes: bool) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The loss [items], and sums over the classes [rounds, n]: its derivatives g' by log p_s and, if the temperatures get a
    gradient, g' log p_s, p_s log p_s, g' of classes that the student rules out, the number of all others, and their log p_s.
    """
    warm = slopes and static.warm

    def tile(where: Tile, logits: list[jax.Array], sums: Any, items: _Items) -> tuple[jax.Array, ...]:
        log_s, log_t = _pair(where, logits, items)
        found: tuple[jax.Array, ...] = (static.summand(log_s, log_t),)
        if slopes:
            found = _summands(static.summand, log_s, log_t)
        if warm:
            kept = log_s > -jnp.inf
            low = jnp.where(kept, log_s, 0.0)  # a class that is ruled out does not move
            found = (*found, found[1] * low, jnp.exp(log_s) * low, jnp.where(kept, 0.0, found[1]), kept.astype(low.dtype), low)
        return tuple(before + jnp.where(where.fresh, x, 0.0).sum(-1) for before, x in zip(sums, found))

    start = tiles.nothing(static.sizes, *[0.0] * (7 if warm else 2 if slopes else 1))
    value, *rest = tiles.sweep(static.sizes, heads, tile, start, (items,))
    return tiles.join(static.sizes, value.sum(-1)), tuple(x.sum(-1) for x in rest)


def _summands(summand: Summand, log_s: jax.Array, log_t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The summand and its derivative by log p_s."""
    return jax.jvp(lambda x: summand(x, log_t), (log_s,), (jnp.ones_like(log_s),))


def _pair(where: Tile, logits: list[jax.Array], items: _Items) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the student and of the teacher."""
    apart = () if items.without is None else (items.without,)
    mine, theirs = (_apart(where, z, *apart) for z in logits)
    top_s, total_s, top_t, total_t = items.norms
    log_s = tiles.log_probabilities(mine, top_s, total_s, items.own)
    log_t = tiles.log_probabilities(theirs, top_t, total_t, items.other)
    if items.without is None:
        return log_s, log_t
    # Perhaps no class is left, and -inf less -inf is NaN.
    return jnp.where(mine > -jnp.inf, log_s, -jnp.inf), jnp.where(theirs > -jnp.inf, log_t, -jnp.inf)


def _apart(where: Tile, logits: jax.Array, without: jax.Array | None = None) -> jax.Array:
    """A tile's logits, -inf for the class of each item that takes no part."""
    return logits if without is None else jnp.where(where.classes == without[:, None, None], -jnp.inf, logits)
