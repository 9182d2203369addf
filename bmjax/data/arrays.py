"""Examples from a NumPy .npz file.

The file holds `inputs` [n, ...] and `targets` int [n]; if wanted also `class_names` [classes] and the splits: either `split` [n]
with "train", "valid" or "test" for each row, or three arrays of rows `train`, `valid` and `test`.
"""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Mapping

import numpy as np

from bmjax.data.dataset import SPLITS, Dataset, build, stratified
from bmjax.data.pipeline import Data


def load(argument: str, data: Data) -> Dataset:
    """The dataset of an .npz file; without splits of its own 40% are test and 10% validation unless set, always the same rows.

    Raises:
        ValueError: the file is missing, is no .npz or lacks an array, or its contents do not pass `dataset.build`.
    """
    name = f"arrays:{argument}"
    arrays = _read(argument)
    for key in ("inputs", "targets"):
        if key not in arrays:
            raise ValueError(f"{name}: there is no array {key!r}; there are {', '.join(arrays) or 'none'}")
    targets = arrays["targets"]
    if "class_names" in arrays:
        class_names = [str(label) for label in arrays["class_names"]]
    else:
        whole = targets.dtype.kind in "iu" and targets.size > 0
        class_names = [str(label) for label in range(int(targets.max()) + 1 if whole else 2)]
    if targets.ndim != 1:
        hint = "; of one-hot rows take argmax(axis=1)" if targets.ndim == 2 else ""
        raise ValueError(
            f"{name}: targets have shape {list(targets.shape)}; expected [{len(arrays['inputs'])}], a class each{hint}"
        )
    rows = _rows(name, arrays, data)
    return build(name, arrays["inputs"], targets, rows, class_names=class_names, limit=data.limit, vocabulary=data.vocabulary)


def _read(argument: str) -> dict[str, np.ndarray]:
    path = pathlib.Path(argument).expanduser()
    if not argument or not path.is_file():
        raise ValueError(f"there is no data file {argument!r}; expected arrays:<file.npz>")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        why = "" if "pickle" in str(error) else f": {error}"  # the advice to load pickles is of no use here
        raise ValueError(f"{argument} is not readable as an .npz file of plain arrays{why}") from None


def _rows(name: str, arrays: Mapping[str, np.ndarray], data: Data) -> dict[str, np.ndarray]:
    if "split" in arrays:
        split = arrays["split"].astype(str)
        if split.shape != arrays["targets"].shape or not set(split) <= set(SPLITS):
            raise ValueError(
                f"{name}: expected one of {', '.join(SPLITS)} in `split` for each row; found {', '.join(sorted(set(split.flat)))}"
            )
        return {key: np.flatnonzero(split == key) for key in SPLITS}
    given = [key for key in SPLITS if key in arrays]
    if not given:
        return stratified(arrays["targets"], **data.fractions())
    if len(given) < len(SPLITS):
        raise ValueError(f"{name}: there is {' and '.join(given)} only; expected all of train, valid, test, or none of them")
    return {key: arrays[key] for key in SPLITS}
