"""Losses against a teacher of whom only the k largest probabilities are known, and how much is left beside them.

Both distributions are made coarser in the same way: the teacher's k classes stay as they are, all others become one bucket. A
divergence of the coarse distributions is exact, is at most the one over all classes, and equals it at k = the number of classes.
The student is held to the mass that the bucket has, and free to spread it within. (Without the bucket, renormalised over k
classes, a student that puts all its mass elsewhere has no loss.)

What becomes of the bucket at a temperature depends on every class in it, so the teacher's side must have been made at the
temperature of the loss: `data.RecordLayout.pack` stores a tail for each of several temperatures.

For vocabularies whose logits do not fit, `HEAD_LOSSES` has the same losses on the student's head: see `on_top_k_head`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bmjax.distill.divergences import jsd, reverse_kl, skew_kl, skew_reverse_kl, tvd
from bmjax.distill.logits import kd, soft_cross_entropy
from bmjax.distill.numerics import check_temperature, squared
from bmjax.losses import Chunks, head_coarse


def coarse(s: jax.Array, indices: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Logits of k classes and of one bucket for all others: [s_i / T for i in indices, log sum of exp(s_j / T) over the others].

    Their softmax is that of s / T with the other classes' probabilities added up. Beside the student's own logits no array of
    float32 [..., C] is made: the classes are kept apart by a mask of one byte each.

    Args:
        s: logits [..., C] float.
        indices: [..., k] int, classes that differ from each other.
        temperature: above 0.

    Returns:
        [..., k + 1] float32; the last is -inf where no class is left.

    Raises:
        ValueError: indices of another shape, more than there are classes, or a bad temperature.
    """
    if indices.shape[:-1] != s.shape[:-1] or indices.shape[-1] > s.shape[-1]:
        raise ValueError(
            f"the teacher's classes are {list(indices.shape)} for logits {list(s.shape)}; expected [..., k] for each item's "
            "[..., C], with k up to C"
        )
    check_temperature(temperature)
    return _coarse(s, indices, jnp.float32(1 / temperature))


@jax.custom_vjp
def _coarse(s: jax.Array, indices: jax.Array, inverse: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(s, indices, axis=-1).astype(jnp.float32) * inverse
    kept = jnp.put_along_axis(jnp.zeros(s.shape, bool), indices, True, axis=-1, inplace=False)
    others = jnp.where(kept, -jnp.inf, s.astype(jnp.float32))
    return jnp.concatenate([chosen, jax.nn.logsumexp(others * inverse, axis=-1, keepdims=True)], axis=-1)


def _coarse_forward(
    s: jax.Array, indices: jax.Array, inverse: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    found = _coarse(s, indices, inverse)
    return found, (s, indices, inverse, found[..., -1:])


def _coarse_backward(
    saved: tuple[jax.Array, jax.Array, jax.Array, jax.Array], given: jax.Array
) -> tuple[jax.Array, None, jax.Array]:
    s, indices, inverse, tail = saved
    # An empty bucket has no slope. One that holds classes of -inf alone neither.
    some = tail > -jnp.inf
    share = jnp.exp(s.astype(jnp.float32) * inverse - jnp.where(some, tail, jnp.inf))
    scale = given * inverse
    # What this gives the k classes themselves is replaced, in the same array.
    slope = jnp.put_along_axis((share * scale[..., -1:]).astype(s.dtype), indices, scale[..., :-1].astype(s.dtype), -1, False)
    return slope, None, jnp.zeros_like(inverse)


_coarse.defvjp(_coarse_forward, _coarse_backward)


def on_top_k(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A loss on the logits of both networks as one on a teacher's k classes and tail.

    Args:
        fn: (student logits [..., C], teacher logits [..., C], ...) -> values [...]; not a function of `labels` or of the order of
            the classes, since most of them are in the bucket.

    Returns:
        (s, indices, log_probs, tail, temperature=1.0, t_squared=True, **kw) -> values [...], as `cached_kd`.
    """

    @functools.wraps(fn)
    def loss(
        s: jax.Array,
        indices: jax.Array,
        log_probs: jax.Array,
        tail: jax.Array,
        temperature: float = 1.0,
        t_squared: bool = True,
        **kw: float,
    ) -> jax.Array:
        teacher = _teacher(indices, log_probs, tail)
        return _compared(fn, coarse(s, indices, temperature), teacher, temperature, t_squared, kw)

    del loss.__wrapped__  # its arguments are other ones
    return loss


def on_top_k_head(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`on_top_k` for a student's head: the same values with the same gradients, and the student's logits never exist as a whole.

    Args:
        fn: as for `on_top_k`; adding a constant to an item's logits must not change its value, as with every function of their
            softmax.

    Returns:
        (head, indices, log_probs, tail, temperature=1.0, t_squared=True, chunks=Chunks(), **kw) -> values [...], with head =
        (hidden [..., D], kernel [D, V], bias [V] or None) as in `Outputs.head`, and the rest as for `cached_kd`.
    """

    @functools.wraps(fn)
    def loss(
        head: tuple[jax.Array, jax.Array, jax.Array | None],
        indices: jax.Array,
        log_probs: jax.Array,
        tail: jax.Array,
        temperature: float = 1.0,
        t_squared: bool = True,
        chunks: Chunks = Chunks(),  # noqa: B008  # a tuple of numbers
        **kw: float,
    ) -> jax.Array:
        check_temperature(temperature)
        teacher = _teacher(indices, log_probs, tail)
        return _compared(fn, head_coarse(head, indices, temperature, chunks), teacher, temperature, t_squared, kw)

    del loss.__wrapped__
    return loss


def _teacher(indices: jax.Array, log_probs: jax.Array, tail: jax.Array) -> jax.Array:
    """[..., k + 1]: the teacher's coarse log-probabilities. Raises ValueError on shapes that do not go together."""
    if log_probs.shape != indices.shape or tail.shape != indices.shape[:-1]:
        raise ValueError(
            f"the teacher's log-probabilities are {list(log_probs.shape)} and its tail {list(tail.shape)} for classes "
            f"{list(indices.shape)}; expected {list(indices.shape)} and {list(indices.shape[:-1])}"
        )
    return jnp.concatenate([log_probs, tail[..., None]], axis=-1)


def _compared(
    fn: Callable[..., jax.Array], s: jax.Array, t: jax.Array, temperature: float, t_squared: bool, kw: dict[str, float]
) -> jax.Array:
    """The loss of two coarse distributions, both softened already."""
    values = fn(s, t, temperature=1.0, **kw)
    return values if fn is tvd else squared(values, temperature, t_squared)


def cached_kd(
    s: jax.Array,
    indices: jax.Array,
    log_probs: jax.Array,
    tail: jax.Array,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> jax.Array:
    """T^2 KL(p_t || p_s) over the teacher's k classes and one bucket of all others; `kd` at k = C. The usual weight is 0.9.

    The KL of distributions that were made coarser is a lower bound of the KL (the log-sum inequality). The bucket is the ghost
    token of Anshumann et al. 2025 (Sparse Logit Sampling).

    Args:
        s: student's logits [..., C] float.
        indices: [..., k] int, the teacher's classes.
        log_probs: [..., k] float, its log-probabilities of them at this temperature.
        tail: [...] float, the log of what is left at this temperature; -inf where nothing is. What does not sum to 1 is divided
            by its sum.
        temperature: above 0; softens the student, the teacher is given softened.
        t_squared: False leaves the factor T^2 out.

    Returns:
        [...] float32, 0 or more; 0 where the coarse distributions agree.

    Raises:
        ValueError: shapes that do not go together, a temperature that is not above 0 or not finite.
    """
    return _KD(s, indices, log_probs, tail, temperature, t_squared)


def cached_soft_cross_entropy(
    s: jax.Array,
    indices: jax.Array,
    log_probs: jax.Array,
    tail: jax.Array,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> jax.Array:
    """T^2 times minus the sum of p_t log p_s over k classes and bucket: `cached_kd` plus the coarse teacher's entropy.

    Arguments, shapes, errors and usual weight as for `cached_kd`.
    """
    return _SOFT(s, indices, log_probs, tail, temperature, t_squared)


_KD, _SOFT = on_top_k(kd), on_top_k(soft_cross_entropy)
_OTHERS = (reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd)
LOSSES = {
    "kd": cached_kd,
    "soft_cross_entropy": cached_soft_cross_entropy,
    **{fn.__name__: on_top_k(fn) for fn in _OTHERS},
}
HEAD_LOSSES = {fn.__name__: on_top_k_head(fn) for fn in (kd, soft_cross_entropy, *_OTHERS)}
