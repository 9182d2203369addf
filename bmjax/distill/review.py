"""Knowledge review: the student's deeper stages help its earlier ones to meet the teacher's (Chen et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bmjax.distill.shapes import check_axes, check_same, pooled, same_size
from bmjax.types import Params

_LEVELS = (4, 2, 1)  # sizes of the pyramid below the whole map; each counts half as much as the one before


def review_kd(s: Sequence[jax.Array], t: Sequence[jax.Array], fusion: Params) -> jax.Array:
    """Sum over the stages of the hierarchical context loss of the fused student map (Chen et al. 2021, eq. 6 and figure 3).

    From the last stage to the first, a 1x1 convolution takes the student's map to a common width, attention over the two mixes it
    with the deeper stage's, upsampled (figure 3a, without the batch norms), and a 3x3 convolution takes the mix to the teacher's
    width. The context loss is the mean squared error of the maps and of their average pools of size 4, 2 and 1, weighted 1, 1/2,
    1/4, 1/8 and divided by the sum of those weights that are used. The paper's weight is 0.6 to 8.

    In a term: `on_features(review_kd, layers, together=True, trained={"fusion": review_fusion})`, stages in the order of depth.

    Args:
        s, t: student's and teacher's maps [B, H, W, C] of each stage, the first stage first; widths and sizes may differ.
        fusion: from `review_fusion`.

    Returns:
        float32 scalar.

    Raises:
        ValueError: another number of stages, or no maps.
    """
    _check(s, t)
    value, deeper = jnp.float32(0), None
    for stage in reversed(range(len(s))):
        own = fusion[str(stage)]
        x = jnp.asarray(s[stage], jnp.float32) @ own["enter"]
        if deeper is not None:
            above = jax.image.resize(deeper, x.shape, "nearest")
            gates = jax.nn.sigmoid(jnp.concatenate([x, above], axis=-1) @ own["gate"] + own["gate_bias"])
            x = x * gates[..., :1] + above * gates[..., 1:]
        deeper = x
        fused = jax.lax.conv_general_dilated(x, own["leave"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        value += _context(fused, t[stage])
    return value


def review_fusion(key: jax.Array, s: Sequence[Any], t: Sequence[Any]) -> Params:
    """The `fusion` of `review_kd` to start with: {stage: {"enter", "gate", "gate_bias", "leave"}}.

    Args:
        key: PRNG key.
        s, t: the maps or their abstract shapes. The common width is the widest of the student's, at most 512.
    """
    _check(s, t)
    width = min(max(x.shape[-1] for x in s), 512)
    init, fusion = jax.nn.initializers.lecun_normal(), {}
    for stage, (mine, theirs) in enumerate(zip(s, t)):
        keys = jax.random.split(jax.random.fold_in(key, stage), 3)
        fusion[str(stage)] = {
            "enter": init(keys[0], (mine.shape[-1], width)),
            "leave": init(keys[1], (3, 3, width, theirs.shape[-1])),
        }
        if stage < len(s) - 1:  # the last stage has none deeper
            fusion[str(stage)] |= {"gate": init(keys[2], (2 * width, 2)), "gate_bias": jnp.zeros(2)}
    return fusion


def _check(s: Sequence[Any], t: Sequence[Any]) -> None:
    if len(s) != len(t) or not len(s):
        raise ValueError(f"review_kd: {len(s)} stages of the student and {len(t)} of the teacher; expected as many, 1 or more")
    for x in (*s, *t):
        check_axes("review_kd", x, "B, H, W, C")


def _context(s: jax.Array, t: jax.Array) -> jax.Array:
    s, t = same_size("review_kd", s, t)
    check_same("review_kd", s, t)
    value, total, share = jnp.mean(jnp.square(s - t)), 1.0, 1.0
    for size in _LEVELS:
        if size >= min(s.shape[1:3]):
            continue
        share /= 2
        small = [pooled(pooled(x, 1, size), 2, size) for x in (s, t)]
        value += share * jnp.mean(jnp.square(small[0] - small[1]))
        total += share
    return value / total
