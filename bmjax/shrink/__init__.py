"""Makes pruned parts disappear: smaller arrays, fewer layers, and the check that nothing else changed."""

from bmjax.shrink.compact import compact, sizes, verify

__all__ = ["compact", "sizes", "verify"]
