"""Makes pruned parts disappear: smaller arrays, fewer layers, and the check that nothing else changed."""

from bmjax.shrink import depth
from bmjax.shrink.compact import compact, compact_state, sizes, verify

__all__ = ["compact", "compact_state", "depth", "sizes", "verify"]
