"""What the losses on features share: checks, pooling to a common size, unit vectors, and examples as weighted rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_TINY = 1e-30  # a largest entry below this is none: float32 divides by hardly less


def check_same(name: str, s: jax.Array, t: jax.Array) -> None:
    """Raises ValueError if two features differ in shape."""
    if s.shape == t.shape:
        return
    what = f"{name}: the student's feature is {list(s.shape)} and the teacher's {list(t.shape)}"
    if s.shape[:-1] == t.shape[:-1]:
        raise ValueError(f'{what}; give losses.on_features project="linear", which maps one width to the other')
    raise ValueError(f"{what}; all axes but the last must agree")


def check_axes(name: str, x: jax.Array, axes: str) -> None:
    """Raises ValueError if an array has not the axes that are named, such as "B, H, W, C"."""
    if x.ndim != len(axes.split(", ")):
        raise ValueError(f"{name}: expected arrays [{axes}], and one is {list(x.shape)}")


def same_size(name: str, s: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as float32; of two maps [B, H, W, C] of different size, the larger is average-pooled to the smaller, axis by axis.

    Raises:
        ValueError: another number of axes, or of examples.
    """
    s, t = jnp.asarray(s, jnp.float32), jnp.asarray(t, jnp.float32)
    if s.ndim != t.ndim or s.ndim < 2 or len(s) != len(t):
        shapes = f"the student's feature is {list(s.shape)} and the teacher's {list(t.shape)}"
        raise ValueError(f"{name}: {shapes}; all axes but the last must agree")
    if s.ndim == 4:
        for axis in (1, 2):
            size = min(s.shape[axis], t.shape[axis])
            s, t = pooled(s, axis, size), pooled(t, axis, size)
    return s, t


def pooled(x: jax.Array, axis: int, size: int) -> jax.Array:
    """One axis averaged down to `size` windows; window i covers floor(i n / size) up to ceil((i + 1) n / size)."""
    n = x.shape[axis]
    if n == size:
        return x
    window = np.zeros((size, n), np.float32)
    for i in range(size):
        begin, end = i * n // size, -(-(i + 1) * n // size)
        window[i, begin:end] = 1 / (end - begin)
    return jnp.moveaxis(jnp.tensordot(window, x, ((1,), (axis,)), precision="highest"), 0, axis)


def unit(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """x over its L2 norm, whatever its scale; a vector of zeros stays one, with a slope of about 1."""
    x = scaled(x, axis)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=axis, keepdims=True), 0.5))


def scaled(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """x over its largest entry, so that squares neither vanish nor overflow; zeros stay.

    The largest entry has no derivative here: what is made of the result must not depend on its scale.
    """
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=axis, keepdims=True)
    return x / jnp.where(largest > _TINY, largest, 1.0)


def rows(name: str, s: jax.Array, t: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The examples of both networks as rows, and the share of each.

    Args:
        name: of the loss.
        s, t: [B, ...]; maps [B, H, W, C] of different size are average-pooled to the smaller.
        weights: [B], 0 or more, or None for 1 each. An example of weight w counts as w equal examples; one of weight 0 may hold
            anything, NaN included.

    Returns:
        s [B, D], t [B, E] and weights [B] that sum to 1 (or all 0), float32.

    Raises:
        ValueError: another number of examples, or weights of another shape.
    """
    if s.ndim == t.ndim == 4:
        s, t = same_size(name, s, t)
    if len(s) != len(t):
        raise ValueError(f"{name}: the student has {len(s)} examples and the teacher {len(t)}; they must agree")
    weights = jnp.ones(len(s)) if weights is None else jnp.asarray(weights, jnp.float32)
    if weights.shape != s.shape[:1]:
        raise ValueError(f"{name}: weights {list(weights.shape)} for {len(s)} examples; give one for each")
    flat = lambda x: jnp.where(weights[:, None] > 0, jnp.asarray(x, jnp.float32).reshape(len(x), -1), 0.0)
    total = weights.sum()
    return flat(s), flat(t), jax.lax.stop_gradient(weights / jnp.where(total > 0, total, 1.0))


def gram(x: jax.Array) -> jax.Array:
    """[B, B]: the products of all pairs of rows, in full precision on every device."""
    return jnp.matmul(x, x.T, precision="highest")
