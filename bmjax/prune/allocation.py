"""How a sparsity is spread: how many of each array or group stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bmjax.prune import threshold


class Allocation(NamedTuple):
    """Chooses what stays.

    Attributes:
        choose: ({name: scores}, {name: target sparsity}, fraction of the targets now, per row) -> {name: bool like scores}.
            With `per row` the scores are [size] or [stack, size], each row is chosen by itself and keeps at least one.
        across: True if it compares scores of different names with each other.
    """

    choose: Callable[[dict[str, jax.Array], Mapping[str, float], jax.Array, bool], dict[str, jax.Array]]
    across: bool


def _kept(size: int, sparsity: float, fraction: jax.Array, least: int = 0) -> jax.Array:
    """How many of `size` stay: int32, exactly size - round(sparsity * size) when the fraction is 1."""
    target = round(sparsity * size)
    dropped = jnp.where(fraction >= 1, target, (fraction * target).astype(jnp.int32))
    return jnp.maximum(size - dropped, least)


def uniform() -> Allocation:
    """Every array, or every layer of every group, to the sparsity that is asked of it."""

    def choose(
        scores: dict[str, jax.Array], targets: Mapping[str, float], fraction: jax.Array, per_row: bool
    ) -> dict[str, jax.Array]:
        if not per_row:
            keep = jnp.stack([_kept(leaf.size, targets[name], fraction) for name, leaf in scores.items()])
            return dict(zip(scores, threshold.largest(list(scores.values()), keep)))
        rows = {name: leaf.reshape(-1, leaf.shape[-1]) for name, leaf in scores.items()}
        found = {}
        for name, leaf in rows.items():
            keep = _kept(leaf.shape[-1], targets[name], fraction, least=1)
            found[name] = jax.vmap(lambda row, k=keep: threshold.largest([row], k)[0])(leaf).reshape(scores[name].shape)
        return found

    return Allocation(choose, across=False)


def global_threshold() -> Allocation:
    """One threshold for all weights together, so that layers of small weights lose more."""

    def choose(
        scores: dict[str, jax.Array], targets: Mapping[str, float], fraction: jax.Array, per_row: bool
    ) -> dict[str, jax.Array]:
        (sparsity,) = set(targets.values())
        keep = _kept(sum(leaf.size for leaf in scores.values()), sparsity, fraction)
        return dict(zip(scores, threshold.largest(list(scores.values()), keep, across=True)))

    return Allocation(choose, across=True)
