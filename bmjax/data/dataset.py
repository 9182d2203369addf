"""What a source gives: three splits of examples, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from bmjax.data.digest import sha256

SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples of one split, as they are kept in memory or on the disk; `take` gives them as a model takes them.

    Attributes:
        inputs: float32 [n, ...], normalised; or uint8 images [n, H, W, C], raw; or token ids [n, T] of any integer type.
        targets: ints [n], or [n, T] for tokens.
        id: int32 [n], the example's row in the source.
        extra: more arrays by name, the example first ("weights", "segments", "positions"); they are in every batch.
        offset, scale: float32, shaped like one example: (raw - offset) / scale is what a model takes; None: inputs are that.
        vocabulary: ids that are not below it are refused by `take`; 0 where all were checked already.
        target_bytes: bytes of text that each target stands for, ints [n, T], or one number for all; None where that is not
            known. They are in no batch.
    """

    inputs: np.ndarray
    targets: np.ndarray
    id: np.ndarray
    extra: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    offset: np.ndarray | None = None
    scale: np.ndarray | None = None
    vocabulary: int = 0
    target_bytes: np.ndarray | int | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def tokens(self) -> bool:
        """Whether the inputs are token ids."""
        return self.offset is None and self.inputs.dtype.kind in "iu"

    @property
    def text_bytes(self) -> int | None:
        """Bytes of the text that all targets of a weight above 0 stand for together; None where that is not known."""
        if self.target_bytes is None:
            return None
        counted = np.asarray(self.extra.get("weights", 1)) > 0
        counted = counted.reshape(counted.shape + (1,) * (self.targets.ndim - counted.ndim))
        sizes = np.broadcast_to(self.target_bytes, self.targets.shape)
        return int(np.sum(sizes, where=np.broadcast_to(counted, sizes.shape), dtype=np.int64))

    def take(self, rows: np.ndarray | slice) -> dict[str, np.ndarray]:
        """Some examples as a model takes them: {"inputs", "targets", "id" and the extra arrays}, float32 and int32.

        Args:
            rows: ints [B], or a slice.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else rows
        batch = {"inputs": self.inputs.take(rows, axis=0), "targets": self.targets.take(rows, axis=0), "id": self.id.take(rows)}
        for name, array in self.extra.items():
            batch[name] = array.take(rows, axis=0)
        if self.offset is not None and self.scale is not None:
            inputs = np.subtract(batch["inputs"], self.offset, dtype=np.float32)
            batch["inputs"] = np.divide(inputs, self.scale, out=inputs)
        if self.vocabulary:
            _check_ids((batch["inputs"], batch["targets"]), self.vocabulary)
        return {name: _plain(array) for name, array in batch.items()}


def _check_ids(arrays: Sequence[np.ndarray], vocabulary: int) -> None:
    low, high = min(array.min() for array in arrays), max(array.max() for array in arrays)
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise ValueError(
            f"a batch holds the id {wrong}, which is outside the vocabulary of {vocabulary}; correct data.vocabulary, or what "
            "is called padding"
        )


def _plain(array: np.ndarray) -> np.ndarray:
    wanted = np.int32 if array.dtype.kind in "iu" else np.float32
    return array if array.dtype == wanted else array.astype(wanted)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data source's examples and what is known about them.

    Attributes:
        name: as given to `load`.
        train, valid, test: the splits.
        class_names: one for each class; empty for tokens.
        offset, scale: float32, broadcast against one raw example: normalised = (raw - offset) / scale.
        fingerprint: sha256 (hex) of raw inputs, targets and splits.
        kind: "classes", or "tokens" where inputs and targets are token ids [n, T].
        vocabulary: number of token ids; 0 where inputs are no ids.
        bytes_note: why the bytes that tokens stand for are not known, one line; "" where they are, or need no word.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    class_names: tuple[str, ...]
    offset: np.ndarray
    scale: np.ndarray
    fingerprint: str
    kind: str = "classes"
    vocabulary: int = 0
    bytes_note: str = ""

    def within(self, vocabulary: int) -> Dataset:
        """The same tokens, of which `Split.take` refuses those that are not below `vocabulary`; classes as they are."""
        if self.kind != "tokens" or vocabulary >= self.vocabulary:
            return self
        splits = {name: dataclasses.replace(getattr(self, name), vocabulary=vocabulary) for name in SPLITS}
        return dataclasses.replace(self, **splits)

    @property
    def classes(self) -> int:
        """Number of classes; for tokens the size of the vocabulary."""
        return self.vocabulary if self.kind == "tokens" else len(self.class_names)

    @property
    def ids(self) -> bool:
        """Whether inputs are token ids: those of language data, or of texts that have a class."""
        return self.train.tokens

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example's inputs."""
        return self.train.inputs.shape[1:]

    def normalise(self, raw: np.ndarray) -> np.ndarray:
        """Raw inputs [n, ...] as the model takes them: float32, or int32 ids."""
        return _plain(raw) if self.ids else ((raw - self.offset) / self.scale).astype(np.float32)

    def raw(self, split: Split) -> np.ndarray:
        """A split's inputs as the source had them: float32, or int32 ids."""
        if self.ids or split.offset is not None:
            return split.inputs.astype(np.int32 if self.ids else np.float32)
        return (split.inputs * self.scale + self.offset).astype(np.float32)


def build(
    name: str,
    inputs: np.ndarray,
    targets: np.ndarray,
    rows: Mapping[str, np.ndarray],
    *,
    class_names: Sequence[str],
    offset: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    ids: np.ndarray | None = None,
    limit: int = 0,
    vocabulary: int = 0,
) -> Dataset:
    """Checks a source's arrays and makes a Dataset of them.

    Images [n, H, W, C] of uint8 stay bytes in memory and are normalised batch by batch; all else is normalised here.

    Args:
        name: for messages.
        inputs: real numbers [n, ...], raw.
        targets: ints [n].
        rows: {"train", "valid", "test": ints, rows of the arrays}.
        class_names: one for each class.
        offset, scale: normalisation; the mean and standard deviation of each feature (of each channel, for images
            [n, H, W, C]) over the train split where not given.
        ids: ints [n], what each row is called in the source; its number if not given.
        limit: see `limited`.
        vocabulary: above 0, inputs are token ids [n, T] below it and stay as they are.

    Raises:
        ValueError: arrays are empty, not finite, of different lengths; a label is outside the classes; an id is outside the
            vocabulary; a split is empty or shares rows with another.
    """
    _check_arrays(name, inputs, targets, len(class_names))
    if vocabulary:
        _check_token_inputs(name, inputs, vocabulary)
        offset, scale = np.zeros((), np.float32), np.ones((), np.float32)
    _check_rows(name, rows, len(inputs))
    rows = limited(rows, targets, limit) if limit else rows
    raw = inputs.dtype == np.uint8 and inputs.ndim == 4
    if offset is None or scale is None:
        offset, scale = _byte_moments(inputs, rows["train"]) if raw else _moments(inputs, rows["train"])
        scale = np.where(scale > 0, scale, 1.0)
    offset, scale = np.asarray(offset, np.float32), np.asarray(scale, np.float32)
    stored = inputs if raw or vocabulary else ((inputs - offset) / scale).astype(np.float32)
    # Repeated over the whole example: a subtraction that broadcasts over three channels takes ten times longer.
    later = [np.broadcast_to(array, inputs.shape[1:]).copy() for array in (offset, scale)] if raw else [None, None]
    ids = np.arange(len(inputs)) if ids is None else ids
    splits = {
        key: Split(_at(stored, rows[key]), targets[rows[key]].astype(np.int32), ids[rows[key]].astype(np.int32), {}, *later)
        for key in SPLITS
    }
    return Dataset(
        name,
        train=splits["train"],
        valid=splits["valid"],
        test=splits["test"],
        class_names=tuple(class_names),
        offset=offset,
        scale=scale,
        fingerprint=sha256(inputs, targets, *(rows[key] for key in SPLITS)),
        vocabulary=vocabulary,
    )


def _check_token_inputs(name: str, inputs: np.ndarray, vocabulary: int) -> None:
    if inputs.dtype.kind not in "iu" or inputs.ndim != 2:
        raise ValueError(f"{name}: inputs are {inputs.dtype} {list(inputs.shape)}; expected token ids, integers [n, T]")
    low, high = int(inputs.min()), int(inputs.max())
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise ValueError(f"{name}: the inputs hold the id {wrong}, which is outside the vocabulary of {vocabulary}")


def _at(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`array[rows]`, without a copy where the rows follow one another."""
    first = int(rows[0])
    return array[first : first + len(rows)] if np.array_equal(rows, np.arange(first, first + len(rows))) else array[rows]


def _moments(inputs: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    train = inputs[rows].astype(np.float64)
    axes = tuple(range(train.ndim - 1)) if train.ndim == 4 else 0
    return train.mean(axes), train.std(axes)


def _byte_moments(images: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, from sums that float64 holds exactly, a few images at a time."""
    size, channels = math.prod(images.shape[1:]), images.shape[-1]
    sums, squares = np.zeros(size), np.zeros(size)
    for first in range(0, len(rows), 512):
        block = images[rows[first : first + 512]].reshape(-1, size).astype(np.float64)
        sums += block.sum(0)
        squares += np.einsum("nf,nf->f", block, block)
    count = len(rows) * size // channels
    mean = sums.reshape(-1, channels).sum(0) / count
    return mean, np.sqrt(np.maximum(squares.reshape(-1, channels).sum(0) / count - mean**2, 0))


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
    if inputs.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1))
        if bad.size:
            raise ValueError(
                f"{name}: the inputs of row {bad[0]} hold NaN or infinity ({bad.size} such rows); clean or drop them"
            )


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


def _spread(targets: np.ndarray) -> np.ndarray:
    """All rows in an order, the same at every call, of which any beginning holds the classes in proportion."""
    shuffled = np.random.RandomState(0).permutation(len(targets))  # RandomState's stream is the same in every NumPy
    place = np.empty(len(targets))
    for label in np.unique(targets):
        members = shuffled[targets[shuffled] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(place[shuffled], kind="stable")]


def stratified(targets: np.ndarray, *, test: float = 0.4, valid: float = 0.1) -> dict[str, np.ndarray]:
    """Rows of each split, each class in proportion, the same at every call.

    Args:
        targets: [n].
        test, valid: fractions; ceil(fraction * n) rows each.
    """
    order = _spread(targets)
    tests, valids = math.ceil(test * len(targets)), math.ceil(valid * len(targets))
    cuts = {"train": order[tests + valids :], "valid": order[tests : tests + valids], "test": order[:tests]}
    return {key: np.sort(rows) for key, rows in cuts.items()}


def limited(rows: Mapping[str, np.ndarray], targets: np.ndarray, limit: int) -> dict[str, np.ndarray]:
    """About `limit` of the splits' rows, each split and within it each class in proportion; all for 0.

    Args:
        rows: {split: ints}.
        targets: [n], all rows'.
        limit: see `shares`.
    """
    kept = shares({key: len(split) for key, split in rows.items()}, limit)
    return {key: np.sort(split[_spread(targets[split])[: kept[key]]]) for key, split in rows.items()}


def shares(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """How many of each split's examples make `limit` together, in proportion, at least one each; all for 0."""
    total = sum(sizes.values())
    if limit == 0 or limit >= total:
        return dict(sizes)
    held = {key: min(size, max(1, round(limit * size / total))) for key, size in sizes.items() if key != "train"}
    return {**held, "train": min(sizes["train"], max(1, limit - sum(held.values())))}
