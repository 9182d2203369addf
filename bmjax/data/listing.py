"""Which images there are, with their classes and splits; nothing is decoded here."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bmjax.data.dataset import SPLITS

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_SPLIT_NAMES = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
_LABELS = ("label", "labels", "target", "targets", "class")


class Listing(NamedTuple):
    """Images that were found.

    Attributes:
        names: what errors call each image.
        read: its encoded bytes.
        targets: int32 [n], its class.
        splits: text [n], "train", "valid" or "test"; all "train" where the source has no splits.
        class_names: one for each class.
    """

    names: Sequence[str]
    read: Callable[[int], bytes]
    targets: np.ndarray
    splits: np.ndarray
    class_names: tuple[str, ...]


def of_folder(name: str, root: pathlib.Path) -> Listing:
    """The images of a folder with a folder for each class, or with splits above those, in the order of their names.

    Raises:
        ValueError: there are no classes, or a class has no images to train on.
    """
    if not root.is_dir():
        raise ValueError(f"{name} is a file; expected a folder with a folder for each class, or a .parquet file")
    tops = {"train": root}
    below = _folders(root)
    if {"train"} <= {folder.name for folder in below} <= set(_SPLIT_NAMES):
        tops = {_SPLIT_NAMES[folder.name]: folder for folder in below}
        if len(tops) < len(below):
            raise ValueError(
                f"{name}: the validation split is there twice, as {', '.join(folder.name for folder in below)}; keep one"
            )
    class_names = sorted({folder.name for top in tops.values() for folder in _folders(top)})
    if len(class_names) < 2:
        raise ValueError(
            f"{name}: found {len(class_names)} folders of classes; expected a folder of images for each of 2 or more"
        )
    paths: list[pathlib.Path] = []
    targets: list[int] = []
    splits: list[str] = []
    for split, top in sorted(tops.items(), key=lambda item: SPLITS.index(item[0])):
        for label, class_name in enumerate(class_names):
            images = [
                path for path in sorted((top / class_name).rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()
            ]
            if not images and split == "train":
                raise ValueError(f"{name}: the class {class_name!r} has no images in {top}; add some or remove its folder")
            paths += images
            targets += [label] * len(images)
            splits += [split] * len(images)
    names = [str(path.relative_to(root)) for path in paths]
    return Listing(names, lambda i: paths[i].read_bytes(), np.array(targets, np.int32), np.array(splits), tuple(class_names))


def _folders(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def parquet_files(path: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """{split: files} of a parquet file, or of a folder of those; empty for anything else."""
    if path.is_file():
        return {"train": [path]} if path.suffix == ".parquet" else {}
    found: dict[str, list[pathlib.Path]] = {}
    for file in sorted(path.glob("*.parquet")):
        prefix = next((prefix for prefix in sorted(_SPLIT_NAMES, key=len, reverse=True) if file.name.startswith(prefix)), "")
        if not prefix:
            raise ValueError(f"{file} belongs to no split; expected its name to begin with train, valid or test")
        found.setdefault(_SPLIT_NAMES[prefix], []).append(file)
    if found and "train" not in found:
        raise ValueError(f"{path} has parquet files for {' and '.join(found)} but none whose name begins with train")
    return found


def of_parquet(name: str, files: dict[str, list[pathlib.Path]], column: str, label: str) -> Listing:
    """The images of parquet files: a column of encoded bytes, or of structs with a field `bytes`, and one of labels.

    Class names are taken from the labels if these are text, from the schema's metadata (`huggingface`, or `classes` with commas
    between) if there are some, and are numbers otherwise.

    Raises:
        ValueError: a file is broken or empty, the columns are not there or not clear, a label is missing, a class has no images.
    """
    names: list[str] = []
    encoded: list[Any] = []
    labels: list[Any] = []
    splits: list[str] = []
    class_names: tuple[str, ...] = ()
    for split in SPLITS:
        for file in files.get(split, []):
            images, values, class_names = _read(file, column, label)
            names += [f"row {row} of {file.name}" for row in range(len(images))]
            encoded += images
            labels += values
            splits += [split] * len(images)
    if not names:
        raise ValueError(f"{name} has no rows; expected a row for each image")
    if len({isinstance(label, str) for label in labels}) > 1:
        raise ValueError(f"{name}: labels are numbers in some files and text in others; expected one kind")
    if isinstance(labels[0], str):
        class_names = tuple(sorted(set(labels)))
        targets = np.searchsorted(np.array(class_names), labels)
    else:
        targets = np.array(labels)
        class_names = class_names or tuple(map(str, range(max(int(targets.max()) + 1, 0))))
    if targets.min() < 0 or targets.max() >= len(class_names):
        row = int(np.argmax((targets < 0) | (targets >= len(class_names))))
        raise ValueError(f"{name}: the label of {names[row]} is {targets[row]}; expected 0 to {len(class_names) - 1}")
    counts = np.bincount(targets[np.array(splits) == "train"], minlength=len(class_names))
    if not counts.all():
        raise ValueError(
            f"{name}: the class {class_names[int(counts.argmin())]!r} has no images to train on; expected some of each class"
        )

    def read(i: int) -> bytes:
        if encoded[i] is None:
            raise ValueError("there are no bytes")
        return encoded[i]

    return Listing(names, read, targets.astype(np.int32), np.array(splits), class_names)


def _read(file: pathlib.Path, column: str, label: str) -> tuple[list[Any], list[Any], tuple[str, ...]]:
    """(encoded images as views of Arrow's memory, labels, class names if the metadata has them) of one parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(file)
        image, target = _columns(file, schema, column, label)
        table = pyarrow.parquet.read_table(file, columns=[image, target])
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not readable as a parquet file: {str(error).splitlines()[0]}") from None
    labels = table.column(target).to_pylist()
    if None in labels:
        raise ValueError(f"row {labels.index(None)} of {file.name} has no label in {target!r}; drop it or fill it")
    chunks = table.column(image).chunks
    if pyarrow.types.is_struct(schema.field(image).type):
        chunks = [chunk.flatten()[chunk.type.get_field_index("bytes")] for chunk in chunks]
    images = [value.as_buffer() for chunk in chunks for value in chunk]  # None where there is none
    return images, labels, _class_names(schema, target)


def _columns(file: pathlib.Path, schema: Any, column: str, label: str) -> tuple[str, str]:
    """The names of the columns of images and of labels, given or the only ones that can be meant."""
    from pyarrow import types

    def binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    def image(kind: Any) -> bool:
        return binary(kind) or (types.is_struct(kind) and any(part.name == "bytes" and binary(part.type) for part in kind))

    def target(kind: Any) -> bool:
        return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)

    def choose(wanted: str, what: str, field: str, fits: Callable[[Any], bool], usual: tuple[str, ...]) -> str:
        fitting = [entry.name for entry in schema if fits(entry.type)]
        likely = [wanted] if wanted else [name for name in fitting if name in usual] or fitting
        if len(likely) != 1 or likely[0] not in fitting:
            there = ", ".join(f"{entry.name} ({entry.type})" for entry in schema)
            problem = f"{wanted!r} is no column of {what}" if wanted else f"{len(likely)} columns could be the {what}"
            raise ValueError(f"{file}: {problem}; there are {there}; set data.{field}")
        return likely[0]

    return (
        choose(column, "encoded images", "column", image, ("image", "img")),
        choose(label, "labels (integers or text)", "label", target, _LABELS),
    )


def _class_names(schema: Any, target: str) -> tuple[str, ...]:
    metadata = schema.metadata or {}
    if b"huggingface" in metadata:
        try:
            names = json.loads(metadata[b"huggingface"])["info"]["features"][target]["names"]
            return tuple(map(str, names))
        except (ValueError, KeyError, TypeError):
            pass  # no names there, or of another form than we know
    return tuple(metadata[b"classes"].decode().split(",")) if b"classes" in metadata else ()
