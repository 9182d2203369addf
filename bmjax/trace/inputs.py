"""What enters a linear layer, over all batches: its second moments, and what a change of the kernel does to the output."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bmjax.trace.terms import Prod, Term, resolve

_EXACT = lax.Precision.HIGHEST  # second moments are inverted, which TF32 does not survive


@dataclasses.dataclass(frozen=True)
class Window:
    """The parameters of an ungrouped convolution, as `lax.conv_general_dilated_patches` takes them."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rows:
    """How a layer's input becomes rows [N, in].

    Attributes:
        order: the input's axes, those that are not contracted first; of a convolution (batch, channels, *spatial).
        inputs: numbers in a row.
        window: of a convolution, whose rows are patches, channels innermost; None for a product.
        sizes: of the axes that make up N, outer to inner.
        spans: for each axis of the weights, which of `sizes` it is, (first, past the last); None if it is none of them.
    """

    order: tuple[int, ...]
    inputs: int
    window: Window | None
    sizes: tuple[int, ...]
    spans: tuple[tuple[int, int] | None, ...] = ()

    @property
    def counted(self) -> bool:
        """Whether an example of weight 0 can be told from the others in the rows."""
        return bool(self.spans) and self.spans[0] is not None

    def of(self, value: jax.Array) -> jax.Array:
        """float32 [N, inputs] of what enters the layer."""
        value = value.astype(jnp.float32).transpose(self.order)
        if self.window is not None:
            patches = lax.conv_general_dilated_patches(
                value,
                self.window.shape,
                self.window.strides,
                self.window.padding,
                self.window.lhs_dilation,
                self.window.rhs_dilation,
                precision=_EXACT,
            )
            value = patches.reshape(value.shape[0], value.shape[1], self.inputs // value.shape[1], -1).transpose(0, 3, 2, 1)
        return value.reshape(-1, self.inputs)

    def mask(self, weights: jax.Array) -> jax.Array:
        """bool [N]: rows of what has a weight above 0; weights are [B], or [B, T]."""
        stay = weights > 0
        for axis in reversed(range(stay.ndim)):
            if self.spans[axis] is None:
                stay = stay.any(axis=axis)
        spans = [span for span in self.spans if span is not None]
        stay = stay.transpose(sorted(range(len(spans)), key=lambda axis: spans[axis]))
        inside = {place for first, end in spans for place in range(first, end)}
        shape = [size if place in inside else 1 for place, size in enumerate(self.sizes)]
        return jnp.broadcast_to(stay.reshape(shape), self.sizes).reshape(-1)


def factors(term: Term) -> list[Term]:
    """What an axis is merged from, outer to inner, without axes of 1."""
    term = resolve(term)
    return list(term.parts) if isinstance(term, Prod) else [term] if term.size != 1 else []


def spans(rows: Sequence[Term], axes: Sequence[Term]) -> tuple[tuple[int, int] | None, ...]:
    """Where in the factors of rows each of `axes` stands, as in `Rows`; () where that cannot be told."""

    def find(axis: Term) -> list[tuple[int, int]]:
        wanted = factors(axis)
        starts = range(len(rows) - len(wanted) + 1 if wanted else 1)
        return [(i, i + len(wanted)) for i in starts if all(one is other for one, other in zip(rows[i:], wanted))]

    found = [find(axis) for axis in axes]
    parts = [part for axis in axes for part in factors(axis)]
    if any(len(places) > 1 for places in found) or len(set(map(id, parts))) < len(parts):
        return ()  # attention over the batch, or a function that adds something by example to something by position
    return tuple(places[0] if places else None for places in found)


@functools.partial(jax.jit, static_argnums=0)
def _gram(rows: Rows, value: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    x, count = _masked(rows, value, weights)
    return jnp.matmul(x.T, x, precision=_EXACT), count


@functools.partial(jax.jit, static_argnums=0)
def _squares(rows: Rows, value: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    x, count = _masked(rows, value, weights)
    return jnp.sum(jnp.square(x), axis=0), count


@functools.partial(jax.jit, static_argnums=0)
def _changes(
    rows: Rows, value: jax.Array, weights: jax.Array | None, old: jax.Array, new: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sums of squares (of what the output changes by, of the output)."""
    x, _ = _masked(rows, value, weights)
    return tuple(jnp.sum(jnp.square(jnp.matmul(x, kernel, precision=_EXACT))) for kernel in (new - old, old))  # type: ignore[return-value]


def _masked(rows: Rows, value: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(rows, zero where they do not count; how many count)."""
    x = rows.of(value)
    if weights is None or not rows.counted:
        return x, jnp.int32(math.prod(rows.sizes))
    stay = rows.mask(weights)
    return jnp.where(stay[:, None], x, 0.0), jnp.sum(stay, dtype=jnp.int32)


_add = jax.jit(lambda x, y: jax.tree.map(jnp.add, x, y), donate_argnums=0)


class Inputs:
    """What enters one linear layer, over all calibration batches; statistics are made when they are asked for and kept.

    Layers of the same input (query, key and value) get the same object. It is of use only while its layer is visited.

    Attributes:
        rows: how the input becomes rows.
        counted: whether positions of weight 0 are left out; False if there are no weights, or the layer's rows lost track of
            the batch's axes.
    """

    def __init__(self, rows: Rows, values: Sequence[jax.Array], weights: Sequence[Any] | None):
        self.rows = rows
        self.counted = weights is not None and rows.counted
        self._values = values
        self._weights: Sequence[Any] = weights if weights is not None else [None] * len(values)
        self._found: dict[str, jax.Array] = {}

    def gram(self) -> jax.Array:
        """X^T X / N, float32 [in, in], over all positions of all batches and devices."""
        return self._mean("gram", _gram)

    def square_mean(self) -> jax.Array:
        """The mean square of each input, float32 [in]."""
        if "gram" in self._found:
            return jnp.diagonal(self._found["gram"])
        return self._mean("squares", _squares)

    def relative_error(self, old: jax.Array, new: jax.Array) -> float:
        """|X (new - old)|^2 / |X old|^2 for kernels [in, out]; 0 where the output was 0 and stays so."""
        kernels = (old.astype(jnp.float32), new.astype(jnp.float32))
        parts = [_changes(self.rows, value, weights, *kernels) for value, weights in zip(self._values, self._weights)]
        changed, whole = np.asarray(jax.device_get(parts), np.float64).sum(axis=0)
        return float(changed / whole) if whole else float(changed and np.inf)

    def _mean(self, name: str, sums: Callable[..., tuple[jax.Array, jax.Array]]) -> jax.Array:
        if name not in self._found:
            (value, *values), (weight, *weights) = self._values, self._weights
            total, count = sums(self.rows, value, weight)
            counts = [count]
            for value, weight in zip(values, weights):
                part, count = sums(self.rows, value, weight)
                total = _add(total, part)
                counts.append(count)
            self._found[name] = total / max(sum(map(int, counts)), 1)
        return self._found[name]
