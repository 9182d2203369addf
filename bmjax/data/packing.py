"""Sequences of tokens from documents: split, packed, shifted by one.

Grain's packers are iterators that must run through everything before a step to know its batch. Here sequence i is known without
the others, so the position in the data stays one integer: `concat` sequences are views of one stream, which may lie on a disk,
and `first_fit` is decided once, over all documents, when the data are loaded.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bmjax.data.dataset import SPLITS, Dataset, Split, shares
from bmjax.data.digest import FULL, sampled, sha256

if TYPE_CHECKING:
    from bmjax.data.pipeline import Data


class Documents(NamedTuple):
    """Documents one after another.

    Attributes:
        stream: token ids [tokens] of any integer type; may be memory-mapped.
        ends: int64 [documents], the place behind each one's last token.
        sizes: bytes of text that each token stands for, ints [tokens], or one number for all; None where that is not known.
    """

    stream: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray | int | None = None

    @classmethod
    def of(cls, documents: list[np.ndarray], sizes: list[np.ndarray] | int | None = None) -> Documents:
        """Documents from their ids [tokens] each, all of one type, and the sizes of each."""
        whole = np.concatenate(sizes) if isinstance(sizes, list) else sizes
        return cls(np.concatenate(documents), np.cumsum([len(document) for document in documents]), whole)

    @property
    def starts(self) -> np.ndarray:
        """int64 [documents], the place of each one's first token."""
        return np.concatenate([[0], self.ends[:-1]])


def sequences(name: str, documents: Documents, data: Data, vocabulary: int, bytes_note: str = "") -> Dataset:
    """The dataset of sequences of `data.length` tokens, each to be predicted from those before it.

    Whole documents go to train, valid or test, drawn once and always alike; where there are too few of them for that, the stream
    is cut into three ranges. No token is in two splits.

    Args:
        name: for messages.
        documents: what there is.
        data: length, packing, limit and the held-out fractions (0.05 each if not set).
        vocabulary: number of ids.
        bytes_note: see `Dataset`.

    Raises:
        ValueError: an id is outside the vocabulary, or a split has too few tokens for one sequence.
    """
    whole = documents.stream.nbytes <= FULL
    _check_ids(name, documents.stream, vocabulary, whole)
    parts = _parts(documents, data)
    for key in SPLITS:
        if len(parts[key].stream) < _fewest(data):
            raise ValueError(
                f"{name}: {len(documents.stream)} tokens leave {len(parts[key].stream)} for the {key} split, which needs at "
                f"least {_fewest(data)}; give more text, a smaller data.length or other data.test and data.valid"
            )
    pack = _concat if data.packing == "concat" else _first_fit
    packed = {key: pack(name, parts[key], data.length) for key in SPLITS}
    kept = shares({key: len(arrays["inputs"]) for key, arrays in packed.items()}, data.limit)
    first, splits = 0, {}
    for key, arrays in packed.items():
        cut = {field: array[: kept[key]] for field, array in arrays.items()}
        ids = np.arange(first, first + kept[key], dtype=np.int32)
        first += kept[key]
        sizes = cut.pop("target_bytes", parts[key].sizes)
        inputs, targets, checked = cut.pop("inputs"), cut.pop("targets"), 0 if whole else vocabulary
        splits[key] = Split(inputs, targets, ids, cut, vocabulary=checked, target_bytes=sizes)
    settings = f"{vocabulary} {data.length} {data.packing} {kept}"
    content = (array for key in SPLITS for array in (parts[key].stream, parts[key].ends))
    zero, one = np.array(0, np.float32), np.array(1, np.float32)
    return Dataset(
        name,
        train=splits["train"],
        valid=splits["valid"],
        test=splits["test"],
        class_names=(),
        offset=zero,
        scale=one,
        fingerprint=sha256(settings, *content, full=FULL),
        kind="tokens",
        vocabulary=vocabulary,
        bytes_note=bytes_note,
    )


def _fewest(data: Data) -> int:
    """Tokens that a split needs: a whole sequence and the target after it, or one pair."""
    return data.length + 1 if data.packing == "concat" else 2


def _check_ids(name: str, stream: np.ndarray, vocabulary: int, whole: bool) -> None:
    """All ids, or of a stream too long for that those that the fingerprint sees; the rest are checked batch by batch."""
    if vocabulary > 2**31:
        raise ValueError(f"{name}: the vocabulary of {vocabulary} ids is more than int32 holds")
    first = 0
    for block in blocks(stream) if whole else sampled(stream):
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            where = f" at place {first + int(np.argmax(block == wrong))}" if whole else ""
            raise ValueError(
                f"{name}: the id {wrong}{where} is outside the vocabulary of {vocabulary}, which has 0 to {vocabulary - 1}; "
                "set data.vocabulary to the one that the ids are of"
            )
        first += len(block)


def blocks(stream: np.ndarray, size: int = 1 << 24) -> list[np.ndarray]:
    """Views of a stream, `size` tokens each, so that none is ever read into memory whole."""
    return [stream[first : first + size] for first in range(0, len(stream), size)]


def _parts(documents: Documents, data: Data) -> dict[str, Documents]:
    """Each split's documents."""
    fractions = data.fractions(0.05, 0.05)
    lengths = documents.ends - documents.starts
    order = np.random.RandomState(0).permutation(len(lengths))
    middle = (np.cumsum(lengths[order]) - lengths[order] / 2) / len(documents.stream)
    place = np.empty(len(lengths))
    place[order] = middle
    held = fractions["test"] + fractions["valid"]
    member = {
        "train": place >= held,
        "valid": (place >= fractions["test"]) & (place < held),
        "test": place < fractions["test"],
    }
    if all(lengths[member[key]].sum() >= _fewest(data) for key in SPLITS):
        return {key: _chosen(documents, np.flatnonzero(member[key])) for key in SPLITS}
    total = len(documents.stream)
    test = total - round(fractions["test"] * total)
    valid = test - round(fractions["valid"] * total)
    return {
        "train": _between(documents, 0, valid),
        "valid": _between(documents, valid, test),
        "test": _between(documents, test, total),
    }


def _chosen(documents: Documents, which: np.ndarray) -> Documents:
    starts = documents.starts
    cuts, sizes = [slice(starts[i], documents.ends[i]) for i in which], documents.sizes
    return Documents.of(
        [documents.stream[cut] for cut in cuts], [sizes[cut] for cut in cuts] if isinstance(sizes, np.ndarray) else sizes
    )


def _between(documents: Documents, low: int, high: int) -> Documents:
    """A range of the stream, a view of it; documents that reach over its borders are cut."""
    inside = documents.ends[(documents.ends > low) & (documents.ends < high)]
    sizes = documents.sizes[low:high] if isinstance(documents.sizes, np.ndarray) else documents.sizes
    return Documents(documents.stream[low:high], np.append(inside, high) - low, sizes)


def _concat(name: str, documents: Documents, length: int) -> dict[str, np.ndarray]:
    """Consecutive sequences [n, length] of one stream and, one token on, their targets: both views; a shorter rest is dropped."""
    stream = documents.stream
    count = (len(stream) - 1) // length
    shape, shifted = (count, length), slice(1, count * length + 1)
    packed = {"inputs": stream[: count * length].reshape(shape), "targets": stream[shifted].reshape(shape)}
    if isinstance(documents.sizes, np.ndarray):
        packed["target_bytes"] = documents.sizes[shifted].reshape(shape)
    return packed


def _first_fit(name: str, documents: Documents, length: int) -> dict[str, np.ndarray]:
    """Documents side by side in sequences [n, length], each in the first that has room for it.

    A document of k tokens gives k - 1 pairs of input and target; one that has more than `length` is cut into pieces, whose
    positions start at 0 again. Padding has weight, segment and target 0.
    """
    starts, counts = _pieces(documents, length)
    if not len(counts):
        raise ValueError(f"{name}: a split has no document of two tokens or more; there is nothing to predict")
    bins, places, segments = first_fit(counts, length)
    shape = (int(bins.max()) + 1, length)
    # The place of every pair in the stream and among the sequences, without a loop over documents.
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    source, target = np.repeat(starts, counts) + within, np.repeat(bins * length + places, counts) + within

    def placed(values: np.ndarray, largest: int) -> np.ndarray:
        array = np.zeros(shape, np.min_scalar_type(largest))
        array.ravel()[target] = values
        return array

    stream, sizes = documents.stream, documents.sizes
    packed = {
        "inputs": placed(stream[source], int(stream.max())),
        "targets": placed(stream[source + 1], int(stream.max())),
        "segments": placed(np.repeat(segments, counts), length),
        "positions": placed(within, length),
        "weights": placed(np.ones(len(within), np.uint8), 1).astype(bool),
    }
    if isinstance(sizes, np.ndarray):
        packed["target_bytes"] = placed(sizes[source + 1], int(sizes.max()))
    return packed


def _pieces(documents: Documents, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, counts): pieces of up to `length` pairs; a piece's last target is the next one's first input."""
    pairs = np.maximum(documents.ends - documents.starts - 1, 0)
    pieces = -(-pairs // length)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(documents.starts, pieces) + number * length
    return starts, np.minimum(np.repeat(pairs, pieces) - number * length, length)


def first_fit(counts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First-fit bin packing, in the order given.

    Args:
        counts: ints [pieces], 1 to `length`.
        length: what a bin holds.

    Returns:
        (bin, place in it, which piece of the bin counted from 1), int64 [pieces] each.
    """
    nobody = np.iinfo(np.int64).max
    free: list[list[int]] = [[] for _ in range(length + 1)]  # by room left: a heap of bins
    first = np.full(length + 1, nobody)  # by room left: the lowest bin
    bins, places, numbers = (np.empty(len(counts), np.int64) for _ in range(3))
    held: list[int] = []  # pieces in each bin
    for piece, count in enumerate(counts.tolist()):
        room = count + int(first[count:].argmin())
        if first[room] == nobody:
            chosen, room = len(held), length
            held.append(0)
        else:
            chosen = heapq.heappop(free[room])
            first[room] = free[room][0] if free[room] else nobody
        held[chosen] += 1
        bins[piece], places[piece], numbers[piece] = chosen, length - room, held[chosen]
        left = room - count
        if left:
            heapq.heappush(free[left], chosen)
            first[left] = free[left][0]
    return bins, places, numbers
