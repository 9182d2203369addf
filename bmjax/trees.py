"""Parameter trees by path: "layers/attn/q/kernel". Selection by regex, counting, comparing."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def path_str(key_path: tuple[Any, ...]) -> str:
    """A jax key path as "a/b/0"."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def paths(tree: Any) -> dict[str, Any]:
    """{path: leaf} in the tree's own order."""
    return {path_str(key_path): leaf for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose function also gets the leaf's path first."""
    return jax.tree_util.tree_map_with_path(lambda key_path, *leaves: fn(path_str(key_path), *leaves), tree, *rest)


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """The nested dict of {path: leaf}: the inverse of `paths` for dicts of dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def replace(tree: Any, leaves: dict[str, Any]) -> Any:
    """The tree with the leaves at the given paths replaced.

    Raises:
        ValueError: a path is not in the tree.
    """
    unknown = set(leaves) - set(paths(tree))
    if unknown:
        raise ValueError(f"no parameter is called {sorted(unknown)[0]!r}; there are {', '.join(paths(tree))}")
    return map_with_path(lambda path, leaf: leaves.get(path, leaf), tree)


def places(tree: Any, like: Any, fits: Callable[[Any, Any], bool]) -> dict[str, str]:
    """Where a tree, such as an optimiser's state, holds copies of another: {path in the tree: path in the other}.

    By structure and not by class: a copy's path ends in the leaf's own. What comes before it is where the copy begins, and of
    several readings ("mu/kernel" below "0", or "kernel" below "0/mu") the one whose copy holds the most leaves is right.

    Args:
        tree: where to look.
        like: the tree that it may hold copies of, whole or in part.
        fits: (leaf, leaf of `like`) -> whether one may be a copy of the other, by shape.
    """
    known, readings, copies = paths(like), {}, collections.Counter[str]()
    for path, leaf in paths(tree).items():
        parts = path.split("/")
        ends = [("/".join(parts[:i]), "/".join(parts[i:])) for i in range(len(parts) + 1)]
        readings[path] = [(start, name) for start, name in ends if name in known and fits(leaf, known[name])]
        copies.update(start for start, _ in readings[path])
    return {path: max(found, key=lambda it: (copies[it[0]], len(it[1])))[1] for path, found in readings.items() if found}


def select(tree: Any, pattern: str) -> Any:
    """A tree of bools: True where `re.search(pattern, path)` finds something.

    Raises:
        ValueError: the pattern matches no path, or is not a regular expression.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    chosen = map_with_path(lambda path, _: bool(regex.search(path)), tree)
    if not any(jax.tree.leaves(chosen)):
        raise ValueError(f"the pattern {pattern!r} matches none of the parameters {', '.join(paths(tree))}")
    return chosen


def size(tree: Any) -> int:
    """Number of elements in all leaves."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def abstract(tree: Any) -> Any:
    """The tree with a `jax.ShapeDtypeStruct` (sharding kept) for each array."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


def first_difference(expected: Any, found: Any) -> str:
    """One line about the first path whose presence, shape or dtype differs; "" if none does."""
    want, have = paths(expected), paths(found)
    for path, leaf in want.items():
        if path not in have:
            return f"{path} is missing"
        other = have[path]
        if tuple(leaf.shape) != tuple(other.shape):
            return f"{path} has shape {list(other.shape)}, expected {list(leaf.shape)}"
        if leaf.dtype != other.dtype:
            return f"{path} is {other.dtype}, expected {leaf.dtype}"
    extra = [path for path in have if path not in want]
    return f"{extra[0]} is not expected" if extra else ""
