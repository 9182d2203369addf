"""A walked jaxpr run again at the sizes that are left: the compact form of any JAX function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend.core import Literal

from bmjax.trace.bind import bind
from bmjax.trace.terms import Atom, Axes, Term, kept, kept_before
from bmjax.trace.walk import Equation, Frame, Shape


class Replay:
    """Runs frames when only `counts[atom]` elements of some atoms stay."""

    def __init__(self, counts: Mapping[Atom, int]):
        self.counts = counts

    def shape(self, axes: Axes) -> Shape:
        """The shape that is left of a value."""
        return tuple(kept(term, self.counts) for term in axes)

    def before(self, term: Term, length: int) -> int:
        """How many of the first `length` positions are left."""
        return kept_before(term, length, self.counts)

    def bind(self, equation: Equation, inputs: Sequence[Any], **changes: Any) -> Sequence[Any]:
        """Runs an equation's primitive with some of its parameters changed."""
        return bind(equation.eqn, inputs, **changes)

    def run(self, frame: Frame, inputs: Sequence[Any]) -> list[Any]:
        """The frame's outputs for inputs of the sizes that are left."""
        # A constant that may shrink is the same everywhere, so any part of it will do.
        consts = [
            value[tuple(map(slice, self.shape(axes)))] if axes else value for value, axes in zip(frame.consts, frame.const_axes)
        ]
        env = dict(zip((*frame.jaxpr.constvars, *frame.jaxpr.invars), (*consts, *inputs)))

        def read(var: Any) -> Any:
            return var.val if isinstance(var, Literal) else env[var]

        for eqn, equation in zip(frame.jaxpr.eqns, frame.equations):
            values = [read(var) for var in eqn.invars]
            env.update(zip(eqn.outvars, equation.rule.replay(self, equation, values)))
        return [read(var) for var in frame.jaxpr.outvars]
