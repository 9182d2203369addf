"""The groups of axes that shrink together, found by walking the jaxpr of any JAX function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bmjax import trees
from bmjax.trace.replay import Replay
from bmjax.trace.rules import RULES, UNKNOWN
from bmjax.trace.terms import Atom, Axes, atoms, freeze, fresh, positions, resolve
from bmjax.trace.walk import Frame, Tracer
from bmjax.trace.windows import WINDOWS
from bmjax.types import Group, Member, Params

_UNUSED = "the function does not use it"


@dataclasses.dataclass(frozen=True)
class Traced:
    """What `trace` found.

    Attributes:
        groups: axes that shrink together, in the order of the parameters. Their notes say what the rules noticed; only
            `groups(..., check=True)` proves that removing equals masking.
        frozen: {(path, axis): why nothing of it may be removed}.
        report: what could not be followed, one line each.
    """

    groups: tuple[Group, ...]
    frozen: dict[tuple[str, int], str]
    report: tuple[str, ...]
    _frame: Frame
    _atoms: dict[str, Atom]
    _in_axes: list[Axes]
    _in_names: tuple[str, ...]
    _out_tree: Any

    @property
    def dtypes(self) -> set[Any]:
        """Of everything that the function computes."""
        return self._frame.dtypes()

    def replay(self, keeps: Mapping[str, Any]) -> Callable[..., Any]:
        """The same function at the sizes that are left: `(compacted params, *args) -> output`.

        If a state was traced, it is `(compacted params, compacted state, *args) -> output`.

        Calls are inlined, so remat and custom derivatives are gone: it is for inference and checks. The args have the shapes
        that were traced.

        Args:
            keeps: {group name: bool [size] or [stack, size]}, concrete; a group that is not named stays whole.

        Raises:
            ValueError: `keeps` does not fit the groups; or, when called, an array has not the shape that is left.
        """
        replay = Replay({self._atoms[name]: count for name, count in counts(self.groups, keeps).items()})
        expected = [replay.shape(axes) for axes in self._in_axes]

        def run(*args: Any) -> Any:
            leaves = jax.tree.leaves(args)
            if len(leaves) != len(expected):
                raise ValueError(f"{len(leaves)} arrays were given; the traced function has {len(expected)}")
            for name, leaf, shape in zip(self._in_names, leaves, expected):
                if np.shape(leaf) != shape:
                    raise ValueError(f"{name} has shape {list(np.shape(leaf))}, expected {list(shape)}: as traced, or compacted")
            return jax.tree.unflatten(self._out_tree, replay.run(self._frame, leaves))

        return run


def trace(
    fn: Callable[..., Any],
    params: Params,
    *args: Any,
    names: Mapping[str, tuple[str, int]] | None = None,
    state: Params | None = None,
) -> Traced:
    """The groups of `fn(params, *args)`, or with a state of `fn(params, state, *args)`, without running it.

    Every axis that reaches an argument or an output is frozen, so let `fn` return what must not change (the logits) and no
    more. Batch and time should be longer than 1.

    Args:
        fn: any JAX function that returns a pytree of arrays.
        params: tree of arrays or ShapeDtypeStructs.
        args: pytrees of arrays or ShapeDtypeStructs.
        names: {name: (path, axis)}, as in `Model.axes`. The group with that axis gets the name; where an axis merges several
            groups, the outermost does.
        state: tree of arrays that are no parameters and shrink with them, such as batch statistics; {} where there are none.

    Raises:
        ValueError: a name points at no axis, or two names at one group.
    """
    given = (params, *(() if state is None else (state,)), *args)
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*given)
    in_axes = [fresh(var.aval.shape) for var in closed.jaxpr.invars]
    leaves, stateful, rest = trees.paths(params), trees.paths(state), iter(in_axes)
    param_axes, state_axes = dict(zip(leaves, rest)), dict(zip(stateful, rest))
    for term in (term for axes in rest for term in axes):
        freeze(term, "it meets an axis of an argument")
    tracer = Tracer(RULES | WINDOWS, UNKNOWN)
    frame = tracer.walk(closed.jaxpr, closed.consts, in_axes)
    for term in (term for axes in frame.outs for term in axes):
        freeze(term, "it reaches an output")
    _freeze_unused(frame, param_axes)
    groups, owners = _collect(frame, param_axes, state_axes, names or {})
    frozen = _frozen(param_axes)
    for name, place in (names or {}).items():
        if name not in owners:
            tracer.report[f"the size {name!r} cannot shrink: {frozen.get(place, 'it is 1')}"] = None
    return Traced(
        groups,
        frozen,
        tuple(tracer.report),
        frame,
        owners,
        in_axes,
        (*leaves, *(f"state {path}" for path in stateful), *(f"argument {path}" for path in trees.paths(args))),
        jax.tree.structure(out_shape),
    )


def counts(groups: Sequence[Group], keeps: Mapping[str, Any]) -> dict[str, int]:
    """How many elements of each group in `keeps` are left; in a stacked group, in each layer that is left.

    Raises:
        ValueError: a name is no group's, a shape is not the group's, nothing is left, or layers keep different numbers.
    """
    by_name = {group.name: group for group in groups}
    found = {}
    for name, keep in keeps.items():
        if name not in by_name:
            raise ValueError(f"no group is called {name!r}; there are {', '.join(by_name) or 'none'}")
        group = by_name[name]
        shape = (group.stack, group.size) if group.stack else (group.size,)
        if np.shape(keep) != shape:
            raise ValueError(f"the keep of group {name!r} has shape {list(np.shape(keep))}, expected {list(shape)}")
        rows = np.asarray(keep, bool)
        if group.stack:
            rows = rows[_kept_layers(group, groups, keeps)]
        left = np.unique(rows.sum(axis=-1))
        if len(left) > 1:
            raise ValueError(f"group {name!r} keeps {left.min()} to {left.max()} elements; every layer must keep as many")
        if not len(left) or left[0] == 0:
            raise ValueError(f"nothing would be left of group {name!r}; keep at least one of its {group.size} elements")
        found[name] = int(left[0])
    return found


def _kept_layers(group: Group, groups: Sequence[Group], keeps: Mapping[str, Any]) -> np.ndarray:
    """[stack] bool: the layers of a stacked group that are left."""
    path = group.members[0].path
    for other in groups:
        if other.name in keeps and any((member.path, member.axis) == (path, 0) for member in other.members):
            return np.asarray(keeps[other.name], bool)
    return np.ones(group.stack, bool)


def _freeze_unused(frame: Frame, param_axes: Mapping[str, Axes]) -> None:
    """An axis that meets no computation is no group."""
    seen = {atom for _, axes in frame.values() for term in axes for atom in atoms(term)}
    for term in (term for axes in param_axes.values() for term in axes):
        for atom in atoms(term):
            if atom not in seen:
                freeze(atom, _UNUSED)


def _frozen(param_axes: Mapping[str, Axes]) -> dict[tuple[str, int], str]:
    found = {}
    for path, axes in param_axes.items():
        for axis, term in enumerate(axes):
            reasons = [atom.frozen for atom in atoms(term) if atom.frozen and atom.size > 1]
            if reasons:
                found[path, axis] = reasons[0]
    return found


def _collect(
    frame: Frame, param_axes: Mapping[str, Axes], state_axes: Mapping[str, Axes], names: Mapping[str, tuple[str, int]]
) -> tuple[tuple[Group, ...], dict[str, Atom]]:
    """All groups, and the atom of each."""
    members, state = _members(param_axes), _members(state_axes)
    first = {atom: [param_axes[member.path][0] for member in found] for atom, found in members.items()}
    for atom in first.keys() & state.keys():
        first[atom] += [state_axes[member.path][0] for member in state[atom]]
    stacks = _stacks(frame, first)
    labels = _labels(members, names, param_axes)
    groups = [
        Group(labels[atom], atom.size, stacks.get(atom, 0), tuple(found), "; ".join(atom.notes), tuple(state.get(atom, ())))
        for atom, found in members.items()
    ]
    return tuple(groups), {labels[atom]: atom for atom in members}


def _members(axes_of: Mapping[str, Axes]) -> dict[Atom, list[Member]]:
    """{atom: where it is} for all atoms of which something may be removed."""
    members: dict[Atom, list[Member]] = {}
    for path, axes in axes_of.items():
        for axis, term in enumerate(axes):
            for atom, index in positions(term, np.arange(term.size)[:, None]):
                if atom.size > 1 and not atom.frozen:
                    members.setdefault(atom, []).append(Member(path, axis, index))
    return members


def _labels(
    members: Mapping[Atom, list[Member]], names: Mapping[str, tuple[str, int]], param_axes: Mapping[str, Axes]
) -> dict[Atom, str]:
    """The name of each group: the caller's, or its first axis that no other group is called by."""
    labels: dict[Atom, str] = {}
    for name, (path, axis) in names.items():
        if path not in param_axes or not 0 <= axis < len(param_axes[path]):
            raise ValueError(f"the size {name!r} is said to be axis {axis} of {path!r}, which no parameter has")
        for atom in atoms(param_axes[path][axis]):
            if atom in members:
                if atom in labels:
                    raise ValueError(f"the sizes {labels[atom]!r} and {name!r} are one group: they can only shrink together")
                labels[atom] = name
                break
    for atom, found in members.items():
        if atom not in labels:
            places = [f"{member.path}:{member.axis}" for member in found]
            places += [f"{places[0]}/{i}" for i in range(len(members))]
            labels[atom] = next(place for place in places if place not in labels.values())
    return labels


def _stacks(frame: Frame, first_axes: Mapping[Atom, Axes]) -> dict[Atom, int]:
    """{atom: layers} for groups whose elements each layer of a scan may choose for itself.

    That holds if every value outside the scan's body that has the atom has the scanned axis too, and every member has it first.

    Args:
        frame: the function.
        first_axes: {atom of a group: axis 0 of each array that has a member}.
    """
    layers = {resolve(body.layers) for body in _bodies(frame) if body.layers is not None}
    shared: dict[Any, set[Atom]] = {layer: set() for layer in layers}
    for inside, axes in frame.values():
        terms = [resolve(term) for term in axes]
        for layer in layers:
            if layer not in inside and layer not in terms:
                shared[layer].update(atom for term in terms for atom in atoms(term))
    found = {}
    for atom, axes in first_axes.items():
        first = {resolve(term) for term in axes}
        layer = first.pop()
        if not first and layer in layers and layer is not atom and atom not in shared[layer]:
            found[atom] = layer.size
    return found


def _bodies(frame: Frame) -> list[Frame]:
    inner = [body for equation in frame.equations for body in equation.bodies]
    return inner + [deeper for body in inner for deeper in _bodies(body)]
