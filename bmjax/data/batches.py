"""The Grain dataset of training batches.

Its items are whole batches, gathered in one NumPy call: a Grain element an example costs 100 times more, and the monitoring of
`MapDataset.source` 15 us an item, which a small model's step feels.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from bmjax.data.dataset import Split

if TYPE_CHECKING:
    from bmjax.data.pipeline import Augment


class TrainBatches(grain.MapDataset):
    """Whole batches by step."""

    def __init__(self, split: Split, batch: int, seed: int, augment: Augment) -> None:
        super().__init__()
        self._split, self._batch, self._seed, self._augment = split, batch, seed, augment
        self._weights = np.ones(batch, np.float32)
        self._weights.flags.writeable = False  # shared by all batches
        self._permutation = functools.lru_cache(2)(self._new_permutation)
        self._windows = _windows(split.inputs, augment.shift) if augment.shift else None

    def __len__(self) -> int:
        return sys.maxsize // self._batch

    def __getitem__(self, step: int | slice) -> Any:
        if isinstance(step, slice):
            return self.slice(step)
        rows = self._rows(step)
        return {
            "inputs": self._inputs(rows, step),
            "targets": self._split.targets.take(rows),
            "weights": self._weights,
            "id": self._split.id.take(rows),
        }

    def _inputs(self, rows: np.ndarray, step: int) -> np.ndarray:
        augment = self._augment
        if self._windows is None and not augment.noise:
            return self._split.inputs.take(rows, axis=0)
        rng = np.random.default_rng((self._seed, 1, step))
        if self._windows is None:
            inputs = self._split.inputs.take(rows, axis=0)
        else:
            move = rng.integers(0, 2 * augment.shift + 1, (2, self._batch))
            still = rng.random(self._batch) >= augment.shifted
            inputs = self._windows[rows, *np.where(still, augment.shift, move)]
        return inputs + augment.noise * rng.standard_normal(inputs.shape, np.float32) if augment.noise else inputs

    def _rows(self, step: int) -> np.ndarray:
        epoch, first = divmod(step * self._batch, len(self._split))
        rows = self._permutation(epoch)[first : first + self._batch]
        missing = self._batch - len(rows)
        return np.concatenate([rows, self._permutation(epoch + 1)[:missing]]) if missing else rows

    def _new_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, 0, epoch)).permutation(len(self._split))


def _windows(images: np.ndarray, shift: int) -> np.ndarray:
    """View [n, 2 shift + 1, 2 shift + 1, H, W, C] of padded images: entry (y, x) is moved by (shift - y, shift - x) pixels."""
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:3], axis=(1, 2))
    return np.moveaxis(windows, 3, -1)
