"""Batches: for training by step number, for evaluation padded."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from bmjax.config import at_least, field, within
from bmjax.data.dataset import Split

if TYPE_CHECKING:
    import grain


@dataclasses.dataclass
class Augment:
    """Random changes of training inputs; student and teacher see the same ones."""

    shift: int = field(0, "largest move of an image each way, pixels; filled with 0", check=at_least(0))
    shifted: float = field(0.5, "fraction of the images that are moved", check=within(0, 1))
    noise: float = field(0.0, "standard deviation of Gaussian noise on the normalised inputs", check=at_least(0))


@dataclasses.dataclass
class Data:
    """Where examples come from and how they are batched."""

    source: str = field("digits", "digits, or arrays:<file.npz> with inputs [n, ...] and targets [n]")
    batch: int = field(128, "examples a step, over all devices", check=at_least(1))


def train_batches(split: Split, batch: int, seed: int, augment: Augment | None = None) -> grain.MapDataset:
    """A dataset whose item i is the whole batch of step i, for any i.

    Each epoch is a new permutation of all examples that depends on (seed, epoch); a batch may hold the end of one and the start
    of the next, so that no example is dropped.

    Args:
        split: the examples.
        batch: examples in a batch.
        seed: of the shuffling and shifting.
        augment: random changes, drawn from (seed, step) only.

    Returns:
        A Grain dataset of {"inputs": float32 [B, ...], "targets": int32 [B], "weights": float32 ones [B], "id": int32 [B]}.

    Raises:
        ValueError: the batch is smaller than 1 or larger than the split, the seed is negative, the inputs are no images to shift.
    """
    from bmjax.data.batches import TrainBatches  # Grain takes a second to import

    if not 1 <= batch <= len(split):
        raise ValueError(f"the batch size is {batch}; expected 1 to {len(split)}, the examples of the train split")
    if seed < 0:
        raise ValueError(f"the data seed is {seed}; expected at least 0")
    augment = augment or Augment()
    shift = augment.shift
    if shift and (split.inputs.ndim != 4 or not 0 < shift < min(split.inputs.shape[1:3])):
        raise ValueError(
            f"shift is {shift} for inputs {list(split.inputs.shape[1:])}; expected images [H, W, C] larger than the shift"
        )
    return TrainBatches(split, batch, seed, augment)


def eval_batches(split: Split, batch: int) -> list[dict[str, np.ndarray]]:
    """All examples once, in order; the last batch is filled up with copies of weight 0 and id -1.

    Raises:
        ValueError: the batch is smaller than 1, or the split is empty.
    """
    if batch < 1:
        raise ValueError(f"the evaluation batch size is {batch}; expected at least 1")
    if len(split) == 0:
        raise ValueError("the split to evaluate is empty; expected at least one example")
    batches = []
    for first in range(0, len(split), batch):
        place = np.arange(first, first + batch)
        real = place < len(split)
        rows = np.where(real, place, first)
        ids = np.where(real, split.id[rows], -1).astype(np.int32)
        batches.append(
            {"inputs": split.inputs[rows], "targets": split.targets[rows], "weights": real.astype(np.float32), "id": ids}
        )
    return batches
