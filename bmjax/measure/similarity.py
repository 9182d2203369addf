"""How alike two networks see the same examples: linear CKA.

Functions here see the global batch, whoever splits it: sums run over `parallel.collectives`.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from bmjax.parallel import collectives

_TINY = 1e-30
_ROUNDING = 1e-12  # variance over squared mean that float32 makes of a constant


def linear_cka(x: jax.Array, y: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """||Y' X||^2 / (||X' X|| ||Y' Y||), Frobenius norms of centred features (Kornblith et al. 2019, section 3).

    1 for features that are a rotation and a scaling of each other. With fewer examples than features it is near 1 for anything:
    there `minibatch_cka` tells more.

    Args:
        x, y: [n, p] and [n, q] float, rows of the same examples.
        weights: [n], 0 or more, how much each row counts; a row of weight 0 may hold anything. None counts all alike.

    Returns:
        float32 scalar in [0, 1]; 0 where a network sees all examples alike.

    Raises:
        ValueError: other axes, or another number of rows.
    """
    weights = _checked("linear_cka", x, y, weights)
    x, y = (_centred(z, weights, scaled=True) for z in (x, y))  # its fourth powers must not overflow
    weighted = lambda z: weights[:, None] * z
    square = lambda a, b: jnp.sum(jnp.square(collectives.psum(jnp.matmul(weighted(a).T, b, precision="highest"))))
    within = jnp.sqrt(square(x, x)) * jnp.sqrt(square(y, y))
    return jnp.where(within > _TINY, square(y, x) / jnp.maximum(within, _TINY), 0.0)


def hsic(x: jax.Array, y: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """The unbiased estimate of the independence criterion of two linear kernels (Song et al. 2012, equation 5).

    With K and L the Gram matrices, their diagonals set to 0: (tr(K L) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 1'K L 1 / (n - 2)) /
    (n (n - 3)).

    Args:
        x, y: [n, p] and [n, q] float, n of 4 or more that count.
        weights: [n]; rows of weight 0 are left out, all others count alike. None for all.

    Returns:
        float32 scalar, around 0 for features that have nothing to do with each other; 0 where fewer than 4 rows count.

    Raises:
        ValueError: other axes, or another number of rows.
    """
    weights = _checked("hsic", x, y, weights)
    weights = (weights > 0).astype(jnp.float32)
    # Centring changes nothing in the estimate, and much in the rounding.
    x, y, weights = collectives.all_gather((_centred(x, weights), _centred(y, weights), weights))
    pairs = weights[:, None] * weights[None] * (1 - jnp.eye(len(weights)))
    k, m = (jnp.matmul(z, z.T, precision="highest") * pairs for z in (x, y))
    n = jnp.maximum(jnp.sum(weights), 4.0)
    ends = jnp.sum(k) * jnp.sum(m) / ((n - 1) * (n - 2)) - 2 * jnp.sum(k.sum(0) * m.sum(0)) / (n - 2)
    return jnp.where(jnp.sum(weights) >= 4, (jnp.sum(k * m) + ends) / (n * (n - 3)), 0.0)


def minibatch_cka(batches: Iterable[tuple[jax.Array, ...]]) -> jax.Array:
    """CKA over batches that are never held together: sums of `hsic` (Nguyen et al. 2021, equation 3).

    Unlike `linear_cka` it has no bias towards 1 where features outnumber examples, so it may be below 0 by chance.

    Args:
        batches: (x, y) or (x, y, weights) of each batch, as for `hsic`.

    Returns:
        float32 scalar, 1 at most up to chance.

    Raises:
        ValueError: there is no batch; as `hsic`.
    """
    sums = [jnp.stack([hsic(x, y, *w), hsic(x, x, *w), hsic(y, y, *w)]) for x, y, *w in batches]
    if not sums:
        raise ValueError("minibatch_cka was given no batch; give (x, y) of one or more")
    both, own, other = sum(sums[1:], start=sums[0])
    within = jnp.sqrt(jnp.maximum(own, 0)) * jnp.sqrt(jnp.maximum(other, 0))
    return jnp.where(within > _TINY, both / jnp.maximum(within, _TINY), 0.0)


def _checked(name: str, x: jax.Array, y: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The weights, float32 [n]. Raises ValueError if the shapes do not go together."""
    weights = jnp.ones(x.shape[:1]) if weights is None else weights
    if x.ndim != 2 or y.ndim != 2 or not len(x) == len(y) == len(weights) or weights.ndim != 1:
        shapes = ", ".join(str(list(z.shape)) for z in (x, y, weights))
        raise ValueError(f"{name}: features and weights are {shapes}; expected [n, p], [n, q] and [n], of the same n examples")
    return weights.astype(jnp.float32)


def _centred(x: jax.Array, weights: jax.Array, *, scaled: bool = False) -> jax.Array:
    """Rows that count, less their weighted mean, in float32; the others are 0. If scaled, of a total variance of 1, or 0."""
    x = jnp.where(weights[:, None] > 0, x.astype(jnp.float32), 0.0)
    mean, variance = collectives.moments(x, weights)
    centred = jnp.where(weights[:, None] > 0, x - mean, 0.0)
    if not scaled:
        return centred
    # What is left of constant features is rounding, which must not be blown up.
    total, least = jnp.sum(variance), _ROUNDING * jnp.sum(jnp.square(mean))
    return centred * jnp.where(total > least, jax.lax.rsqrt(jnp.maximum(total, _TINY)), 0.0)
