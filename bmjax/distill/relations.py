"""Losses on the relations between the examples of a batch.

Each takes `weights` [B]: an example of weight w counts as w equal examples, so padding of weight 0 is left out. B is the batch
that the relations are over; `losses.on_features` gives the global one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from bmjax.distill.numerics import check_pair, check_temperature, known, log_probabilities, squared
from bmjax.distill.shapes import gram, rows, scaled, unit

_FLAT = 2e-6  # deviation over root mean square of what does not vary but by rounding


def similarity(s: jax.Array, t: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """|G_s - G_t|^2 / B^2, the rows of each Gram matrix L2-normalised (Tung & Mori 2019, similarity-preserving, eq. 4).

    The paper's weight is 3000. Widths and sizes may differ.

    Args:
        s, t: student's and teacher's features [B, ...] float; each example is flattened.
        weights: [B] or None.

    Returns:
        float32 scalar, 0 at s = t.

    Raises:
        ValueError: another number of examples, or weights of another shape.
    """
    s, t, share = rows("similarity", s, t, weights)
    # Rows hold each example as often as it counts; the common factor B cancels.
    difference = jnp.square(_rows_of_length_1(s, share) - _rows_of_length_1(t, share))
    count = jnp.asarray(len(share), jnp.float32) if weights is None else jnp.sum(jnp.asarray(weights, jnp.float32))
    return share @ difference @ share / jnp.where(count > 0, count, 1.0)


def _rows_of_length_1(x: jax.Array, share: jax.Array) -> jax.Array:
    products = scaled(gram(x), 1)
    squares = jnp.sum(share * jnp.square(products), axis=1, keepdims=True)
    return products * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0))


def correlation(s: jax.Array, t: jax.Array, gamma: float = 0.4, order: int = 2, weights: jax.Array | None = None) -> jax.Array:
    """|K_s - K_t|^2 / B^2, with K the Gaussian RBF kernel of the L2-normalised examples (Peng et al. 2019, eq. 6 and 9).

    The kernel exp(-gamma |x - y|^2) is expanded: exp(-2 gamma) times the sum of (2 gamma x.y)^p / p! for p = 0 to `order`. The
    usual weight is 0.02 times B^2.

    Args, errors as for `similarity`, and
        gamma: above 0.
        order: of the expansion, 1 or more.

    Returns:
        float32 scalar, 0 at s = t.
    """
    gamma = known(gamma)
    if order < 1 or (isinstance(gamma, int | float) and not 0 < gamma < math.inf):
        raise ValueError(f"correlation: gamma is {gamma} and order {order}; expected a number above 0 and 1 or more")
    s, t, share = rows("correlation", s, t, weights)

    def kernel(x: jax.Array) -> jax.Array:
        near = 2 * gamma * gram(unit(x, -1))
        return jnp.exp(-2 * gamma) * sum((near**p / math.factorial(p) for p in range(1, order + 1)), start=jnp.ones_like(near))

    return share @ jnp.square(kernel(s) - kernel(t)) @ share


def rkd(s: jax.Array, t: jax.Array, distance: float = 25.0, angle: float = 50.0, weights: jax.Array | None = None) -> jax.Array:
    """distance times L_D plus angle times L_A, Huber losses of relations (Park et al. 2019, eq. 5 and 8).

    L_D compares the distances of all pairs, each divided by its network's mean over the pairs that are apart; L_A the cosines of
    the angles at each example between all pairs of others. Both are means over all B^2 pairs and B^3 triples, in which those with
    equal members count 0. The weight is in the arguments: the paper's are 25 and 50. Takes memory of B^2 (B + D).

    Args, errors as for `similarity`.

    Returns:
        float32 scalar, 0 at s = a t + b with a > 0.
    """
    s, t, share = rows("rkd", s, t, weights)
    apart = [x[None] - x[:, None] for x in (s, t)]  # [at, to, D]
    pairs = _huber(_distances(apart[0], share), _distances(apart[1], share))
    distance, angle = known(distance), known(angle)
    off = lambda weight: isinstance(weight, int | float) and weight == 0  # a traced one is computed in any case
    value = jnp.float32(0) if off(distance) else distance * (share @ pairs @ share)
    if not off(angle):
        cosines = [jnp.einsum("abd,acd->abc", e, e, precision="highest") for e in (unit(x, -1) for x in apart)]
        value += angle * jnp.einsum("a,b,c,abc->", share, share, share, _huber(*cosines))
    return value


def _distances(apart: jax.Array, share: jax.Array) -> jax.Array:
    """[B, B]: over their mean among the pairs that are apart."""
    square = jnp.sum(jnp.square(apart), axis=-1)
    far = square > 0
    found = jnp.where(far, jnp.sqrt(jnp.where(far, square, 1.0)), 0.0)
    pairs = share @ far.astype(jnp.float32) @ share
    mean = share @ found @ share / jnp.where(pairs > 0, pairs, 1.0)
    return found / jnp.where(mean > 0, mean, 1.0)


def _huber(x: jax.Array, y: jax.Array) -> jax.Array:
    gap = jnp.abs(x - y)
    return jnp.where(gap < 1, 0.5 * jnp.square(gap), gap - 0.5)


def pkt(s: jax.Array, t: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Mean over all B^2 entries of p log(p / q) (Passalis & Tefas 2018, eq. 5-7, probabilistic knowledge transfer).

    p and q are (cosine + 1) / 2 between the examples of the teacher and of the student, each row normalised to probabilities. The
    usual weight is 30000. Invariant to rotations and scale of the features.

    Args, errors as for `similarity`.

    Returns:
        float32 scalar, 0 or more; 0 at s = t.
    """
    s, t, share = rows("pkt", s, t, weights)
    p, q = (_neighbours(x, share) for x in (t, s))
    # p and q are B times the probabilities of the rows: the factor cancels in the ratio, and leaves one 1 / B.
    parts = p * (jnp.log(p + 1e-7) - jnp.log(q + 1e-7))
    count = jnp.asarray(len(share), jnp.float32) if weights is None else jnp.sum(jnp.asarray(weights, jnp.float32))
    return share @ parts @ share / jnp.where(count > 0, count, 1.0)


def _neighbours(x: jax.Array, share: jax.Array) -> jax.Array:
    near = (gram(unit(x, -1)) + 1) / 2
    total = jnp.sum(share * near, axis=1, keepdims=True)
    return near / jnp.where(total > 0, total, 1.0)


def dist(
    s: jax.Array,
    t: jax.Array,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    t_squared: bool = True,
    weights: jax.Array | None = None,
) -> jax.Array:
    """T^2 (beta inter + gamma intra): the correlations of two matrices of probabilities (Huang et al. 2022, DIST, eq. 9-11).

    inter is the mean over the items of 1 - Pearson's r between the two rows of class probabilities; intra the mean over the
    classes of 1 - r between the two columns. What varies in neither network is left out of the mean, and what varies in one alone
    has r = 0: of saturated outputs most classes never vary. Classes that both mask by -inf take no part. The paper's weights are
    beta = gamma = 1 at T = 1 on ImageNet, 2 and 2 at T = 4 on CIFAR, beside the task's loss.

    Args:
        s, t: student's and teacher's logits [..., C] float; all leading axes count items.
        beta, gamma: of the two parts.
        temperature: above 0.
        t_squared: False leaves the factor T^2 out.
        weights: [...] or None; an item of weight w counts as w equal items, one of weight 0 is left out.

    Returns:
        float32 scalar in [0, 2 T^2 (beta + gamma)]; 0 at s = t.

    Raises:
        ValueError: shapes that differ, a temperature that is not above 0 or not finite.
    """
    check_pair("dist", s, t)
    check_temperature(temperature)
    flat = lambda x: x.reshape(-1, x.shape[-1])
    q, p, share = rows("dist", flat(s), flat(t), None if weights is None else jnp.ravel(weights))
    there = (q > -jnp.inf) | (p > -jnp.inf)
    q, p = (jnp.exp(log_probabilities(x, temperature)) for x in (q, p))
    mean = lambda x: jnp.sum(x, 1, keepdims=True) / jnp.maximum(jnp.sum(there, 1, keepdims=True), 1)
    inter = _uncorrelated([jnp.where(there, x - mean(x), 0.0) for x in (q, p)], (q, p), share, 1)
    root = jnp.sqrt(share)[:, None]
    intra = _uncorrelated([root * (x - share @ x) for x in (q, p)], [root * x for x in (q, p)], jnp.ones(q.shape[1]), 0)
    return squared(beta * inter + gamma * jnp.where(share.sum() > 0, intra, 0.0), temperature, t_squared)


def _uncorrelated(centred: Sequence[jax.Array], whole: Sequence[jax.Array], share: jax.Array, axis: int) -> jax.Array:
    """The mean of 1 - r along an axis, with weights, over what varies in one of two networks at least; 0 if nothing does."""
    square = lambda x: jnp.sum(jnp.square(jax.lax.stop_gradient(scaled(x, axis))), axis=axis)
    largest = lambda x: jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=axis)
    varies = [jnp.sqrt(square(c)) * largest(c) > _FLAT * jnp.sqrt(square(x)) * largest(x) for c, x in zip(centred, whole)]
    r = jnp.sum(_varying(centred[0], varies[0], axis) * _varying(centred[1], varies[1], axis), axis=axis)
    weights = share * (varies[0] | varies[1])
    total = jnp.sum(weights)
    return jnp.sum(weights * (1 - r)) / jnp.where(total > 0, total, 1.0)


def _varying(x: jax.Array, varies: jax.Array, axis: int) -> jax.Array:
    return unit(jnp.where(jnp.expand_dims(varies, axis), x, 0.0), axis)
