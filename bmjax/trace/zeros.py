"""Which results of a function are zero wherever an argument is: its jaxpr is read element by element."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

_NOTHING = None  # may be anything
_UNIFORM = object()  # one number, or the same number everywhere
_ZERO = object()  # zero everywhere

_ALONE = {"neg", "abs", "sign", "sqrt", "square", "convert_element_type", "copy", "reduce_precision", "stop_gradient"}
_TOGETHER = {"add", "add_any", "sub", "max", "min"}
_INSIDE = {"pjit": "jaxpr", "jit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr", "remat2": "jaxpr"}


def zero_where(fn: Callable[..., Any], arguments: Sequence[Any], names: Sequence[Hashable | None]) -> list[Hashable | None]:
    """For each leaf that `fn` returns, the name of the argument that it shares its zeros with; None where that is not certain.

    Args:
        fn: any traceable function.
        arguments: what it is called with, arrays or their shapes.
        names: one for each leaf of the arguments: where leaves have the same name they are zero at the same places. None says
            nothing.
    """
    leaves = jax.tree.leaves(tuple(arguments))
    closed = jax.make_jaxpr(fn)(*arguments)
    kinds = [name if name is not None else _kind(leaf) for name, leaf in zip(names, leaves, strict=True)]
    return [kind if kind not in (_UNIFORM, _ZERO) else None for kind in _read(closed.jaxpr, closed.consts, kinds)]


def _kind(value: Any) -> Any:
    if np.shape(value):
        return _NOTHING
    known = not isinstance(value, (jax.core.Tracer, jax.ShapeDtypeStruct)) and not isinstance(value, jax.Array)
    return _ZERO if known and value == 0 else _UNIFORM


def _read(jaxpr: Any, consts: Sequence[Any], kinds: Sequence[Any]) -> list[Any]:
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, map(_kind, consts))) | dict(zip(jaxpr.invars, kinds))
    look = lambda atom: _kind(atom.val) if isinstance(atom, core.Literal) else known.get(atom)
    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _results(eqn, [look(atom) for atom in eqn.invars])))
    return [look(atom) for atom in jaxpr.outvars]


def _results(eqn: Any, kinds: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    if name in _INSIDE:
        inner = eqn.params[_INSIDE[name]]
        return _read(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), kinds)
    if name == "cond":
        branches = [_read(branch.jaxpr, branch.consts, kinds[1:]) for branch in eqn.params["branches"]]
        return [_shared(of_each) for of_each in zip(*branches)]
    if name == "broadcast_in_dim":
        found = kinds[0] if kinds[0] in (_UNIFORM, _ZERO) or eqn.invars[0].aval.shape == eqn.outvars[0].aval.shape else _NOTHING
    elif name in _ALONE or (name == "integer_pow" and eqn.params["y"] > 0):
        found = kinds[0]
    elif name in _TOGETHER:
        found = _shared(kinds)
    elif name == "select_n":
        found = _shared(kinds[1:])
    elif name == "mul":
        found = _product(kinds)
    elif name == "div":
        found = kinds[0] if kinds[1] is _UNIFORM else _NOTHING
    else:
        found = _NOTHING
    if found is _NOTHING and not eqn.outvars[0].aval.shape:
        found = _UNIFORM
    return [found] + [_NOTHING] * (len(eqn.outvars) - 1)


def _shared(kinds: Sequence[Any]) -> Any:
    """The kind of a sum or a choice."""
    kinds = [kind for kind in kinds if kind is not _ZERO] or [_ZERO]
    return kinds[0] if all(kind == kinds[0] for kind in kinds) else _NOTHING


def _product(kinds: Sequence[Any]) -> Any:
    """The kind of a product. Zero times anything is not zero: it may be NaN."""
    kinds = [kind for kind in kinds if kind is not _UNIFORM] or [_UNIFORM]
    return kinds[0] if all(kind == kinds[0] for kind in kinds) else _NOTHING
