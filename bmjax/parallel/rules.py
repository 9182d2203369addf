"""Which device holds which part of a parameter: ordered rules from path regex to axes, which must cover everything."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bmjax import trees

Rules: TypeAlias = Sequence[tuple[str, tuple[str | None, ...]]]


def _spec(path: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh) -> PartitionSpec:
    if len(axes) > len(shape):
        raise ValueError(f"the rule for {path} names {len(axes)} axes {axes}, but the parameter has shape {list(shape)}")
    unknown = [axis for axis in axes if axis is not None and axis not in mesh.shape]
    if unknown:
        raise ValueError(f"the rule for {path} names the mesh axis {unknown[0]!r}; there are {', '.join(mesh.axis_names)}")
    # An axis that does not divide cannot be split by XLA; the parameter stays whole there, and the log says so.
    fits = [axis if axis is not None and shape[i] % mesh.shape[axis] == 0 else None for i, axis in enumerate(axes)]
    if tuple(fits) != tuple(axes):
        logging.info("%s %s is not split as %s: the mesh %s does not divide it", path, shape, axes, dict(mesh.shape))
    return PartitionSpec(*fits)


def partition(params: Any, rules: Rules, mesh: Mesh) -> Any:
    """A NamedSharding for every parameter, by the first rule whose regex is found in its path.

    Args:
        params: tree of arrays or ShapeDtypeStructs.
        rules: (path regex, mesh axis or None for each leading axis of the parameter), in order.
        mesh: from `make_mesh`. An axis of a parameter that the mesh axis does not divide stays whole (logged).

    Raises:
        ValueError: no rule covers a parameter, a rule has more axes than the parameter, or names no axis of the mesh.
    """

    def of(path: str, leaf: Any) -> NamedSharding:
        for pattern, axes in rules:
            if re.search(pattern, path):
                return NamedSharding(mesh, _spec(path, leaf.shape, axes, mesh))
        raise ValueError(f"no partition rule covers {path} {list(leaf.shape)}; add one, or end the rules with ('.*', ())")

    return trees.map_with_path(of, params)


def like_params(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that holds copies of the parameters in places, such as an optimiser's state.

    A leaf in a parameter's place (`trees.places`) and of its shape is partitioned like it. One that differs along a single axis,
    such as a mask packed eight weights to a word, is partitioned like it too, but whole along an axis that does not divide.
    Everything else is replicated.

    Args:
        tree: tree of arrays or ShapeDtypeStructs.
        params: the parameters it was made from.
        shardings: their shardings, same structure.
        mesh: the mesh of the shardings.
    """
    known = dict(zip(trees.paths(params), jax.tree.leaves(shardings)))
    found = trees.places(tree, params, lambda leaf, param: _like(leaf.shape, param.shape))
    whole = NamedSharding(mesh, PartitionSpec())
    return trees.map_with_path(lambda path, leaf: _fitting(known[found[path]], leaf.shape) if path in found else whole, tree)


def _like(shape: tuple[int, ...], of: tuple[int, ...]) -> bool:
    """The same shape, or one that differs along a single axis of several."""
    return len(shape) == len(of) and sum(a != b for a, b in zip(shape, of)) <= (len(of) > 1)


def _fitting(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding without the mesh axes that do not divide the shape."""
    names = [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in sharding.spec]
    parts = [math.prod(sharding.mesh.shape[name] for name in axes) for axes in names]
    spec = [axes if size % n == 0 else None for axes, n, size in zip(sharding.spec, parts, shape)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
