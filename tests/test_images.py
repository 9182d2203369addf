"""Images from folders and parquet files that the tests make themselves."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import logging
from PIL import Image

from bmjax import data
from bmjax.data import decode

RNG = np.random.default_rng(0)


def picture(height=6, width=5, mode="RGB"):
    shape = (height, width) if mode == "L" else (height, width, 3)
    return RNG.integers(0, 256, shape).astype(np.uint8)


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def folder(root, counts, mode="RGB", prefix=""):
    """{path: pixels} of new PNG files in a folder for each class."""
    made = {}
    for label, count in counts.items():
        (root / prefix / label).mkdir(parents=True)
        for number in range(count):
            path = root / prefix / label / f"{number:03}.png"
            made[str(path.relative_to(root))] = picture(mode=mode)
            path.write_bytes(png(made[str(path.relative_to(root))]))
    return made


def parquet(path, images, labels, metadata=None, **columns):
    table = pa.table({"image": images, "label": labels, **columns})
    pq.write_table(table.replace_schema_metadata(metadata) if metadata else table, path)
    return f"images:{path}"


def pixels_of(dataset):
    """{row in the source: pixels} over all splits."""
    return {int(i): image for split in (dataset.train, dataset.valid, dataset.test) for i, image in zip(split.id, split.inputs)}


def test_a_folder_for_each_class(tmp_path):
    made = folder(tmp_path, {"cat": 20, "ant": 10})
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    dataset = data.load(f"images:{tmp_path}")
    assert (dataset.kind, dataset.class_names, dataset.classes, dataset.shape) == ("classes", ("ant", "cat"), 2, (6, 5, 3))
    assert [len(split) for split in (dataset.train, dataset.valid, dataset.test)] == [15, 3, 12]
    want = [made[name] for name in sorted(made)]
    found = pixels_of(dataset)
    assert sorted(found) == list(range(30))
    for row, image in found.items():
        np.testing.assert_array_equal(image, want[row])
    for split in (dataset.train, dataset.valid, dataset.test):
        np.testing.assert_array_equal(split.targets, split.id >= 10)
        assert split.inputs.base is not None  # a view: the images are in memory once
    wide = dataset.train.inputs.astype(np.float64)
    np.testing.assert_allclose(dataset.offset, wide.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(dataset.scale, wide.std((0, 1, 2)), rtol=1e-6)
    batch = data.train_batches(dataset.train, 4, 0)[0]
    row = int(np.flatnonzero(dataset.train.id == batch["id"][0])[0])
    np.testing.assert_allclose(batch["inputs"][0], (wide[row] - dataset.offset) / dataset.scale, atol=1e-5)
    again = data.load(f"images:{tmp_path}")
    assert again.fingerprint == dataset.fingerprint
    (tmp_path / "ant" / "000.png").write_bytes(png(picture()))
    assert data.load(f"images:{tmp_path}").fingerprint != dataset.fingerprint


def test_folders_with_splits_keep_them_and_get_the_missing_one(tmp_path):
    folder(tmp_path, {"a": 10, "b": 10}, prefix="train")
    folder(tmp_path, {"a": 3, "b": 2}, prefix="test")
    dataset = data.load(data.Data(source=f"images:{tmp_path}", valid=0.2))
    assert [len(split) for split in (dataset.train, dataset.valid, dataset.test)] == [16, 4, 5]
    np.testing.assert_array_equal(np.sort(dataset.test.id), np.arange(20, 25))
    folder(tmp_path, {"a": 2, "b": 2}, prefix="val")
    whole = data.load(f"images:{tmp_path}")
    assert [len(split) for split in (whole.train, whole.valid, whole.test)] == [20, 4, 5]


def test_grey_images_have_one_channel_unless_some_are_coloured(tmp_path):
    made = folder(tmp_path, {"a": 5, "b": 5}, mode="L")
    grey = data.load(f"images:{tmp_path}")
    assert grey.shape == (6, 5, 1)
    np.testing.assert_array_equal(pixels_of(grey)[0][..., 0], made["a/000.png"])
    colour = picture()
    (tmp_path / "b" / "004.png").write_bytes(png(colour))
    both = data.load(f"images:{tmp_path}")
    assert both.shape == (6, 5, 3)
    np.testing.assert_array_equal(pixels_of(both)[0], np.repeat(made["a/000.png"][..., None], 3, axis=2))
    np.testing.assert_array_equal(pixels_of(both)[9], colour)


def test_images_of_several_shapes_are_resized_or_refused(tmp_path):
    folder(tmp_path, {"a": 5, "b": 5})
    (tmp_path / "b" / "002.png").write_bytes(png(np.full((12, 8, 3), 77, np.uint8)))
    with pytest.raises(
        ValueError, match=r"images have 2 shapes: .*\.png is 6x5 and .*png is 12x8|12x8 and .* is 6x5; set data.size"
    ):
        data.load(f"images:{tmp_path}")
    dataset = data.load(data.Data(source=f"images:{tmp_path}", size=4))
    assert dataset.shape == (4, 4, 3)
    np.testing.assert_array_equal(pixels_of(dataset)[7], 77)


def test_memory_is_checked_before_anything_is_decoded(tmp_path, monkeypatch):
    folder(tmp_path, {"a": 5, "b": 5})
    monkeypatch.setattr(decode, "MAX_BYTES", 500)
    monkeypatch.setattr(decode, "_fill", None)
    with pytest.raises(
        ValueError, match=r"10 images of 6x5x3 take 0.0 GB, and at most 0.0 GB are kept .* set data.size or data.limit"
    ):
        data.load(f"images:{tmp_path}")


def test_a_limit_reads_only_what_is_used(tmp_path):
    folder(tmp_path, {"a": 40, "b": 20})
    whole = data.load(f"images:{tmp_path}")
    (tmp_path / "a" / "039.png").write_bytes(b"broken, and not among the first")
    few = data.load(data.Data(source=f"images:{tmp_path}", limit=15))
    assert [len(split) for split in (few.train, few.valid, few.test)] == [7, 2, 6]
    assert set(few.train.id) <= set(whole.train.id)
    assert np.bincount(few.test.targets).tolist() == [4, 2]


@pytest.mark.parametrize("broken", ["text", "truncated", "deep"])
def test_images_that_cannot_be_read_are_named_or_skipped(tmp_path, monkeypatch, broken):
    folder(tmp_path, {"a": 10, "b": 10})
    stream = io.BytesIO()
    Image.fromarray(np.zeros((6, 5), np.uint16)).save(stream, "png")
    content = {"text": b"no image", "truncated": png(picture())[:60], "deep": stream.getvalue()}[broken]
    (tmp_path / "b" / "003.png").write_bytes(content)
    (tmp_path / "b" / "005.png").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"2 of 20 images cannot be read; the first is b/00[35].png: .*set data.on_error to skip"
    ):
        data.load(f"images:{tmp_path}")
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    dataset = data.load(data.Data(source=f"images:{tmp_path}", on_error="skip"))
    assert len(said) == 1
    assert "2 of 20" in said[0]
    found = pixels_of(dataset)
    assert sorted(found) == [i for i in range(20) if i not in (13, 15)]
    np.testing.assert_array_equal(found[14], np.asarray(Image.open(tmp_path / "b" / "004.png")))
    for split in (dataset.train, dataset.valid, dataset.test):
        np.testing.assert_array_equal(split.targets, split.id >= 10)


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        (tmp_path / label / "x.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        data.load(data.Data(source=f"images:{tmp_path}", on_error="skip", test=0.1, valid=0.1))


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_parquet_of_bytes_or_structs(tmp_path, form):
    pictures = [picture() for _ in range(20)]
    encoded = [png(image) for image in pictures]
    images = encoded if form == "bytes" else [{"bytes": content, "path": "x"} for content in encoded]
    labels = np.arange(20) % 2
    features = {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}
    metadata = {"classes": "no,yes"} if form == "bytes" else {"huggingface": json.dumps(features)}
    dataset = data.load(parquet(tmp_path / "a.parquet", images, labels, metadata))
    assert dataset.class_names == ("no", "yes")
    for row, image in pixels_of(dataset).items():
        np.testing.assert_array_equal(image, pictures[row])
    np.testing.assert_array_equal(dataset.train.targets, labels[dataset.train.id])


def test_parquet_labels_may_be_text_and_columns_named(tmp_path):
    encoded, labels = [png(picture()) for _ in range(12)], ["b", "a", "c"] * 4
    source = parquet(tmp_path / "a.parquet", encoded, labels, mask=encoded, other=labels)
    dataset = data.load(data.Data(source=source, column="mask", label="other"))
    assert dataset.class_names == ("a", "b", "c")
    np.testing.assert_array_equal(dataset.test.targets, np.array([1, 0, 2] * 4)[dataset.test.id])


def test_a_folder_of_parquet_files_has_their_splits(tmp_path):
    for name, count in (("train-00000-of-00002", 10), ("train-00001-of-00002", 8), ("validation", 2), ("test", 4)):
        parquet(tmp_path / f"{name}.parquet", [png(picture()) for _ in range(count)], np.arange(count) % 2)
    dataset = data.load(f"images:{tmp_path}")
    assert [len(split) for split in (dataset.train, dataset.valid, dataset.test)] == [18, 2, 4]
    assert (dataset.class_names, dataset.train.id.max()) == (("0", "1"), 17)


def test_parquet_files_that_label_differently_get_one_line(tmp_path):
    parquet(tmp_path / "train.parquet", [png(picture())] * 4, [0, 1, 0, 1])
    parquet(tmp_path / "test.parquet", [png(picture())] * 2, ["a", "b"])
    with pytest.raises(ValueError, match="labels are numbers in some files and text in others"):
        data.load(f"images:{tmp_path}")


GOOD = [png(picture()) for _ in range(6)]


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        (
            {"image": GOOD, "label": [0, 1] * 3},
            {"column": "img"},
            r"'img' is no column of encoded images; there are image \(binary\)",
        ),
        ({"image": GOOD, "label": [0, 1] * 3}, {"label": "image"}, "'image' is no column of labels"),
        ({"image": GOOD, "size": [0.1] * 6}, {}, r"0 columns could be the labels .*size \(double\); set data.label"),
        ({"one": GOOD, "two": GOOD, "label": [0, 1] * 3}, {}, "2 columns could be the encoded images"),
        ({"image": [[1, 2], [3]] * 3, "label": [0, 1] * 3}, {}, r"0 columns could be the encoded images; there are image \(list"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int8())}, {}, "has no rows"),
        ({"image": GOOD, "label": [0, None] * 3}, {}, "row 1 of a.parquet has no label in 'label'"),
        ({"image": GOOD, "label": [0, -1] * 3}, {}, "the label of row 1 of a.parquet is -1; expected 0 to 0"),
        ({"image": GOOD, "label": [0, 2] * 3}, {}, "the class '1' has no images to train on"),
        ({"image": GOOD, "label": [0] * 6}, {}, "there is 1 class; expected at least 2"),
        (
            {"image": [*GOOD[:5], None], "label": [0, 1] * 3},
            {},
            "1 of 6 images cannot be read; the first is row 5 of a.parquet: there are",
        ),
    ],
)
def test_bad_parquet_gets_one_line(tmp_path, columns, settings, message):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message) as raised:
        data.load(data.Data(source=f"images:{tmp_path / 'a.parquet'}", **settings))
    assert "\n" not in str(raised.value)


def test_bad_folders_get_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"images: of no path; give --config.data.source=images:<file.parquet or folder>"):
        data.load("images")
    with pytest.raises(ValueError, match=r"no folder or file '.*gone'"):
        data.load(f"images:{tmp_path / 'gone'}")
    with pytest.raises(ValueError, match="found 0 folders of classes; expected a folder of images for each of 2 or more"):
        data.load(f"images:{tmp_path}")
    folder(tmp_path, {"a": 3, "b": 0})
    with pytest.raises(ValueError, match="the class 'b' has no images in"):
        data.load(f"images:{tmp_path}")
    for name, content in (("a.parquet", b"PAR1 no"), ("b.txt", b"text")):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="not readable as a parquet file"):
        data.load(f"images:{tmp_path / 'a.parquet'}")
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        data.load(f"images:{tmp_path / 'b.txt'}")
    with pytest.raises(ValueError, match="belongs to no split; expected its name to begin with train"):
        data.load(f"images:{tmp_path}")
    (tmp_path / "a.parquet").rename(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="parquet files for test but none whose name begins with train"):
        data.load(f"images:{tmp_path}")
