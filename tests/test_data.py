import math
import threading
import time

import numpy as np
import pytest

from bmjax import data


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(count, 5, 4, 2)).astype(np.float32)
    return data.Split(inputs, rng.integers(0, 3, count).astype(np.int32), np.arange(count, dtype=np.int32) + 100)


def save(path, **arrays):
    np.savez(path, **arrays)
    return f"arrays:{path}"


def test_digits_splits_are_disjoint_stratified_and_whole(digits):
    from sklearn.datasets import load_digits

    source = load_digits()
    assert (len(digits.train), len(digits.valid), len(digits.test)) == (1797 - 719 - 180, 180, 719)
    ids = np.concatenate([digits.train.id, digits.valid.id, digits.test.id])
    assert sorted(ids) == list(range(1797))
    for split in (digits.train, digits.valid, digits.test):
        np.testing.assert_array_equal(split.targets, source.target[split.id])
        np.testing.assert_array_equal(split.inputs[..., 0] * 16, source.images[split.id])
        share = np.bincount(split.targets) / len(split) - np.bincount(source.target) / 1797
        assert np.abs(share).max() <= 1 / len(split)
    assert (digits.shape, digits.classes, digits.train.inputs.dtype) == ((8, 8, 1), 10, np.float32)
    np.testing.assert_array_equal(digits.normalise(source.images[digits.test.id][..., None]), digits.test.inputs)


def test_digits_are_the_same_every_time(digits):
    again = data.load("digits")
    assert again.fingerprint == digits.fingerprint
    np.testing.assert_array_equal(again.train.id, digits.train.id)


def test_small_classes_are_spread():
    rows = data.stratified(np.array([0] * 20 + [1, 1] + [2]))
    assert {key: len(value) for key, value in rows.items()} == {"test": math.ceil(0.4 * 23), "valid": math.ceil(2.3), "train": 10}
    assert 22 not in rows["test"]  # the only example of a class is not spent on the test
    assert len({20, 21} & set(rows["test"])) == 1


def test_arrays_are_normalised_by_the_train_split(tmp_path):
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(3, 2, (40, 6)), np.arange(40) % 4
    inputs[:, 5] = 7.0
    rows = {"train": np.arange(20), "valid": np.arange(20, 25), "test": np.arange(25, 40)}
    dataset = data.load(save(tmp_path / "a.npz", inputs=inputs, targets=targets, class_names=list("abcd"), **rows))
    np.testing.assert_allclose(dataset.train.inputs[:, :5].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(dataset.train.inputs[:, :5].std(0), 1, atol=1e-6)
    np.testing.assert_array_equal(dataset.test.inputs[:, 5], 0)  # a constant feature
    np.testing.assert_allclose(dataset.test.inputs * dataset.scale + dataset.offset, inputs[25:], rtol=1e-5, atol=1e-5)
    assert dataset.class_names == ("a", "b", "c", "d")
    split = np.array(["train"] * 20 + ["valid"] * 5 + ["test"] * 15)
    column = data.load(save(tmp_path / "b.npz", inputs=inputs, targets=targets, split=split))
    np.testing.assert_array_equal(column.test.id, dataset.test.id)
    assert column.fingerprint == dataset.fingerprint
    inputs[0, 0] += 1
    assert data.load(save(tmp_path / "c.npz", inputs=inputs, targets=targets, split=split)).fingerprint != dataset.fingerprint


def test_images_are_normalised_by_channel(tmp_path):
    inputs = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3)).astype(np.uint8)
    dataset = data.load(save(tmp_path / "a.npz", inputs=inputs, targets=np.arange(50) % 2))
    assert dataset.offset.shape == (3,)
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (25, 5, 20)
    assert dataset.train.inputs.dtype == np.uint8  # bytes stay bytes until they are in a batch
    found = dataset.train.take(slice(None))["inputs"]
    wide = inputs[dataset.train.id].astype(np.float64)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (wide - wide.mean((0, 1, 2))) / wide.std((0, 1, 2)), atol=1e-5)
    np.testing.assert_array_equal(dataset.normalise(inputs[dataset.test.id]), dataset.test.take(slice(None))["inputs"])
    np.testing.assert_array_equal(dataset.raw(dataset.test), inputs[dataset.test.id].astype(np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": None}, "no array 'inputs'; there are targets"),
        ({"targets": None}, "no array 'targets'"),
        ({"inputs": np.zeros((0, 3)), "targets": np.zeros(0, int)}, r"shape \[0, 3\]; expected at least one example"),
        ({"targets": np.zeros(9, int)}, r"targets have shape \[9\]; expected \[10\]"),
        ({"targets": np.linspace(0, 1, 10)}, "targets are float64; expected integers"),
        ({"targets": np.arange(10) - 1}, "the target of row 0 is -1; expected a class from 0 to 8"),
        (
            {"targets": np.arange(10), "class_names": np.array(["a", "b"])},
            "the target of row 2 is 2; expected a class from 0 to 1",
        ),
        ({"targets": np.zeros(10, int)}, "there is 1 class; expected at least 2"),
        ({"inputs": np.full((10, 3), np.nan)}, r"inputs of row 0 hold NaN or infinity \(10 such rows\)"),
        ({"inputs": np.array(["a"] * 10)[:, None]}, "expected real numbers"),
        ({"inputs": np.array([None] * 10)}, "not readable as an .npz file of plain arrays"),
        ({"split": np.array(["train"] * 5 + ["valid"] * 5)}, "the test split is empty"),
        ({"split": np.array(["train"] * 5 + ["eval"] * 5)}, "expected one of train, valid, test"),
        ({"train": np.arange(5)}, "there is train only"),
        (
            {"train": np.arange(5), "valid": np.arange(5, 7), "test": np.arange(6, 10)},
            "test split has rows that are in a split already",
        ),
        ({"train": np.arange(5), "valid": np.arange(5, 7), "test": np.arange(7, 11)}, "not all integers from 0 to 9"),
    ],
)
def test_bad_arrays_get_one_line(tmp_path, change, message):
    arrays = {"inputs": np.random.default_rng(0).normal(size=(10, 3)), "targets": np.arange(10) % 2, **change}
    with pytest.raises(ValueError, match=message) as raised:
        data.load(save(tmp_path / "a.npz", **{key: value for key, value in arrays.items() if value is not None}))
    assert "\n" not in str(raised.value)


def test_rows_are_checked_before_a_limit_takes_some(tmp_path):
    rows = {"train": np.arange(5), "valid": np.arange(5, 7), "test": np.arange(7, 11)}
    source = save(tmp_path / "a.npz", inputs=np.ones((10, 3)), targets=np.arange(10) % 2, **rows)
    with pytest.raises(ValueError, match="not all integers from 0 to 9"):
        data.load(data.Data(source=source, limit=5))


def test_bad_sources_get_one_line(tmp_path):
    with pytest.raises(ValueError, match="no data source 'digit'; the nearest is 'digits' of digits, arrays"):
        data.load("digit")
    with pytest.raises(ValueError, match="takes no argument"):
        data.load("digits:3")
    with pytest.raises(ValueError, match=r"no data file 'gone.npz'"):
        data.load("arrays:gone.npz")
    for name, content in (("a.npz", b"text"), ("b.npz", b"PK\x03\x04broken"), ("c.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not readable as an"):
            data.load(f"arrays:{tmp_path / name}")
    np.save(tmp_path / "d.npy", np.zeros(3))
    with pytest.raises(ValueError, match="not readable as an"):
        data.load(f"arrays:{tmp_path / 'd.npy'}")


def test_epochs_hold_every_example_once():
    split = images(10)
    batches = data.train_batches(split, 4, seed=3)
    ids = np.concatenate([batches[step]["id"] for step in range(10)]).reshape(4, 10)  # 4 epochs of 10, in batches of 4
    np.testing.assert_array_equal(np.sort(ids, axis=1), np.tile(split.id, (4, 1)))
    assert len({tuple(epoch) for epoch in ids}) == 4


def test_batches_depend_on_seed_and_step_only():
    split = images(10)
    one, two, other = (data.train_batches(split, 4, seed, data.Augment(shift=1, shifted=1.0)) for seed in (0, 0, 1))
    late = two[1000]
    for step in (1000, 3, 7):
        for key, value in one[step].items():
            np.testing.assert_array_equal(value, two[step][key])
    np.testing.assert_array_equal(late["inputs"], one[1000]["inputs"])
    assert any((one[step]["id"] != other[step]["id"]).any() for step in range(3))
    batch = one[5]
    assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
        "inputs": (np.float32, (4, 5, 4, 2)),
        "targets": (np.int32, (4,)),
        "weights": (np.float32, (4,)),
        "id": (np.int32, (4,)),
    }
    np.testing.assert_array_equal(batch["targets"], split.targets[batch["id"] - 100])
    np.testing.assert_array_equal(batch["weights"], 1)


def moved(image, down, right):
    """The reference: one pixel at a time."""
    result = np.zeros_like(image)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            if 0 <= y - down < image.shape[0] and 0 <= x - right < image.shape[1]:
                result[y, x] = image[y - down, x - right]
    return result


def test_shifts_move_whole_images_and_fill_with_zero():
    split = images(30)
    seen = set()
    batches = data.train_batches(split, 30, seed=0, augment=data.Augment(shift=2, shifted=1.0))
    for step in range(8):
        batch = batches[step]
        for image, example in zip(batch["inputs"], batch["id"] - 100):
            found = [
                (down, right)
                for down in range(-2, 3)
                for right in range(-2, 3)
                if np.array_equal(image, moved(split.inputs[example], down, right))
            ]
            assert len(found) == 1
            seen.update(found)
    assert len(seen) == 25  # every move happens


def test_evaluation_pads_the_last_batch():
    split = images(7)
    batches = data.eval_batches(split, 3)
    assert [batch["inputs"].shape for batch in batches] == [(3, 5, 4, 2)] * 3
    weights = np.concatenate([batch["weights"] for batch in batches])
    ids = np.concatenate([batch["id"] for batch in batches])
    np.testing.assert_array_equal(weights, [1] * 7 + [0] * 2)
    np.testing.assert_array_equal(ids, [*split.id, -1, -1])
    np.testing.assert_array_equal(np.concatenate([batch["inputs"] for batch in batches])[:7], split.inputs)
    assert len(data.eval_batches(split, 100)) == 1


def test_bad_batch_sizes_get_one_line():
    split = images(10)
    with pytest.raises(ValueError, match="batch size is 0; expected 1 to 10"):
        data.train_batches(split, 0, 0)
    with pytest.raises(ValueError, match="batch size is 11; expected 1 to 10"):
        data.train_batches(split, 11, 0)
    with pytest.raises(ValueError, match="data seed is -1"):
        data.train_batches(split, 4, -1)
    with pytest.raises(ValueError, match=r"shift is 4 for inputs \[5, 4, 2\]"):
        data.train_batches(split, 4, 0, data.Augment(shift=4))
    flat = data.Split(split.inputs.reshape(10, -1), split.targets, split.id)
    with pytest.raises(ValueError, match=r"shift is 1 for inputs \[40\]"):
        data.train_batches(flat, 4, 0, data.Augment(shift=1))
    with pytest.raises(ValueError, match="evaluation batch size is 0"):
        data.eval_batches(split, 0)
    with pytest.raises(ValueError, match="is empty"):
        data.eval_batches(data.Split(split.inputs[:0], split.targets[:0], split.id[:0]), 4)


def test_noise_has_its_deviation_and_follows_the_step():
    split = data.load("digits").train
    noisy = data.train_batches(split, 256, 3, data.Augment(noise=0.2))
    clean = data.train_batches(split, 256, 3)
    noise = noisy[5]["inputs"] - clean[5]["inputs"]
    assert noisy[5]["inputs"].dtype == np.float32
    np.testing.assert_allclose(noise.std(), 0.2, rtol=0.03)
    assert abs(noise.mean()) < 0.01
    np.testing.assert_array_equal(noisy[5]["inputs"], data.train_batches(split, 256, 3, data.Augment(noise=0.2))[5]["inputs"])
    assert np.abs(noisy[6]["inputs"] - clean[6]["inputs"] - noise).max() > 0.1


def test_only_a_fraction_of_the_images_is_shifted():
    split = data.load("digits").train
    moved = data.train_batches(split, 512, 0, data.Augment(shift=1, shifted=0.5))[0]["inputs"]
    same = (moved == data.train_batches(split, 512, 0)[0]["inputs"]).all((1, 2, 3))
    # A shifted image has moved with chance 8/9, so about 5/9 stay.
    assert abs(same.mean() - 5 / 9) < 0.08


def test_fractions_and_a_limit_cut_every_split_in_proportion(tmp_path):
    targets = np.arange(200) % 4
    source = save(tmp_path / "a.npz", inputs=np.arange(400.0).reshape(200, 2), targets=targets)
    whole = data.load(data.Data(source=source, test=0.2, valid=0.1))
    assert [len(split) for split in (whole.train, whole.valid, whole.test)] == [140, 20, 40]
    few = data.load(data.Data(source=source, test=0.2, valid=0.1, limit=40))
    assert [len(split) for split in (few.train, few.valid, few.test)] == [28, 4, 8]
    for part, all_of_it in ((few.train, whole.train), (few.valid, whole.valid), (few.test, whole.test)):
        assert set(part.id) <= set(all_of_it.id)
        np.testing.assert_array_equal(np.bincount(part.targets), len(part) // 4)
        np.testing.assert_array_equal(part.targets, targets[part.id])
    assert few.fingerprint != whole.fingerprint
    assert len(data.load(data.Data(source="digits", limit=100)).train) == 50


def test_a_function_is_a_source():
    made = data.load("digits")
    assert data.load(lambda: made) is made
    with pytest.raises(ValueError, match=r"source function returned dict; expected a bmjax.data.Dataset"):
        data.load(lambda: {})

    def broken():
        return {}["gone"]

    with pytest.raises(KeyError, match="gone") as raised:
        data.load(broken)
    assert raised.traceback[-1].name == "broken"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 5}, "data.length is 5, but the data source digits has no use for it; leave it at 256"),
        ({"source": lambda: None, "limit": 5}, "data.limit is 5, but the data source a function has no use for it"),
        ({"test": 0.6, "valid": 0.4}, "together they must be below 1"),
        ({"test": 0.0}, "data.test is 0.0; expected .* above 0 and below 1"),
        ({"on_error": "ignore"}, "data.on_error is 'ignore'; expected one of raise, skip"),
    ],
)
def test_settings_that_do_not_fit_get_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        data.load(data.Data(**settings))


def test_extra_arrays_are_in_every_batch():
    split = images(10)
    split = data.Split(
        split.inputs, split.targets, split.id, {"weights": np.arange(10) / 8, "slice": np.arange(10, dtype=np.int64)}
    )
    batch = data.train_batches(split, 4, seed=0)[7]
    np.testing.assert_array_equal(batch["weights"], (batch["id"] - 100) / 8)
    np.testing.assert_array_equal(batch["slice"], batch["id"] - 100)
    assert (batch["weights"].dtype, batch["slice"].dtype) == (np.float32, np.int32)
    last = data.eval_batches(split, 6)[1]
    np.testing.assert_array_equal(last["weights"], [6 / 8, 7 / 8, 1, 9 / 8, 0, 0])
    np.testing.assert_array_equal(last["slice"][:4], [6, 7, 8, 9])


class Numbers:
    """Batches that say which threads made them, and fail at step 7 if they are told to."""

    def __init__(self, fails=False):
        self.fails, self.threads, self.made = fails, set(), []

    def __getitem__(self, step):
        time.sleep(0.002 * (step % 3))  # later ones are often ready first
        self.threads.add(threading.current_thread())
        self.made.append(step)
        if self.fails and step == 7:
            raise OSError("step 7 is broken")
        return step


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_stream_is_in_order_and_leaves_no_threads(threads):
    batches = Numbers()
    assert list(data.stream(batches, 4, 30, threads)) == list(range(4, 30))
    assert not any(thread.is_alive() for thread in batches.threads - {threading.current_thread()})
    assert (threading.current_thread() in batches.threads) == (threads == 0)
    assert list(data.stream(batches, 5, 5, threads)) == []


@pytest.mark.parametrize("threads", [0, 2])
def test_an_exception_comes_where_its_batch_would_have(threads):
    stream = data.stream(Numbers(fails=True), 0, 20, threads)
    assert [next(stream) for _ in range(7)] == list(range(7))
    with pytest.raises(OSError, match="step 7 is broken"):
        next(stream)


def test_a_stream_that_is_closed_early_stops_its_threads():
    batches = Numbers()
    stream = data.stream(batches, 0, 1000, 2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    stream.close()
    assert len(batches.threads) == 2
    assert not any(thread.is_alive() for thread in batches.threads)
    assert len(batches.made) <= 3 + 2 * 2 + 1


def test_a_stream_of_real_batches_is_the_plain_loop():
    batches = data.train_batches(images(10), 4, 0, data.Augment(noise=0.1))
    for found, step in zip(data.stream(batches, 2, 9, 2), range(2, 9), strict=True):
        np.testing.assert_array_equal(found["inputs"], batches[step]["inputs"])
