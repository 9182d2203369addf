"""One pass over a jaxpr that gives every axis of every value a term. What a primitive does to terms is in `rules`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from bmjax.trace.terms import Atom, Axes, Misfit, Term, atoms, fresh, resolve, unify
from bmjax.trace.terms import freeze as freeze_term

Shape = tuple[int, ...]


def shape(var: Any) -> Shape:
    """The shape of a jaxpr's variable or literal."""
    return tuple(var.aval.shape)


@dataclasses.dataclass
class Equation:
    """One equation of a jaxpr with the terms of its values.

    Attributes:
        eqn: the equation.
        rule: how its primitive treats terms.
        ins, outs: the axes of each input and output.
        bodies: the inner jaxprs that it runs, walked.
    """

    eqn: JaxprEqn
    rule: Rule
    ins: list[Axes]
    outs: list[Axes] = dataclasses.field(default_factory=list)
    bodies: list[Frame] = dataclasses.field(default_factory=list)

    @property
    def params(self) -> dict[str, Any]:
        """The primitive's static parameters."""
        return self.eqn.params

    @property
    def in_shapes(self) -> list[Shape]:
        """As traced."""
        return [shape(var) for var in self.eqn.invars]

    @property
    def out_shapes(self) -> list[Shape]:
        """As traced."""
        return [shape(var) for var in self.eqn.outvars]


class Rule(NamedTuple):
    """How one primitive treats terms.

    Attributes:
        flow: (tracer, equation) -> the axes of each output; on the way it unifies and freezes those of the inputs.
        replay: (replay, equation, inputs) -> outputs at the sizes that are left.
    """

    flow: Callable[[Tracer, Equation], list[Axes]]
    replay: Callable[[Any, Equation, Sequence[Any]], Sequence[Any]]


@dataclasses.dataclass
class Frame:
    """A jaxpr that was walked once, for one call of it.

    Attributes:
        layers: the atom of the scanned axis if this is the body of a scan, else None.
    """

    jaxpr: Jaxpr
    consts: Sequence[Any]
    const_axes: list[Axes]
    equations: list[Equation]
    outs: list[Axes]
    layers: Atom | None = None

    def dtypes(self) -> set[Any]:
        """The dtypes of all results here and in the bodies."""
        own = {getattr(var.aval, "dtype", None) for eqn in self.jaxpr.eqns for var in eqn.outvars} - {None}
        return own.union(*(body.dtypes() for equation in self.equations for body in equation.bodies))

    def values(self, inside: tuple[Atom, ...] = ()) -> Iterator[tuple[tuple[Atom, ...], Axes]]:
        """All (atoms of the scans around it, axes of a value) here and in the bodies."""
        if self.layers is not None:
            layer = resolve(self.layers)
            inside = (*inside, layer) if isinstance(layer, Atom) else inside
        for equation in self.equations:
            for axes in (*equation.ins, *equation.outs):
                yield inside, axes
            for body in equation.bodies:
                yield from body.values(inside)


class Tracer:
    """Walks jaxprs by a table of rules and keeps the report of what it could not follow."""

    def __init__(self, rules: Mapping[str, Rule], unknown: Rule):
        self.rules = rules
        self.unknown = unknown
        self.report: dict[str, None] = {}  # an ordered set
        self.where = ""

    def unify(self, x: Term, y: Term) -> None:
        """Both terms are one axis; where they cannot be, they are frozen and reported."""
        try:
            unify(x, y)
        except Misfit as misfit:
            self.give_up(str(misfit), x, y)

    def give_up(self, why: str, *terms: Term) -> None:
        """Freezes terms that cannot be followed, and reports it unless they were frozen anyway."""
        if any(not atom.frozen and atom.size > 1 for term in terms for atom in atoms(term)):
            self.report[f"{self.where}: {why}"] = None
        for term in terms:
            freeze_term(term, why)

    def walk(
        self, jaxpr: Jaxpr, consts: Sequence[Any], ins: Sequence[Axes], where: str = "", layers: Atom | None = None
    ) -> Frame:
        """The terms of everything in a jaxpr whose inputs have the axes `ins`."""
        const_axes = [_constant(value) for value in consts]
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*const_axes, *ins)))

        def read(var: Any) -> Axes:
            return _constant(var.val) if isinstance(var, Literal) else env[var]

        equations = []
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            equation = Equation(eqn, self.rules.get(name, self.unknown), [read(var) for var in eqn.invars])
            self.where = f"{where}/{name}"
            equation.outs = equation.rule.flow(self, equation)
            env.update(zip(eqn.outvars, equation.outs))
            equations.append(equation)
        return Frame(jaxpr, consts, const_axes, equations, [read(var) for var in jaxpr.outvars], layers)


def _constant(value: Any) -> Axes:
    """The axes of a baked-in value: they may shrink if it is the same everywhere."""
    if np.ndim(value) == 0:
        return []
    array = np.asarray(value)
    return fresh(array.shape, "" if (array == array.flat[0]).all() else "an array is baked into the function")
