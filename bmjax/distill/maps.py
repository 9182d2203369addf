"""Losses on the maps of a convolutional network, or on the tokens of a transformer as a map.

Maps of different size are average-pooled to the smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from bmjax.distill.shapes import check_axes, same_size, unit


def attention_transfer(s: jax.Array, t: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean over positions and examples of (Q_s - Q_t)^2 (Zagoruyko & Komodakis 2017, eq. 2, per position).

    Q is the mean over the channels of the square, L2-normalised over the positions. The usual weight is 1000. Widths may differ.

    Args:
        s, t: student's and teacher's features [B, ..., C] float.
        mask: [B, ...] bool, the positions that count; None for all.

    Returns:
        float32 scalar, 0 at s = t.

    Raises:
        ValueError: no axis of positions, or positions that differ and are no maps.
    """
    s, t, kept = _energies("attention_transfer", s, t, mask)
    return _mean(jnp.square(s - t), kept)


def factor_transfer(s: jax.Array, t: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean over positions and examples of |Q_s - Q_t|, on the maps of `attention_transfer` (after Kim et al. 2018, eq. 5).

    The paper's factors come from a trained paraphraser and a translator; here the maps are the factors. The usual weight is 200.

    Args, result and errors as for `attention_transfer`.
    """
    s, t, kept = _energies("factor_transfer", s, t, mask)
    return _mean(jnp.abs(s - t), kept)


def _positions(name: str, s: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both at one size. Raises ValueError where there are no positions, or different ones."""
    s, t = same_size(name, s, t)
    if s.ndim < 3 or s.shape[:-1] != t.shape[:-1]:
        shapes = f"the student's feature is {list(s.shape)} and the teacher's {list(t.shape)}"
        raise ValueError(f"{name}: {shapes}; expected the same positions in both, between the first axis and the last")
    return s, t


def _energies(name: str, s: jax.Array, t: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B, P] of both, and the positions that count, as numbers."""
    s, t = _positions(name, s, t)
    kept = jnp.ones(s.shape[:-1], bool) if mask is None else mask
    flat = lambda x: jnp.where(kept[..., None], x, 0.0)
    s, t = (unit(jnp.mean(jnp.square(flat(x)), axis=-1).reshape(len(x), -1), -1) for x in (s, t))
    return s, t, kept.reshape(len(kept), -1).astype(jnp.float32)


def _mean(values: jax.Array, kept: jax.Array) -> jax.Array:
    """The mean over the examples of each one's mean over the positions that count."""
    return jnp.mean(jnp.sum(values * kept, -1) / jnp.maximum(jnp.sum(kept, -1), 1.0))


def nst(s: jax.Array, t: jax.Array) -> jax.Array:
    """The squared maximum mean discrepancy between the channels of the two maps (Huang & Wang 2017, eq. 4 and 8).

    Each channel is a vector over the positions, L2-normalised; the kernel is (x.y)^2, and the three means are over all pairs of
    channels. The usual weight is 50. Widths may differ.

    Args:
        s, t: student's and teacher's maps [B, ..., C] float.

    Returns:
        float32 scalar, 0 at s = t; the mean over the examples.

    Raises:
        ValueError: as for `attention_transfer`.
    """
    s, t = _positions("nst", s, t)
    s, t = (unit(x.reshape(len(x), -1, x.shape[-1]), 1) for x in (s, t))
    kernel = lambda x, y: jnp.mean(jnp.square(jnp.einsum("bpi,bpj->bij", x, y, precision="highest")))
    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


def fsp(s: Sequence[jax.Array], t: Sequence[jax.Array]) -> jax.Array:
    """Mean of (F_s - F_t)^2, with F [C_a, C_b] the products of the channels of two layers, averaged over the positions
    (Yim et al. 2017, eq. 1 and 2, the flow of solution procedure, per entry).

    The usual weight is 50. In `losses.on_features` pass together=True, and two layers.

    Args:
        s, t: two maps [B, H, W, C_a] and [B, H, W, C_b] of each network; of the same widths in both networks.

    Returns:
        float32 scalar, 0 at s = t.

    Raises:
        ValueError: not two maps each, or other widths.
    """
    if len(s) != 2 or len(t) != 2:
        raise ValueError(f"fsp: {len(s)} maps of the student and {len(t)} of the teacher; expected two each, with together=True")
    flows = []
    for a, b in (s, t):
        for x in (a, b):
            check_axes("fsp", x, "B, H, W, C")
        a, b = same_size("fsp", a, b)
        flows.append(jnp.einsum("bhwi,bhwj->bij", a, b, precision="highest") / (a.shape[1] * a.shape[2]))
    if flows[0].shape != flows[1].shape:
        raise ValueError(
            f"fsp: the student's maps give {list(flows[0].shape)}, the teacher's {list(flows[1].shape)}; the widths must agree"
        )
    return jnp.mean(jnp.square(flows[0] - flows[1]))
