"""Where in a parameter a value lies: chains of steps that only move, slice or cast, and how to write through them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding


@dataclasses.dataclass(frozen=True)
class Reshape:
    """To a shape of as many numbers."""

    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transpose:
    """Axis i becomes axis order[i] of what it was."""

    order: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Slice:
    """A fixed part, one (start, limit, stride) an axis."""

    bounds: tuple[tuple[int, int, int], ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """What the loop at `depth` takes from axis 0 at its present step, of `length`."""

    depth: int
    length: int


@dataclasses.dataclass(frozen=True)
class Cast:
    """To another dtype."""

    dtype: Any


Layout: TypeAlias = Reshape | Transpose | Slice | Step | Cast


@dataclasses.dataclass(frozen=True)
class Place:
    """A value that is a parameter, or a part of one, in another form.

    Attributes:
        path: of the parameter.
        chain: what was done to it, first to last.
    """

    path: str
    chain: tuple[Layout, ...] = ()

    def then(self, *layouts: Layout) -> Place:
        """With more done to it."""
        return Place(self.path, (*self.chain, *layouts))

    @property
    def uncast(self) -> Place:
        """The same numbers in the parameter's own dtype."""
        return Place(self.path, tuple(layout for layout in self.chain if not isinstance(layout, Cast)))


def _apply(layout: Layout, value: Any, at: Sequence[Any]) -> Any:
    """One step, on a NumPy or a JAX array."""
    match layout:
        case Reshape(shape):
            return value.reshape(shape)
        case Transpose(order):
            return value.transpose(order)
        case Slice(bounds):
            return value[tuple(slice(*bound) for bound in bounds)]
        case Step(depth):
            return value[at[depth]]
        case Cast(dtype):
            return value.astype(dtype)


def _undo(layout: Layout, whole: jax.Array, at: Sequence[Any], part: jax.Array) -> jax.Array:
    """`whole` with `part` in the place that `_apply` took it from."""
    match layout:
        case Reshape():
            return part.reshape(whole.shape)
        case Transpose(order):
            return part.transpose(tuple(np.argsort(order)))
        case Slice(bounds):
            return whole.at[tuple(slice(*bound) for bound in bounds)].set(part)
        case Step(depth):
            return whole.at[at[depth]].set(part)
        case Cast():
            return part.astype(whole.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _read(chain: tuple[Layout, ...], leaf: jax.Array, at: tuple[Any, ...]) -> jax.Array:
    return functools.reduce(lambda value, layout: _apply(layout, value, at), chain, leaf)


def read(place: Place, leaf: jax.Array, at: Sequence[int] = ()) -> jax.Array:
    """The value at a place of the parameter `leaf`.

    Args:
        place: whose path's parameter is `leaf`.
        leaf: the whole parameter.
        at: the present step of each loop around, outermost first.
    """
    return _read(place.chain, leaf, tuple(at)) if place.chain else leaf


def _written(chain: tuple[Layout, ...], leaf: jax.Array, at: tuple[Any, ...], value: jax.Array) -> jax.Array:
    if not chain:
        return value.astype(leaf.dtype)
    inside = _apply(chain[0], leaf, at)
    return _undo(chain[0], leaf, at, _written(chain[1:], inside, at, value))


@functools.cache
def _writer(chain: tuple[Layout, ...], sharding: Any, donate: bool) -> Any:
    write = functools.partial(_written, chain)
    return jax.jit(write, donate_argnums=0 if donate else (), out_shardings=sharding)


def write(place: Place, leaf: jax.Array, at: Sequence[int], value: jax.Array, *, donate: bool = False) -> jax.Array:
    """The parameter `leaf` with `value` at a place, in its own dtype and partitioned as it is.

    Args:
        place, leaf, at: as for `read`.
        value: of the shape that `read` gives.
        donate: whether the buffer of `leaf` may be taken.
    """
    sharding = leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None
    return _writer(place.chain, sharding, donate)(leaf, tuple(jnp.int32(i) for i in at), value)


def memory(place: Place, leaf: np.ndarray, at: Sequence[int]) -> np.ndarray | None:
    """The place as a NumPy view of a dummy `leaf`; None where it is no view."""
    found: np.ndarray = functools.reduce(lambda value, layout: _apply(layout, value, at), place.uncast.chain, leaf)
    return found if found.size == 0 or np.may_share_memory(found, leaf) else None


def layout_of(name: str, params: dict[str, Any], before: tuple[int, ...], after: Sequence[Any]) -> list[Layout] | None:
    """What a primitive does to the layout of its only input, a step for each output; None if it does more.

    Args:
        name: of the primitive.
        params: its static parameters.
        before: shape of the input.
        after: abstract values of the outputs.
    """
    if name in ("reshape", "squeeze", "expand_dims"):
        return [Reshape(tuple(after[0].shape))] if params.get("dimensions") is None or name != "reshape" else None
    if name == "broadcast_in_dim":  # only where it puts axes of 1 in between
        return [Reshape(tuple(after[0].shape))] if np.prod(before) == np.prod(after[0].shape) else None
    if name == "transpose":
        return [Transpose(tuple(map(int, params["permutation"])))]
    if name == "convert_element_type":
        return [Cast(after[0].dtype)] if jnp.issubdtype(after[0].dtype, jnp.floating) else None
    if name == "slice":
        strides = params["strides"] or (1,) * len(before)
        return [Slice(tuple(zip(map(int, params["start_indices"]), map(int, params["limit_indices"]), map(int, strides))))]
    if name == "split":
        found: list[Layout] = []
        start, whole = 0, [(0, size, 1) for size in before]
        for size in map(int, params["sizes"]):
            bounds = [*whole]
            bounds[params["axis"]] = (start, start + size, 1)
            found.append(Slice(tuple(bounds)))
            start += size
        return found
    if name in ("copy", "copy_p", "sharding_constraint"):
        return [Reshape(tuple(before))]
    return None
