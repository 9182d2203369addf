"""Data sources by name. A new source is one function in one file, and one entry here."""

from __future__ import annotations

from collections.abc import Callable

from bmjax.config import nearest
from bmjax.data import arrays, digits
from bmjax.data.dataset import Dataset

SOURCES: dict[str, Callable[[str], Dataset]] = {"digits": digits.load, "arrays": arrays.load}


def load(source: str) -> Dataset:
    """The dataset of "digits" or "arrays:<file.npz>"; what follows the colon is the source's own argument.

    Raises:
        ValueError: the source is unknown, or its data do not pass its checks.
    """
    name, _, argument = source.partition(":")
    if name not in SOURCES:
        raise ValueError(f"there is no data source {name!r}; the nearest is {nearest(name, SOURCES)!r} of {', '.join(SOURCES)}")
    return SOURCES[name](argument)
