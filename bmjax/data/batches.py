"""The Grain dataset of training batches.

Its items are whole batches, gathered in one NumPy call: a Grain element an example costs 100 times more, and the monitoring of
`MapDataset.source` 15 us an item, which a small model's step feels.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from bmjax.data import augment as augmentation
from bmjax.data.dataset import Split

if TYPE_CHECKING:
    import grain


class Batches:
    """Whole batches by step; may be called from several threads."""

    def __init__(self, split: Split, batch: int, seed: int, augment: augmentation.Augment) -> None:
        self.size = batch
        self._split, self._seed, self._augment = split, seed, augment
        self._weights = np.ones((batch, *split.targets.shape[1:]), np.float32)
        self._weights.flags.writeable = False  # shared by all batches
        self._permutation = functools.lru_cache(2)(self._new_permutation)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step."""
        batch = {"weights": self._weights, **self._split.take(self._rows(step))}
        if "weights" in self._split.extra and not np.any(batch["weights"]):
            self._all_masked(step)
        if not self._augment.works:
            return batch
        return augmentation.apply(batch, self._augment, np.random.default_rng((self._seed, 1, step)))

    def _all_masked(self, step: int) -> None:
        """A step on it has the loss 0. As the first batch it is a mistake, and known before anything is compiled."""
        what = f"the batch of step {step} has no item of a weight above 0, so nothing is learned from it"
        if step == 0:
            raise ValueError(f"{what}; take a larger batch, or correct the data's weights")
        logging.log_first_n(logging.WARNING, "%s; a larger batch has some", 1, what)

    def _rows(self, step: int) -> np.ndarray:
        epoch, first = divmod(step * self.size, len(self._split))
        rows = self._permutation(epoch)[first : first + self.size]
        missing = self.size - len(rows)
        return np.concatenate([rows, self._permutation(epoch + 1)[:missing]]) if missing else rows

    def _new_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, 0, epoch)).permutation(len(self._split))


def as_grain(batches: Batches) -> grain.MapDataset:
    """The batches as a Grain dataset of practically endless length."""
    import grain  # takes a second

    class TrainBatches(grain.MapDataset):
        """Whole batches by step."""

        def __len__(self) -> int:
            return sys.maxsize // batches.size

        def __getitem__(self, step: int | slice) -> Any:
            return self.slice(step) if isinstance(step, slice) else batches(step)

    return TrainBatches()
