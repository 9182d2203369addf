"""What a source gives: three splits of normalised examples, checked."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples of one split.

    Attributes:
        inputs: float32 [n, ...], normalised.
        targets: int32 [n].
        id: int32 [n], the example's row in the source.
    """

    inputs: np.ndarray
    targets: np.ndarray
    id: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data source's examples and what is known about them.

    Attributes:
        name: as given to `load`.
        train, valid, test: the splits.
        class_names: one for each class.
        offset, scale: float32, broadcast against one raw example: normalised = (raw - offset) / scale.
        fingerprint: sha256 (hex) of raw inputs, targets and splits.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    class_names: tuple[str, ...]
    offset: np.ndarray
    scale: np.ndarray
    fingerprint: str

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example's inputs."""
        return self.train.inputs.shape[1:]

    def normalise(self, raw: np.ndarray) -> np.ndarray:
        """Raw inputs [n, ...] as the model takes them, float32."""
        return ((raw - self.offset) / self.scale).astype(np.float32)


def build(
    name: str,
    inputs: np.ndarray,
    targets: np.ndarray,
    rows: Mapping[str, np.ndarray],
    *,
    class_names: Sequence[str],
    offset: np.ndarray | None = None,
    scale: np.ndarray | None = None,
) -> Dataset:
    """Checks a source's arrays and makes a Dataset of them.

    Args:
        name: for messages.
        inputs: real numbers [n, ...], raw.
        targets: ints [n].
        rows: {"train", "valid", "test": ints, rows of the arrays}.
        class_names: one for each class.
        offset, scale: normalisation; the mean and standard deviation of each feature (of each channel, for images
            [n, H, W, C]) over the train split where not given.

    Raises:
        ValueError: arrays are empty, not finite, of different lengths; a label is outside the classes; a split is empty or shares
            rows with another.
    """
    _check_arrays(name, inputs, targets, len(class_names))
    _check_rows(name, rows, len(inputs))
    if offset is None or scale is None:
        train = inputs[rows["train"]].astype(np.float64)
        axes = tuple(range(train.ndim - 1)) if train.ndim == 4 else 0
        offset, scale = train.mean(axes), train.std(axes)
        scale = np.where(scale > 0, scale, 1.0)
    offset, scale = np.asarray(offset, np.float32), np.asarray(scale, np.float32)
    normalised = ((inputs - offset) / scale).astype(np.float32)
    splits = {
        key: Split(normalised[rows[key]], targets[rows[key]].astype(np.int32), rows[key].astype(np.int32)) for key in SPLITS
    }
    digest = hashlib.sha256()
    for array in (inputs, targets, *(rows[key] for key in SPLITS)):
        digest.update(f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return Dataset(name, **splits, class_names=tuple(class_names), offset=offset, scale=scale, fingerprint=digest.hexdigest())


def _check_arrays(name: str, inputs: np.ndarray, targets: np.ndarray, classes: int) -> None:
    if inputs.ndim < 2 or inputs.size == 0:
        raise ValueError(f"{name}: inputs have shape {list(inputs.shape)}; expected at least one example [n, ...]")
    if inputs.dtype.kind not in "fiub":
        raise ValueError(f"{name}: inputs are {inputs.dtype}; expected real numbers")
    if targets.shape != inputs.shape[:1]:
        raise ValueError(f"{name}: targets have shape {list(targets.shape)}; expected [{len(inputs)}], one label for each input")
    if targets.dtype.kind not in "iu":
        raise ValueError(f"{name}: targets are {targets.dtype}; expected integers, the class of each example")
    outside = np.flatnonzero((targets < 0) | (targets >= classes))
    if outside.size:
        row = outside[0]
        raise ValueError(f"{name}: the target of row {row} is {targets[row]}; expected a class from 0 to {classes - 1}")
    if classes < 2:
        raise ValueError(f"{name}: there is {classes} class; expected at least 2")
    bad = np.flatnonzero(~np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1))
    if bad.size:
        raise ValueError(f"{name}: the inputs of row {bad[0]} hold NaN or infinity ({bad.size} such rows); clean or drop them")


def _check_rows(name: str, rows: Mapping[str, np.ndarray], examples: int) -> None:
    owner = np.full(examples, -1)
    for index, key in enumerate(SPLITS):
        split = rows[key]
        if split.size == 0:
            raise ValueError(f"{name}: the {key} split is empty; every split needs examples")
        if split.ndim != 1 or split.dtype.kind not in "iu" or split.min() < 0 or split.max() >= examples:
            raise ValueError(f"{name}: the rows of the {key} split are not all integers from 0 to {examples - 1}")
        if len(np.unique(split)) != len(split) or (owner[split] >= 0).any():
            raise ValueError(f"{name}: the {key} split has rows that are in a split already; expected each row once")
        owner[split] = index


def stratified(targets: np.ndarray, *, test: float = 0.4, valid: float = 0.1) -> dict[str, np.ndarray]:
    """Rows of each split, each class in proportion, the same at every call.

    Args:
        targets: [n].
        test, valid: fractions; ceil(fraction * n) rows each.
    """
    shuffled = np.random.RandomState(0).permutation(len(targets))  # RandomState's stream is the same in every NumPy
    place = np.empty(len(targets))
    for label in np.unique(targets):
        members = shuffled[targets[shuffled] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = shuffled[np.argsort(place[shuffled], kind="stable")]
    tests, valids = math.ceil(test * len(targets)), math.ceil(valid * len(targets))
    cuts = {"train": order[tests + valids :], "valid": order[tests : tests + valids], "test": order[:tests]}
    return {key: np.sort(rows) for key, rows in cuts.items()}
