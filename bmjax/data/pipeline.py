"""Batches: for training by step number, for evaluation padded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bmjax.config import at_least, field
from bmjax.data import augment as augmentation
from bmjax.data.batches import Batches, as_grain
from bmjax.data.dataset import Dataset, Split

if TYPE_CHECKING:
    import grain

_FRACTION = (lambda value: 0 < value < 1, "above 0 and below 1")
_SOURCES = (
    "digits, arrays:<file.npz>, images:<folder or .parquet>, text:<file or folder> (nothing: Python's own library), "
    "tokens:<file.npy>, jsonl:<file>, parquet:<file>; or a function that makes a Dataset"
)


@dataclasses.dataclass
class Data:
    """Where examples come from and how they are batched. A field that the source has no use for stays at its default."""

    source: str | Callable[[], Dataset] = field("digits", _SOURCES)
    batch: int = field(128, "examples a step, over all devices", check=at_least(1))
    threads: int = field(0, "threads that prepare batches ahead; 0 prepares each when it is needed", check=at_least(0))
    test: float | None = field(None, "fraction held out for the verdict; none is 0.4, of tokens 0.05", check=_FRACTION)
    valid: float | None = field(None, "fraction held out for choices; none is 0.1, of tokens 0.05", check=_FRACTION)
    limit: int = field(0, "use so many examples of all splits together; 0 is all", check=at_least(0))
    size: int = field(0, "images: height and width after resizing; 0 keeps theirs", check=at_least(0))
    on_error: str = field("raise", "images: what to do where some cannot be read", choices=("raise", "skip"))
    column: str = field("", "images, jsonl, parquet: the column of images, or of text; empty finds it, or takes text")
    label: str = field("", "images: the column of labels; empty finds it")
    length: int = field(256, "tokens: how many a sequence", check=at_least(1))
    packing: str = field("concat", "tokens: one stream cut anywhere, or whole documents, padded", choices=("concat", "first_fit"))
    tokenizer: str = field("", "text: a tokenizers JSON file; empty takes bytes")
    vocabulary: int = field(
        0,
        "number of ids; 0 takes the tokenizer's or the largest id + 1; arrays: inputs are ids",
        check=at_least(0),
    )
    end: int = field(-1, "text: id put after each document; -1 puts none", check=at_least(-1))

    def fractions(self, test: float = 0.4, valid: float = 0.1) -> dict[str, float]:
        """{"test", "valid"}: the fractions held out, these where none are given."""
        return {
            "test": test if self.test is None else self.test,
            "valid": valid if self.valid is None else self.valid,
        }

    def validate(self) -> None:
        """Raises ValueError where the held-out fractions leave nothing to train on."""
        if sum(self.fractions(0, 0).values()) >= 1:
            raise ValueError(
                f"test is {self.test} and valid is {self.valid}; together they must be below 1 to leave examples to train on"
            )


def train_batches(split: Split, batch: int, seed: int, augment: augmentation.Augment | None = None) -> grain.MapDataset:
    """A dataset whose item i is the whole batch of step i, for any i.

    Each epoch is a new permutation of all examples that depends on (seed, epoch); a batch may hold the end of one and the start
    of the next, so that no example is dropped.

    Args:
        split: the examples.
        batch: examples in a batch.
        seed: of the shuffling and of all that is random in the augmentation.
        augment: random changes, drawn from (seed, step) only.

    Returns:
        A Grain dataset of {"inputs": float32 [B, ...] or int32 [B, T], "targets": int32 [B] or [B, T], "weights": float32 like
        targets, "id": int32 [B]}, the split's extra arrays, and what `augment.apply` adds. Items may be made in several threads.

    Raises:
        ValueError: the batch is smaller than 1 or larger than the split, the seed is negative, no item of the split has a weight
            above 0, or as `augment.check`.
    """
    if not 1 <= batch <= len(split):
        raise ValueError(f"the batch size is {batch}; expected 1 to {len(split)}, the examples of the train split")
    if seed < 0:
        raise ValueError(f"the data seed is {seed}; expected at least 0")
    _check_weights(split, "train on")
    augment = augment or augmentation.Augment()
    augmentation.check(augment, split)
    return as_grain(Batches(split, batch, seed, augment))


class EvalBatches(Sequence[dict[str, np.ndarray]]):
    """All examples of a split once, in order, a batch at a time; see `eval_batches`."""

    def __init__(self, split: Split, batch: int) -> None:
        self._split, self._batch = split, batch

    def __len__(self) -> int:
        return -(-len(self._split) // self._batch)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        first = range(0, len(self._split), self._batch)[index]
        place = np.arange(first, first + self._batch)
        real = place < len(self._split)
        batch = self._split.take(np.where(real, place, first))
        weights = batch.get("weights", np.ones(batch["targets"].shape, np.float32))
        batch["weights"] = np.where(real.reshape(-1, *(1,) * (weights.ndim - 1)), weights, np.float32(0))
        batch["id"] = np.where(real, batch["id"], np.int32(-1))
        return batch


def eval_batches(split: Split, batch: int) -> EvalBatches:
    """All examples once, in order, each batch made when asked for; the last one is filled up with copies of weight 0 and id -1.

    Raises:
        ValueError: the batch is smaller than 1, the split is empty, or no item of it has a weight above 0.
    """
    if batch < 1:
        raise ValueError(f"the evaluation batch size is {batch}; expected at least 1")
    if len(split) == 0:
        raise ValueError("the split to evaluate is empty; expected at least one example")
    _check_weights(split, "evaluate")
    return EvalBatches(split, batch)


def _check_weights(split: Split, what: str) -> None:
    """Raises ValueError if every item of a split has weight 0; looks no further than the first that has not."""
    weights = split.extra.get("weights")
    if weights is not None and not any(np.any(weights[at : at + 1024] > 0) for at in range(0, len(weights), 1024)):
        raise ValueError(
            f"the weights of all {len(split)} examples are 0, so there is nothing to {what}; give some of them a weight above 0"
        )
