"""Floating-point operations of a function, from its jaxpr."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from bmjax.trace.walk import shape


def flops(fn: Callable[..., Any], *args: Any) -> int:
    """Operations of the matrix products and convolutions in `fn(*args)`, a multiply-add counted as 2.

    A scan's body counts once for each of its steps and a conditional as its dearest branch. A `while` loop's body counts once, as
    its number of steps is not known, and inside `shard_map` only one device is counted. Elementwise operations, reductions and
    look-ups are left out. Where `fn` takes a gradient, its cost is counted too.

    Args:
        fn: any JAX function.
        args: pytrees of arrays or ShapeDtypeStructs.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn: JaxprEqn) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * math.prod(shape(eqn.outvars[0])) * math.prod(shape(eqn.invars[0])[i] for i in contracted)
    if name == "conv_general_dilated":
        # The kernel's input axis is already that of one feature group.
        kernel = shape(eqn.invars[1])
        per_output = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(shape(eqn.outvars[0])) * per_output // params["batch_group_count"]
    inner = [_count(body) for body in bodies(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * params["length"] if name == "scan" else sum(inner)


def bodies(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item
