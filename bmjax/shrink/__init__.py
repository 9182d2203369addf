"""Makes pruned parts disappear: smaller arrays, fewer layers, and the check that nothing else changed."""

from bmjax.shrink import depth
from bmjax.shrink.compact import compact, sizes, verify

__all__ = ["compact", "depth", "sizes", "verify"]
