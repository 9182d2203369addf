"""Walks the jaxpr of any JAX function: groups of axes that shrink together, the same at smaller sizes, FLOPs, linear layers,
arrays that are computed where they are used."""

from bmjax.trace.bind import bind
from bmjax.trace.check import groups
from bmjax.trace.flops import flops
from bmjax.trace.groups import Traced, counts, trace
from bmjax.trace.inputs import Inputs
from bmjax.trace.keep import masks, pool
from bmjax.trace.late import late, where_used
from bmjax.trace.linear import Linear
from bmjax.trace.sides import Sides
from bmjax.trace.stream import Linears, contracting, linears, sides

__all__ = [
    "Inputs",
    "Linear",
    "Linears",
    "Sides",
    "Traced",
    "bind",
    "contracting",
    "counts",
    "flops",
    "groups",
    "late",
    "linears",
    "masks",
    "pool",
    "sides",
    "trace",
    "where_used",
]
