"""What networks refuse before anything is compiled; each of these raises ValueError with one line that says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp


def check_capture(capture: Sequence[str], features: Sequence[str]) -> None:
    """Raises ValueError if a captured name is not one of the features; of many it names the nearest."""
    for name in capture:
        if name not in features:
            few = len(features) <= 4
            listed = features if few else difflib.get_close_matches(name, features, n=4, cutoff=0)
            what = "there are" if few else f"the nearest of {len(features)} are"
            raise ValueError(f"there is no feature {name!r}; {what} {', '.join(listed)}")


def check_sizes(sizes: Mapping[str, int], axes: Mapping[str, tuple[str, int]]) -> None:
    """Raises ValueError if a size is none of the model's, or below 1."""
    for name, size in sizes.items():
        if name not in axes:
            raise ValueError(f"this model has no size {name!r}; it has {', '.join(axes) or 'none'}")
        if size < 1:
            raise ValueError(f"the size {name!r} cannot be {size}; at least 1 must stay")


def check_heads(width: int, heads: int, head_dim: int | None) -> None:
    """Raises ValueError if the size of a head follows from the width and the heads do not divide it."""
    if head_dim is None and width % heads:
        below = max(width // heads, 1) * heads
        raise ValueError(f"width {width} does not divide into {heads} heads; take a multiple, as {below}, or set head_dim")


def check_sequence(shape: Sequence[int], length: int | None) -> None:
    """Raises ValueError if one example's `shape` is not (T,), or T is above the `length` of learned positions."""
    if len(shape) != 1:
        raise ValueError(f"a token model needs sequences [T] of ints; the data has {list(shape)}")
    if length is not None and shape[0] > length:
        raise ValueError(f"sequences of {shape[0]} tokens are longer than the {length} learned positions; raise `length`")


def check_tokens(tokens: jax.Array, length: int | None) -> None:
    """Raises ValueError unless `tokens` are ints [B, T] with a position for each; shapes are static, so under `jit` too."""
    check_sequence(tokens.shape[1:], length)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"a token model needs sequences [T] of ints; the inputs are {tokens.dtype}: take data of token ids")
