"""Pruning as an optax transform.

    tx = optax.chain(optax.adamw(1e-3), prune.sparsify(prune.magnitude(), sparsity=0.8, schedule=prune.cubic(100, 900)))

Score, pattern, allocation and schedule are separate choices, each a small function in the file of its name.
"""

from bmjax.prune.allocation import Allocation, by_layer, erdos_renyi, erdos_renyi_kernel, global_threshold, owl, uniform
from bmjax.prune.calibration import Calibrated, LayerRow, Method, layerwise, smallest, sparsegpt, wanda
from bmjax.prune.carrying import carriers
from bmjax.prune.criteria import Criterion, Seen, fisher, given, magnitude, movement, per_weight, random, saliency, taylor
from bmjax.prune.curves import from_sensitivity
from bmjax.prune.gated_model import Gated, gated, l0_term
from bmjax.prune.gates import Gates, hard_concrete
from bmjax.prune.masking import AroundState, SparsifyState
from bmjax.prune.patterns import Pattern, block, channel, groups, left_out, matrix, n_m, unstructured
from bmjax.prune.reconstruction import sparsegpt_update, wanda_mask
from bmjax.prune.report import Report, Row, keeps, masks, nan_scores, overview, prunes, saved, sparsity_report
from bmjax.prune.schedules import Schedule, constant, cubic, iterative, linear, one_shot, periodic, polynomial
from bmjax.prune.sensitivity import Sensitivity, analyse
from bmjax.prune.settings import Sparsity
from bmjax.prune.sparse_training import ac_dc, rewind, rigl, sparse_evolution, static_sparse
from bmjax.prune.straight import StraightThrough, straight_through, through_masks
from bmjax.prune.threshold import block_mask, kth_largest, nm_mask, topk_mask
from bmjax.prune.transform import around, sparsify

__all__ = [
    "Allocation",
    "AroundState",
    "Calibrated",
    "Criterion",
    "Gated",
    "Gates",
    "LayerRow",
    "Method",
    "Pattern",
    "Report",
    "Row",
    "Schedule",
    "Seen",
    "Sensitivity",
    "SparsifyState",
    "Sparsity",
    "StraightThrough",
    "ac_dc",
    "analyse",
    "around",
    "block",
    "block_mask",
    "by_layer",
    "carriers",
    "channel",
    "constant",
    "cubic",
    "erdos_renyi",
    "erdos_renyi_kernel",
    "fisher",
    "from_sensitivity",
    "gated",
    "given",
    "global_threshold",
    "groups",
    "hard_concrete",
    "iterative",
    "keeps",
    "kth_largest",
    "l0_term",
    "layerwise",
    "left_out",
    "linear",
    "magnitude",
    "masks",
    "matrix",
    "movement",
    "n_m",
    "nan_scores",
    "nm_mask",
    "one_shot",
    "overview",
    "owl",
    "per_weight",
    "periodic",
    "polynomial",
    "prunes",
    "random",
    "rewind",
    "rigl",
    "saliency",
    "saved",
    "smallest",
    "sparse_evolution",
    "sparsegpt",
    "sparsegpt_update",
    "sparsify",
    "sparsity_report",
    "static_sparse",
    "straight_through",
    "taylor",
    "through_masks",
    "topk_mask",
    "uniform",
    "unstructured",
    "wanda",
    "wanda_mask",
]
