"""Handwritten digits that ship with scikit-learn: 1797 images of 8x8, values 0 to 16 (UCI ML hand-written digits, test part)."""

from __future__ import annotations

import numpy as np

from bmjax.data.dataset import Dataset, build, stratified
from bmjax.data.pipeline import Data


def load(argument: str, data: Data) -> Dataset:
    """The digits with inputs [n, 8, 8, 1] in [0, 1]; 40% test, 10% validation unless set, always the same rows.

    Raises:
        ValueError: an argument is given.
    """
    if argument:
        raise ValueError(f"the data source digits takes no argument; {argument!r} was given")
    from sklearn.datasets import load_digits

    digits = load_digits()
    targets = digits.target.astype(np.int32)
    images = digits.images[..., None].astype(np.float32)
    names = [str(label) for label in range(10)]
    rows = stratified(targets, **data.fractions())
    zero, sixteen = np.array(0, np.float32), np.array(16, np.float32)
    return build("digits", images, targets, rows, class_names=names, offset=zero, scale=sixteen, limit=data.limit)
