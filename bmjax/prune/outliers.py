"""OWL: layers with many outliers are pruned less. Yin et al. 2023, arXiv 2310.05175."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bmjax import trees
from bmjax.prune.reconstruction import Target, wanda_scores
from bmjax.trace import Inputs, Linear, Linears
from bmjax.types import Params


class Owl(NamedTuple):
    """Settings of `owl`: what counts as an outlier, in means, and the largest difference from the target."""

    outlier: float
    spread: float


def owl_sparsities(ratios: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """Sparsities of blocks, lower where there are more outliers: within `spread` of the target, whose mean by size they keep.

    Args:
        ratios: fraction of outliers in each block.
        sizes: number of weights in each.
        sparsity: the target.
        spread: the largest difference; reached unless all ratios are equal.

    Raises:
        ValueError: sparsity +- spread is not within [0, 1).
    """
    if sparsity - spread < 0.0 or not sparsity + spread < 1.0:
        raise ValueError(f"sparsity {sparsity} +- {spread} is not within [0, 1); give owl a smaller spread")
    deviation = np.asarray(ratios, np.float64) - np.average(ratios, weights=sizes)
    largest = np.abs(deviation).max()
    return list(sparsity - (deviation * (spread / largest) if largest > 0 else deviation))


def by_outliers(found: Linears, params: Params, data: list[Any], target: Target, settings: Owl) -> list[Target]:
    """A target for each of `found.layers`, from the scores in the network before anything is pruned.

    Args:
        found, params, data: as for `Linears.stream`.
        target: what the mean is.
        settings: of `owl`.
    """
    squares: list[jax.Array] = []

    def look(layer: Linear, kernel: jax.Array, inputs: Inputs) -> None:
        squares.append(inputs.square_mean())

    found.stream(params, data, look)
    leaves = trees.paths(params)
    rest = iter(squares)
    ratios: list[float] = []
    sizes: list[int] = []
    blocks = _blocks(found.layers)
    for block in blocks:
        # Twice through the kernels, so that no scores are kept.
        parts = [(layer.get(jnp.asarray(leaves[layer.path])), next(rest)) for layer in block]
        size = sum(kernel.size for kernel, _ in parts)
        mean = sum(float(_total(*part)) for part in parts) / size
        ratios.append(sum(int(_above(*part, settings.outlier * mean)) for part in parts) / size)
        sizes.append(size)
    assert target.sparsity is not None
    shares = owl_sparsities(ratios, sizes, target.sparsity, settings.spread)
    return [Target(float(share)) for block, share in zip(blocks, shares) for _ in block]


@jax.jit
def _total(kernel: jax.Array, square_mean: jax.Array) -> jax.Array:
    return jnp.sum(wanda_scores(kernel, square_mean))


@jax.jit
def _above(kernel: jax.Array, square_mean: jax.Array, limit: float) -> jax.Array:
    return jnp.sum(wanda_scores(kernel, square_mean) > limit, dtype=jnp.int32)


def _blocks(layers: Sequence[Linear]) -> list[list[Linear]]:
    """Layers that get one sparsity."""

    def key(layer: Linear) -> Any:
        parts = layer.path.split("/")
        numbered = next((i for i, part in enumerate(parts) if any(map(str.isdigit, part))), len(parts))
        return layer.at or tuple(parts[: numbered + 1])

    return [list(block) for _, block in itertools.groupby(layers, key)]
