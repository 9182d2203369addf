"""Walks the jaxpr of any JAX function: groups of axes that shrink together, the function at smaller sizes, FLOPs."""

from bmjax.trace.check import groups
from bmjax.trace.flops import flops
from bmjax.trace.groups import Traced, counts, trace
from bmjax.trace.keep import masks, pool

__all__ = ["Traced", "counts", "flops", "groups", "masks", "pool", "trace"]
