"""Which axes of a kernel a layer contracts, and which are its outputs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bmjax.trace.layout import Place, memory
from bmjax.trace.linear import Linear


class Sides(NamedTuple):
    """The axes of a kernel by what the layer does with them, counted from the last one, -1; a stacked axis is in none.

    Attributes:
        taps: that a convolution slides along.
        inputs: that are contracted, innermost last.
        outputs: that are left.
    """

    taps: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def sides_of(layer: Linear, whole: tuple[int, ...]) -> Sides | None:
    """From the strides of a view of a dummy; None where the kernel is no view of its parameter."""
    dummy = np.empty(whole, np.int8)
    matrix = memory(Place(layer.path, layer.place.uncast.chain[:-1]), dummy, layer.at)
    if matrix is None:
        return None
    inner = int(np.searchsorted(np.cumprod((1, *matrix.shape)), layer.inputs))  # so many of the view's axes are contracted
    found: list[list[tuple[int, int]]] = [[], [], []]
    for axis, step in enumerate(dummy.strides):
        # An axis of the parameter moves along the axis of the view whose stride is the largest that fits into its own.
        fits = [(t, i) for i, (t, n) in enumerate(zip(matrix.strides, matrix.shape)) if step % t == 0 and step // t < n]
        if fits:
            _, i = max(fits)
            found[0 if i < layer.taps else 1 if i < inner else 2].append((i, axis - len(whole)))
    return Sides(*(tuple(axis for _, axis in sorted(side)) for side in found))
