"""Sequences from documents, against references that go one token at a time."""

import numpy as np
import pytest

from bmjax import data
from bmjax.data import digest, packing

SPLITS = ("train", "valid", "test")


def documents(lengths, seed=0, high=50):
    rng = np.random.default_rng(seed)
    return data.Documents.of([rng.integers(0, high, length).astype(np.uint16) for length in lengths])


def sequences(docs, vocabulary=50, **settings):
    return data.sequences("made", docs, data.Data(**{"length": 8, "test": 0.2, "valid": 0.2, **settings}), vocabulary)


def texts(split):
    """Each sequence as the tokens that it was cut from."""
    return [(*row, last) for row, last in zip(split.inputs.tolist(), split.targets[:, -1].tolist())]


def test_one_document_is_cut_into_ranges_of_consecutive_sequences():
    docs = documents([1000])
    dataset = sequences(docs)
    assert (dataset.kind, dataset.classes, dataset.class_names, dataset.shape) == ("tokens", 50, (), (8,))
    for name, low, high in (("train", 0, 600), ("valid", 600, 800), ("test", 800, 1000)):
        split = getattr(dataset, name)
        want = [tuple(docs.stream[i : i + 9].tolist()) for i in range(low, high - 8, 8)]
        assert texts(split) == want
        np.testing.assert_array_equal(split.inputs[:, 1:], split.targets[:, :-1])
        assert np.shares_memory(split.inputs, docs.stream)
    np.testing.assert_array_equal(
        np.concatenate([getattr(dataset, name).id for name in SPLITS]), np.arange(sum(len(getattr(dataset, n)) for n in SPLITS))
    )
    batch = data.train_batches(dataset.train, 4, 0)[0]
    assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
        "inputs": (np.int32, (4, 8)),
        "targets": (np.int32, (4, 8)),
        "weights": (np.float32, (4, 8)),
        "id": (np.int32, (4,)),
    }
    np.testing.assert_array_equal(batch["inputs"], dataset.train.inputs[batch["id"]])
    last = data.eval_batches(dataset.valid, 16)[1]
    np.testing.assert_array_equal(last["weights"], np.repeat((np.arange(16) < len(dataset.valid) - 16)[:, None], 8, axis=1))
    np.testing.assert_array_equal(dataset.normalise(np.array([[3, 4]], np.int64)), [[3, 4]])


@pytest.mark.parametrize("mode", ["concat", "first_fit"])
def test_several_documents_are_never_in_two_splits(mode):
    rng = np.random.default_rng(0)
    docs = data.Documents.of([np.full(length, i, np.uint8) for i, length in enumerate(rng.integers(5, 40, 40))])
    dataset = sequences(docs, packing=mode)
    members = [set(np.unique(getattr(dataset, name).targets[weights(getattr(dataset, name)) > 0])) for name in SPLITS]
    assert sum(map(len, members)) == len(set.union(*members)) == 40
    share = [sum((docs.stream == i).sum() for i in part) / len(docs.stream) for part in members]
    np.testing.assert_allclose(share, [0.6, 0.2, 0.2], atol=0.06)
    assert sequences(docs, packing=mode).fingerprint == dataset.fingerprint


def weights(split):
    return split.extra.get("weights", np.ones(split.targets.shape))


def test_first_fit_keeps_documents_apart():
    docs = documents([3, 20, 1, 6, 2, 9, 5, 4, 30, 8, 2, 7] * 4)
    dataset = sequences(docs, packing="first_fit", limit=0)
    pairs = []
    for name in SPLITS:
        split = getattr(dataset, name)
        batch = split.take(slice(None))
        assert [batch[key].dtype for key in ("segments", "positions", "weights")] == [np.int32, np.int32, np.float32]
        padding = batch["segments"] == 0
        np.testing.assert_array_equal(batch["weights"], np.where(padding, 0, 1))
        for key in ("inputs", "targets", "positions"):
            np.testing.assert_array_equal(batch[key][padding], 0)
        for row, segments in enumerate(batch["segments"]):
            assert segments.max() == len(set(segments) - {0})
            for segment in range(1, segments.max() + 1):
                place = np.flatnonzero(segments == segment)
                np.testing.assert_array_equal(place, np.arange(place[0], place[-1] + 1))
                np.testing.assert_array_equal(batch["positions"][row, place], np.arange(len(place)))
                np.testing.assert_array_equal(batch["inputs"][row, place][1:], batch["targets"][row, place][:-1])
                pairs.append((*batch["inputs"][row, place].tolist(), batch["targets"][row, place[-1]].tolist()))
    want = []
    for start, end in zip(docs.starts, docs.ends):  # every target of every document once, pieces of 8 overlapping by a token
        document = docs.stream[start:end].tolist()
        want += [tuple(document[i : i + 9]) for i in range(0, len(document) - 1, 8)]
    assert sorted(pairs) == sorted(want)
    np.testing.assert_array_equal(data.train_batches(dataset.train, 4, 0)[0]["weights"].shape, (4, 8))


def test_first_fit_takes_the_first_bin_with_room():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 17, 300)
    left, want = [], []
    for count in counts:  # the definition
        chosen = next((i for i, room in enumerate(left) if room >= count), len(left))
        if chosen == len(left):
            left.append(16)
        want.append((chosen, 16 - left[chosen]))
        left[chosen] -= count
    bins, places, numbers = packing.first_fit(counts, 16)
    assert list(zip(bins.tolist(), places.tolist())) == want
    for chosen in range(len(left)):
        np.testing.assert_array_equal(numbers[bins == chosen], np.arange(1, (bins == chosen).sum() + 1))


def test_too_few_documents_are_cut_at_ranges():
    docs = documents([900, 50, 50])
    dataset = sequences(docs, test=0.3, valid=0.1)
    assert texts(dataset.train)[0] == tuple(docs.stream[:9].tolist())
    assert texts(dataset.test)[0] == tuple(docs.stream[700:709].tolist())
    packed = sequences(docs, test=0.3, valid=0.1, packing="first_fit")
    assert weights(packed.test).sum() == 200 - 1 + 49 + 49


def test_a_limit_keeps_the_first_sequences_of_each_split():
    whole, few = (sequences(documents([1000]), limit=limit) for limit in (0, 50))
    assert [len(getattr(few, name)) for name in SPLITS] == [30, 10, 10]
    np.testing.assert_array_equal(few.valid.inputs, whole.valid.inputs[:10])
    assert few.fingerprint != whole.fingerprint


def test_the_fingerprint_sees_tokens_settings_and_vocabulary():
    docs = documents([1000])
    found = {sequences(docs, **change).fingerprint for change in ({}, {"length": 9}, {"packing": "first_fit"}, {"test": 0.3})}
    found.add(sequences(docs, vocabulary=60).fingerprint)
    docs.stream[123] ^= 1
    found.add(sequences(docs).fingerprint)
    assert len(found) == 6


def test_large_arrays_are_hashed_by_blocks(monkeypatch):
    monkeypatch.setattr(digest, "BLOCK", 64)
    stream = np.arange(100_000, dtype=np.uint32)
    whole, blocks = digest.sha256(stream), digest.sha256(stream, full=1000)
    changes = {"first": 0, "last": -1, "between": 100}
    for name, place in changes.items():
        other = stream.copy()
        other[place] += 1
        assert digest.sha256(other) != whole
        assert (digest.sha256(other, full=1000) != blocks) == (name != "between")
    assert digest.sha256(stream[:-1], full=1000) != blocks


@pytest.mark.parametrize(
    ("lengths", "settings", "message"),
    [
        ([30], {}, "30 tokens leave 6 for the valid split, which needs at least 9; give more text, a smaller data.length"),
        ([5, 5], {"packing": "first_fit", "test": 0.05}, "for the test split, which needs at least 2"),
        ([1] * 40, {"packing": "first_fit"}, "a split has no document of two tokens or more"),
    ],
)
def test_too_little_text_gets_one_line(lengths, settings, message):
    with pytest.raises(ValueError, match=message):
        sequences(documents(lengths), **settings)


def test_ids_outside_the_vocabulary_are_named():
    docs = documents([1000])
    docs.stream[321] = 77
    with pytest.raises(ValueError, match="made: the id 77 at place 321 is outside the vocabulary of 50, which has 0 to 49"):
        sequences(docs)
    with pytest.raises(ValueError, match="the vocabulary of 3000000000 ids is more than int32 holds"):
        sequences(docs, vocabulary=3_000_000_000)
    negative = data.Documents(docs.stream.astype(np.int64) - 1, docs.ends)
    with pytest.raises(ValueError, match="the id -1 at place"):
        sequences(negative, vocabulary=100)
