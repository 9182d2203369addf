"""Images with their classes, from folders or parquet files, decoded once and kept as bytes in memory.

`images:<folder>` holds a folder for each class, or train, valid and test (val and validation are the same) with those below;
or parquet files whose names begin so. `images:<file.parquet>` is one such file. Splits that are missing are cut from the
training examples, each class in proportion, always the same rows.
"""

from __future__ import annotations

import pathlib

import numpy as np
from absl import logging

from bmjax.data import listing
from bmjax.data.dataset import SPLITS, Dataset, build, limited, stratified
from bmjax.data.decode import decode
from bmjax.data.pipeline import Data


def load(argument: str, data: Data) -> Dataset:
    """The dataset of uint8 images [H, W, C], C = 1 where all are grey and 3 otherwise, normalised batch by batch.

    Raises:
        ValueError: the path is missing or holds no classes, a class has no images, a column is not there, images cannot be read
            (and `data.on_error` is "raise"), differ in shape (and `data.size` is 0) or would take more than `decode.MAX_BYTES`.
    """
    name, path = f"images:{argument}", pathlib.Path(argument).expanduser()
    if not argument:
        raise ValueError("data.source is images: of no path; give --config.data.source=images:<file.parquet or folder>")
    if not path.exists():
        raise ValueError(f"there is no folder or file {argument!r}; expected images:<folder> or images:<file.parquet>")
    files = listing.parquet_files(path)
    found = listing.of_parquet(name, files, data.column, data.label) if files else listing.of_folder(name, path)
    rows = limited(_rows(found, data), found.targets, data.limit)
    order = np.concatenate([rows[key] for key in SPLITS])  # the splits follow one another, so that each is a view
    pixels, failed = decode(name, [found.names[i] for i in order], lambda i: found.read(order[i]), data.size)
    kept = np.ones(len(order), bool)
    if failed:
        first = min(failed)
        report = f"{len(failed)} of {len(order)} images cannot be read; the first is {found.names[order[first]]}: {failed[first]}"
        if data.on_error == "raise" or len(failed) == len(order):
            raise ValueError(f"{name}: {report}; mend or remove them, or set data.on_error to skip")
        logging.warning("%s: %s; they are skipped", name, report)
        kept[list(failed)] = False
        pixels = pixels[kept]
        left = np.bincount(found.targets[order[kept]], minlength=len(found.class_names))
        if not left.all():
            empty = found.class_names[int(left.argmin())]
            raise ValueError(f"{name}: no image of the class {empty!r} can be read; mend them, or take the class away")
    places, last = {}, 0
    for key, part in zip(SPLITS, np.split(kept, np.cumsum([len(rows[key]) for key in SPLITS])[:-1])):
        places[key] = np.arange(last, last + part.sum())
        last += int(part.sum())
    return build(name, pixels, found.targets[order[kept]], places, class_names=found.class_names, ids=order[kept])


def _rows(found: listing.Listing, data: Data) -> dict[str, np.ndarray]:
    """Rows of each split: those given, and of the training examples what is missing."""
    rows = {key: np.flatnonzero(found.splits == key) for key in SPLITS}
    wanted = {key: fraction if not rows[key].size else 0.0 for key, fraction in data.fractions().items()}
    cut = stratified(found.targets[rows["train"]], **wanted)
    return {key: rows["train"][cut[key]] if key == "train" or wanted[key] else rows[key] for key in SPLITS}
