"""Pruning as an optax transform.

    tx = optax.chain(optax.adamw(1e-3), prune.sparsify(prune.magnitude(), sparsity=0.8, schedule=prune.cubic(100, 900)))

Score, pattern, allocation and schedule are separate choices, each a small function in the file of its name.
"""

from bmjax.prune.allocation import Allocation, by_layer, erdos_renyi, erdos_renyi_kernel, global_threshold, owl, uniform
from bmjax.prune.calibration import Calibrated, LayerRow, Method, layerwise, smallest, sparsegpt, wanda
from bmjax.prune.criteria import Criterion, Seen, fisher, given, magnitude, movement, per_weight, random, saliency, taylor
from bmjax.prune.masking import AroundState, SparsifyState
from bmjax.prune.patterns import Pattern, block, channel, groups, left_out, n_m, unstructured
from bmjax.prune.reconstruction import sparsegpt_update, wanda_mask
from bmjax.prune.report import Report, Row, keeps, masks, prunes, sparsity_report
from bmjax.prune.schedules import Schedule, constant, cubic, iterative, linear, one_shot, periodic, polynomial
from bmjax.prune.settings import Sparsity
from bmjax.prune.sparse_training import ac_dc, rewind, rigl, sparse_evolution, static_sparse
from bmjax.prune.straight import StraightThrough, straight_through
from bmjax.prune.threshold import block_mask, kth_largest, nm_mask, topk_mask
from bmjax.prune.transform import around, sparsify

__all__ = [
    "Allocation",
    "AroundState",
    "Calibrated",
    "Criterion",
    "LayerRow",
    "Method",
    "Pattern",
    "Report",
    "Row",
    "Schedule",
    "Seen",
    "SparsifyState",
    "Sparsity",
    "StraightThrough",
    "ac_dc",
    "around",
    "block",
    "block_mask",
    "by_layer",
    "channel",
    "constant",
    "cubic",
    "erdos_renyi",
    "erdos_renyi_kernel",
    "fisher",
    "given",
    "global_threshold",
    "groups",
    "iterative",
    "keeps",
    "kth_largest",
    "layerwise",
    "left_out",
    "linear",
    "magnitude",
    "masks",
    "movement",
    "n_m",
    "nm_mask",
    "one_shot",
    "owl",
    "per_weight",
    "periodic",
    "polynomial",
    "prunes",
    "random",
    "rewind",
    "rigl",
    "saliency",
    "smallest",
    "sparse_evolution",
    "sparsegpt",
    "sparsegpt_update",
    "sparsify",
    "sparsity_report",
    "static_sparse",
    "straight_through",
    "taylor",
    "topk_mask",
    "uniform",
    "unstructured",
    "wanda",
    "wanda_mask",
]
