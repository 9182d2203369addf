"""What tracing a function tells before anything runs: which of its results are the same, and what it does with its inputs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from bmjax.types import Params


def alike(fn: Callable[..., Any], *args: Any) -> bool:
    """True if all results of `fn(*args)` are computed in one and the same way from the arguments, and so are always equal.

    Results that are equal for another reason count as different.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    seen: dict[Hashable, int] = {}  # a number for each way to compute something
    numbers: dict[Any, int] = {}

    def number(how: Hashable) -> int:
        return seen.setdefault(how, len(seen))

    def of(atom: Any) -> int:
        return number(("literal", repr(atom.val), str(atom.aval))) if isinstance(atom, Literal) else numbers[atom]

    for i, var in enumerate((*jaxpr.invars, *jaxpr.constvars)):
        numbers[var] = number(("given", i))
    for eqn in _needed(jaxpr, jaxpr.outvars)[0]:
        # An array that is closed over does not show in the text; its place in memory tells it from others.
        how = (eqn.primitive.name, str(eqn.params), tuple(map(id, _consts(eqn.params))), tuple(map(of, eqn.invars)))
        for i, var in enumerate(eqn.outvars):
            numbers[var] = number((how, i))
    return len({of(atom) for atom in jaxpr.outvars}) <= 1


def read(fn: Callable[..., Sequence[jax.Array]], *args: Any) -> list[Any]:
    """For each result of `fn(*args)`, a tree of bools like `args`: True for what the result is computed from.

    What goes into a function that is called counts as read, though that function may not use it.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    wanted = [_needed(jaxpr, [var])[1] for var in jaxpr.outvars]
    return [jax.tree.unflatten(jax.tree.structure(args), [var in used for var in jaxpr.invars]) for used in wanted]


def looked_up(fn: Callable[[Params], Any], params: Params) -> Params:
    """A tree of bools: True for the parameters that `fn(params)` takes rows of by index, such as an embedding's table."""
    leaves, tree = jax.tree.flatten(params)
    jaxpr = jax.make_jaxpr(fn)(params).jaxpr
    found: set[int] = set()
    _follow(jaxpr, [frozenset({i}) for i in range(len(leaves))], found)
    return jax.tree.unflatten(tree, [i in found for i in range(len(leaves))])


_Source = frozenset[int] | None  # the parameters that a value is made of; None if anything else is in it


def _follow(jaxpr: Jaxpr, sources: Sequence[_Source], found: set[int]) -> list[_Source]:
    known: dict[Any, _Source] = dict(zip(jaxpr.invars, sources))

    def of(atom: Any) -> _Source:
        return frozenset() if isinstance(atom, Literal) else known.get(atom)

    for eqn in jaxpr.eqns:
        ins = [of(atom) for atom in eqn.invars]
        if eqn.primitive.name == "gather":
            found |= ins[0] or frozenset()
        outs = [None if None in ins else frozenset().union(*(source or () for source in ins))] * len(eqn.outvars)
        for body in (item.jaxpr if isinstance(item, ClosedJaxpr) else item for item in _bodies(eqn.params)):
            if len(body.invars) == len(ins):  # a call, a remat, a scan; a condition or loop has predicates of its own
                inner = _follow(body, ins, found)
                outs = inner if len(inner) == len(outs) else outs
        known.update(zip(eqn.outvars, outs))
    return [of(atom) for atom in jaxpr.outvars]


def _needed(jaxpr: Jaxpr, results: Sequence[Any]) -> tuple[list[Any], set[Any]]:
    """The equations that some results need, in order, and all variables that those read."""
    wanted = {atom for atom in results if not isinstance(atom, Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if not wanted.isdisjoint(eqn.outvars):
            kept.append(eqn)
            wanted.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
    return kept[::-1], wanted


def _consts(params: dict[str, Any]) -> Iterator[Any]:
    """The arrays that an equation's bodies close over, at any depth."""
    for body in _bodies(params):
        if isinstance(body, ClosedJaxpr):
            yield from body.consts
        for eqn in body.eqns:
            yield from _consts(eqn.params)


def _bodies(params: dict[str, Any]) -> list[Any]:
    """The jaxprs, closed or not, among an equation's parameters."""
    values = [item for value in params.values() for item in (value if isinstance(value, (tuple, list)) else (value,))]
    return [item for item in values if isinstance(item, (ClosedJaxpr, Jaxpr))]
