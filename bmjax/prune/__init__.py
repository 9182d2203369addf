"""Pruning as an optax transform.

    tx = optax.chain(optax.adamw(1e-3), prune.sparsify(prune.magnitude(), sparsity=0.8, schedule=prune.cubic(100, 900)))

Score, pattern, allocation and schedule are separate choices, each a small function in the file of its name.
"""

from bmjax.prune.allocation import Allocation, global_threshold, uniform
from bmjax.prune.criteria import Criterion, Seen, given, magnitude, per_weight
from bmjax.prune.patterns import Pattern, groups, left_out, unstructured
from bmjax.prune.schedules import Schedule, constant, cubic, one_shot
from bmjax.prune.settings import Sparsity
from bmjax.prune.threshold import kth_largest, topk_mask
from bmjax.prune.transform import AroundState, Report, Row, SparsifyState, around, keeps, masks, prunes, sparsify, sparsity_report

__all__ = [
    "Allocation",
    "AroundState",
    "Criterion",
    "Pattern",
    "Report",
    "Row",
    "Schedule",
    "Seen",
    "SparsifyState",
    "Sparsity",
    "around",
    "constant",
    "cubic",
    "given",
    "global_threshold",
    "groups",
    "keeps",
    "kth_largest",
    "left_out",
    "magnitude",
    "masks",
    "one_shot",
    "per_weight",
    "prunes",
    "sparsify",
    "sparsity_report",
    "topk_mask",
    "uniform",
    "unstructured",
]
