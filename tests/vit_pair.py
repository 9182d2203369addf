"""A small vision transformer, a bigger one to teach it, and a batch of which whole shards are padding."""

import functools

import jax
import numpy as np

from bmjax.models.linen import LinenModel
from bmjax.models.vit import ViT

STUDENT = LinenModel(ViT(patch=2, layers=2, width=8, heads=2, head_dim=4, neurons=16, classes=4))
TEACHER = LinenModel(ViT(patch=2, layers=3, width=16, heads=2, head_dim=8, neurons=16, classes=4))
B = 16


def make_batch():
    rng = np.random.default_rng(0)
    weights = np.where(np.arange(B) < 5, 0.0, rng.uniform(0.1, 1.0, B))  # whole shards of padding
    return {
        "inputs": rng.normal(size=(B, 4, 4, 1)).astype(np.float32),
        "targets": rng.integers(0, 4, B).astype(np.int32),
        "weights": weights.astype(np.float32),
        "id": np.arange(B, dtype=np.int32),
    }


@functools.cache
def frozen():
    """The teacher as the step takes it."""
    params, model_state = jax.jit(TEACHER.init)(jax.random.key(7), make_batch())
    return {"params": params, "model_state": model_state}
