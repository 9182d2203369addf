"""What is dropped together: single weights, n of m neighbours, blocks, channels, or the elements of groups.

A pattern of an array makes units of its weights (`pool`), the allocation chooses units, and the pattern makes a mask of the
choice (`expand`). An n:m pattern chooses by itself. A pattern of groups spans arrays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from bmjax import trees
from bmjax.prune import kinds, threshold
from bmjax.trace import Sides
from bmjax.types import Group, Params

SCANNED = r"(^|/)layers/(?!\d)"  # what this package calls stacks of scanned layers

Sparsity: TypeAlias = float | Mapping[str, float]


class Pattern(NamedTuple):
    """How the weights of an array become units, and units a mask. Arrays may have a stacked axis in front.

    Attributes:
        name: for messages.
        pool: (scores, number of stacked axes) -> scores of its units, stacked alike.
        expand: (chosen units, shape of the array) -> bool mask of that shape.
        check: (path, shape without the stacked axis) -> None; raises ValueError where the pattern does not fit.
        choose: None, or (path, scores, fraction of the way) -> mask, for a pattern that needs no allocation.
        implied: the sparsity that the pattern is, if it chooses by itself.
        groups: the groups of a pattern that spans arrays; then nothing else here is used.
    """

    name: str
    pool: Callable[[jax.Array, int], jax.Array]
    expand: Callable[[jax.Array, tuple[int, ...]], jax.Array]
    check: Callable[[str, tuple[int, ...]], None]
    choose: Callable[[str, jax.Array, jax.Array], jax.Array] | None = None
    implied: float | None = None
    groups: tuple[Group, ...] = ()


def left_out(path: str, ndim: int) -> str:
    """Why the default rule leaves a parameter out; "" if it does not.

    The rule: a leaf with two axes or more that is called `kernel`, in no part of the path that names an embedding
    ("embed..."), a norm ("...norm...") or the head ("head", "..._head").
    """
    if ndim < 2:
        return "one axis"
    for part in path.lower().split("/"):
        for reason, regex in (("embedding", "embed"), ("norm", "norm"), ("head", "^(.*_)?head$")):
            if re.search(regex, part):
                return reason
    return "" if _name(path) == "kernel" else "not called kernel"


def _name(path: str) -> str:
    """The parameter's own name; NNX puts every array in a `value`."""
    return path.removesuffix("/value").split("/")[-1]


def chosen(params: Params, where: str | None) -> list[str]:
    """Paths of the weights to prune: those that `where` finds, or those of the default rule.

    Raises:
        ValueError: there are none.
    """
    leaves = {path: leaf.ndim for path, leaf in trees.paths(params).items()}
    if where is not None:
        return [path for path, hit in trees.paths(trees.select(params, where)).items() if hit]
    if any(_name(path) == "kernel" for path in leaves):
        found = [path for path, ndim in leaves.items() if not left_out(path, ndim)]
    else:  # a tree that does not use Flax's names
        found = [path for path, ndim in leaves.items() if ndim >= 2]
    if not found:
        raise ValueError(f"nothing to prune among {', '.join(leaves) or 'no parameters'}; name the weights with `where`")
    return found


def unstructured() -> Pattern:
    """Single weights, anywhere."""

    def check(path: str, shape: tuple[int, ...]) -> None:
        if not shape:
            raise ValueError(f"{path} is a scalar, which cannot be pruned; leave it out of `where`")

    return Pattern("unstructured", lambda scores, stacked: scores, lambda units, shape: units, check)


def n_m(n: int, m: int, axis: int | Mapping[str, int] | None = None) -> Pattern:
    """Of each m neighbours along the axis that the layer contracts, the n largest stay: 2:4 and the like.

    Mishra et al. 2021, arXiv 2104.08378. The sparsity is 1 - n / m; a gradual schedule drops one neighbour after the other.

    Args:
        n, m: 1 <= n < m.
        axis: counted from the last one, which is -1; or {path or regex: axis}: `trace.contracting` finds each layer's own, for
            kernels of any rank. None is -2, what a kernel [in, out] contracts, and refuses kernels of more axes (beside that of
            scanned layers), such as those of attention [in, heads, dim].

    Raises:
        ValueError: n or m out of range; at `init`: an axis that m does not divide, a vector, a kernel whose axis must be given,
            or a path that no regex matches.
    """
    for what, value in (("n", n), ("m", m), *([] if axis is None or isinstance(axis, Mapping) else [("axis", axis)])):
        kinds.whole(f"{what} of the pattern n:m", value)
    if not 1 <= n < m:
        raise ValueError(f"the pattern {n}:{m} is given; expected n:m with 1 <= n < m, n of each m neighbours kept")

    def along(path: str) -> int:
        if axis is None or isinstance(axis, int):
            return -2 if axis is None else axis
        found = [axis[path]] if path in axis else [at for regex, at in axis.items() if re.search(regex, path)]
        if not found:
            raise ValueError(f"the pattern {n}:{m} is given axes by path, and none of {', '.join(axis)} is found in {path}")
        return found[0]

    def check(path: str, shape: tuple[int, ...]) -> None:
        at = along(path)
        if len(shape) < 2:
            raise ValueError(f"the pattern {n}:{m} needs an axis to contract, and {path} has shape {list(shape)}; leave it out")
        if axis is None and len(shape) > 2:
            raise ValueError(
                f"the pattern {n}:{m} cannot tell which axis of {path} {list(shape)} the layer contracts; "
                "give axis={path: axis} from trace.contracting"
            )
        if not -len(shape) <= at < 0:
            raise ValueError(f"the pattern {n}:{m} is to run along axis {at} of {path} {list(shape)}; count from the last, -1")
        if shape[at] % m:
            raise ValueError(
                f"axis {at} of {path} {list(shape)} has {shape[at]} entries, which {m} does not divide; leave it out"
            )

    def choose(path: str, scores: jax.Array, fraction: jax.Array) -> jax.Array:
        stay = m - jnp.floor(fraction * (m - n) + 1e-4).astype(jnp.int32)
        return threshold.nm_mask(scores, stay, m, along(path))

    same = lambda scores, stacked: scores
    return Pattern(f"{n}:{m}", same, lambda units, shape: units, check, choose, 1 - n / m)


def block(rows: int, columns: int) -> Pattern:
    """Blocks of the last two axes; a block is worth the sum of its weights' scores. Gray et al. 2017; Narang et al. 2017.

    They are taken for inputs and outputs; for kernels of another layout see `matrix`.

    Raises:
        ValueError: a size below 1; at `init`: an axis that the block does not divide, or a vector.
    """
    kinds.whole("the rows of a block", rows)
    kinds.whole("the columns of a block", columns)
    if rows < 1 or columns < 1:
        raise ValueError(f"blocks of {rows} x {columns} are asked for; expected 1 or more each way")

    def check(path: str, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise ValueError(f"blocks of {rows} x {columns} need two axes, and {path} has shape {list(shape)}; leave it out")
        if shape[-2] % rows or shape[-1] % columns:
            raise ValueError(f"blocks of {rows} x {columns} do not divide {path} {list(shape)}")

    return Pattern(
        f"block {rows} x {columns}",
        lambda scores, stacked: threshold.block_sums(scores, (rows, columns)),
        lambda units, shape: jnp.repeat(jnp.repeat(units, rows, axis=-2), columns, axis=-1),
        check,
    )


def channel(axis: int = -1) -> Pattern:
    """Whole slices of an array across one axis, such as the output channels of a kernel [..., in, out].

    A channel is worth the sum of its weights' scores: its L1 norm by magnitude, Li et al. 2017, arXiv 1608.08710. What else
    belongs to the channel (its bias, the next layer's inputs) stays: `groups` drops all of it.

    Args:
        axis: counted from the last one, which is -1. Where a layer has several axes of outputs, see `matrix`.

    Raises:
        ValueError: at `init`: an array without such an axis, or a vector.
    """
    kinds.whole("the axis of channels", axis)
    if axis >= 0:
        raise ValueError(f"channels of axis {axis} are asked for; count from the last axis, which is -1")

    def check(path: str, shape: tuple[int, ...]) -> None:
        if len(shape) < 2 or len(shape) < -axis:
            raise ValueError(f"channels of axis {axis} are to be dropped from {path} {list(shape)}, which has none; leave it out")

    def others(ndim: int, stacked: int) -> tuple[int, ...]:
        return tuple(i for i in range(stacked, ndim) if i != ndim + axis)

    def pool(scores: jax.Array, stacked: int) -> jax.Array:
        return jnp.sum(scores.astype(jnp.float32), axis=others(scores.ndim, stacked))

    def expand(units: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        stacked = units.ndim - 1
        return jnp.broadcast_to(jnp.expand_dims(units, others(len(shape), stacked)), shape)

    return Pattern(f"channel of axis {axis}", pool, expand, check)


def matrix(pattern: Pattern, sides: Sides) -> Pattern:
    """A pattern of a matrix [in, out] for a kernel of another layout, such as those of attention, [in, heads, dim].

    Args:
        pattern: `block` or `channel`, whose axes are then -2, all inputs, and -1, all outputs.
        sides: of the kernel, from `trace.sides`.
    """

    def order(ndim: int) -> tuple[int, ...]:
        given = [axis + ndim for side in sides for axis in side]
        return (*(axis for axis in range(ndim) if axis not in given), *given)

    def shape(whole: tuple[int, ...]) -> tuple[int, ...]:
        sizes = [math.prod(whole[axis] for axis in side) for side in (sides.inputs, sides.outputs)]
        return (*(whole[axis] for axis in order(len(whole))[: len(whole) - len(sides.inputs) - len(sides.outputs)]), *sizes)

    def pool(scores: jax.Array, stacked: int) -> jax.Array:
        return pattern.pool(scores.transpose(order(scores.ndim)).reshape(shape(scores.shape)), stacked)

    def expand(units: jax.Array, whole: tuple[int, ...]) -> jax.Array:
        moved = pattern.expand(units, shape(whole)).reshape([whole[axis] for axis in order(len(whole))])
        return moved.transpose([int(axis) for axis in np.argsort(order(len(whole)))])

    def check(path: str, whole: tuple[int, ...]) -> None:
        if max(-axis for side in sides for axis in side) > len(whole):
            raise ValueError(f"{path} {list(whole)} has fewer axes than the {sides} given for it; take those of trace.sides")
        pattern.check(path, shape(whole))

    return Pattern(pattern.name, pool, expand, check)


def groups(groups: Sequence[Group]) -> Pattern:
    """Elements of groups (heads, neurons, layers): every weight of an element goes, wherever it is.

    Args:
        groups: from `bmjax.trace`. A stacked group chooses for each layer, the same number in each.

    Raises:
        ValueError: there is no group, or two have the same name.
    """
    by_name = {group.name: group for group in groups}
    if not by_name or len(by_name) != len(groups):
        raise ValueError(f"the groups pattern is given {[group.name for group in groups]}; expected groups of different names")
    plain = unstructured()
    return plain._replace(name="groups", groups=tuple(by_name.values()))


def masked(params: Params, masks: Params) -> Any:
    """The parameters with zeros where the masks are False."""
    return jax.tree.map(lambda p, mask: jnp.where(mask, p, jnp.zeros((), p.dtype)), params, masks)
