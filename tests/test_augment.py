"""Random changes of batches against references that go one pixel at a time."""

import numpy as np
import pytest

from bmjax import data


def images(count, height=6, width=5, channels=2):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(count, height, width, channels)).astype(np.float32)
    return data.Split(inputs, rng.integers(0, 3, count).astype(np.int32), np.arange(count, dtype=np.int32))


def first(split, augment, batch=None, step=3):
    return data.train_batches(split, batch or len(split), 0, augment)[step]


def test_a_crop_is_a_window_of_the_padded_image_and_every_one_happens():
    split, seen = images(40), set()
    for step in range(5):
        batch = first(split, data.Augment(crop=2), step=step)
        for found, example in zip(batch["inputs"], batch["id"]):
            padded = np.pad(split.inputs[example], ((2, 2), (2, 2), (0, 0)))
            corners = [(y, x) for y in range(5) for x in range(5) if np.array_equal(found, padded[y : y + 6, x : x + 5])]
            assert len(corners) == 1
            seen.update(corners)
    assert len(seen) == 25


def test_bytes_are_padded_with_what_is_0_after_normalisation():
    pixels = np.full((40, 4, 4, 1), 200, np.uint8)
    pixels[::2] = 100
    rows = {"train": np.arange(30), "valid": np.arange(30, 35), "test": np.arange(35, 40)}
    split = data.build("bytes", pixels, np.arange(40) % 2, rows, class_names="ab").train
    found = first(split, data.Augment(crop=3))["inputs"]
    np.testing.assert_allclose(np.unique(found.round(4)), [-1, 0, 1])


def test_the_fraction_that_is_mirrored_is_exactly_mirrored():
    split = images(400)
    batch = first(split, data.Augment(flip=0.25))
    plain = split.inputs[batch["id"]]
    mirrored = (batch["inputs"] == plain[:, :, ::-1]).all((1, 2, 3))
    same = (batch["inputs"] == plain).all((1, 2, 3))
    assert (mirrored ^ same).all()
    assert abs(mirrored.mean() - 0.25) < 0.08
    np.testing.assert_array_equal(split.inputs, images(400).inputs)  # the examples themselves are left alone


def test_mixup_averages_pairs_by_the_weight_that_it_states():
    split = images(300)
    batch = first(split, data.Augment(mixup=0.4))
    assert (batch["targets_b"].dtype, batch["mix"].dtype, batch["mix"].shape) == (np.int32, np.float32, (300,))
    np.testing.assert_array_equal(batch["targets"], split.targets[batch["id"]])
    own = split.inputs[batch["id"]].astype(np.float64)
    mix = batch["mix"].astype(np.float64)
    # What is left without the example's own share is the partner, each example exactly once.
    clear = mix < 0.9
    others = (batch["inputs"] - mix[:, None, None, None] * own) / (1 - np.minimum(mix, 0.9))[:, None, None, None]
    distance = np.abs(others[:, None] - split.inputs[None]).max((2, 3, 4))
    partner = distance.argmin(1)
    assert (distance.min(1)[clear] < 1e-4).all()
    assert len(set(partner[clear])) == clear.sum()
    np.testing.assert_array_equal(batch["targets_b"][clear], split.targets[partner[clear]])
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
    assert abs(mix.mean() - 0.5) < 0.08
    assert abs(mix.var() - 1 / (4 * 1.8)) < 0.02


def test_cutmix_pastes_one_box_and_states_the_area_that_stays():
    split = images(200, 32, 40, 1)
    batch = first(split, data.Augment(cutmix=1.0))
    own = split.inputs[batch["id"]]
    foreign = (batch["inputs"] != own).all(-1)
    np.testing.assert_array_equal((batch["inputs"] == own).all(-1), ~foreign)
    areas, partners = foreign.mean((1, 2)), 0
    for i, mask in enumerate(foreign):
        if not mask.any():
            continue  # no box, or from itself
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = np.zeros_like(mask)
        box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        np.testing.assert_array_equal(mask, box)
        np.testing.assert_allclose(batch["mix"][i], 1 - areas[i], atol=1e-6)
        source = np.flatnonzero((split.inputs[:, mask] == batch["inputs"][i][mask]).all((1, 2)))
        assert len(source) == 1
        assert batch["targets_b"][i] == split.targets[source[0]]
        partners += 1
    assert partners > 150
    # A side s of 1, centred anywhere, covers s - s^2 / 4; with s^2 uniform the mean area is 1/2 - 1/5 + 1/48, less rounding.
    assert abs(areas.mean() - 0.32) < 0.06


def test_both_mixtures_take_turns():
    split, kinds = images(20), set()
    batches = data.train_batches(split, 20, 0, data.Augment(mixup=1.0, cutmix=1.0))
    for step in range(12):
        batch = batches[step]
        kinds.add(bool((batch["inputs"] == split.inputs[batch["id"]]).mean() > 0.2))  # CutMix leaves pixels as they were
    assert kinds == {True, False}


def test_mixup_takes_inputs_of_any_shape():
    split = images(20)
    flat = data.Split(split.inputs.reshape(20, -1), split.targets, split.id)
    whole, found = (first(one, data.Augment(mixup=1.0)) for one in (split, flat))
    np.testing.assert_array_equal(found["inputs"], whole["inputs"].reshape(20, -1))


def test_all_changes_together_depend_on_seed_and_step_only():
    augment = data.Augment(crop=2, flip=0.5, mixup=0.2, cutmix=1.0, noise=0.1)
    one, two = (data.train_batches(images(30), 8, 5, augment) for _ in range(2))
    late = one[9]
    for step in (0, 9):
        for name, value in two[step].items():
            np.testing.assert_array_equal(value, one[step][name])
    np.testing.assert_array_equal(late["inputs"], two[9]["inputs"])
    assert (one[1]["mix"] != one[2]["mix"]).any()
    assert sorted(late) == ["id", "inputs", "mix", "targets", "targets_b", "weights"]


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"shift": 1, "crop": 1}, "shift is 1 and crop is 1; .* set one of them to 0"),
        ({"crop": 5}, r"crop is 5 for inputs \[6, 5, 2\]; expected images \[H, W, C\] larger than the crop"),
    ],
)
def test_changes_that_cannot_be_made_get_one_line(augment, message):
    with pytest.raises(ValueError, match=message):
        first(images(10), data.Augment(**augment))


@pytest.mark.parametrize("name", ["flip", "cutmix", "crop", "shift"])
def test_what_moves_pixels_needs_images(name):
    split = images(10)
    with pytest.raises(ValueError, match=rf"{name} is 1 for inputs \[60\]; expected images"):
        first(data.Split(split.inputs.reshape(10, -1), split.targets, split.id), data.Augment(**{name: 1}))


def test_tokens_are_not_changed():
    ids = np.arange(40).reshape(10, 4)
    split = data.Split(ids, ids, np.arange(10, dtype=np.int32))
    with pytest.raises(ValueError, match="mixup and noise cannot change token ids; set them to 0"):
        first(split, data.Augment(mixup=0.1, noise=0.5))
    assert first(split, data.Augment())["inputs"].dtype == np.int32


def test_a_loss_of_one_class_an_example_refuses_mixtures():
    split = images(10)
    with pytest.raises(ValueError, match="cutmix gives each example two targets, and the hinge loss takes one class only"):
        data.check_augment(data.Augment(cutmix=1.0), split, mixable=False, loss="the hinge loss")
    data.check_augment(data.Augment(flip=0.5), split, mixable=False)
    data.check_augment(data.Augment(cutmix=1.0), split)
