"""Data sources by name. A new source is one function in one file, and one entry here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from bmjax import config
from bmjax.data import arrays, digits, images, text, tokens
from bmjax.data.dataset import Dataset
from bmjax.data.pipeline import Data


class Source(NamedTuple):
    """One kind of data.

    Attributes:
        load: (what follows the colon, the settings) -> dataset.
        uses: the fields of `Data` that it reads, beside source, batch and threads.
    """

    load: Callable[[str, Data], Dataset]
    uses: tuple[str, ...]


_CUT = ("test", "valid", "limit")
_TOKENS = (*_CUT, "length", "vocabulary", "packing")
_TEXT = (*_TOKENS, "tokenizer", "end")
SOURCES: dict[str, Source] = {
    "digits": Source(digits.load, _CUT),
    "arrays": Source(arrays.load, (*_CUT, "vocabulary")),
    "images": Source(images.load, (*_CUT, "size", "on_error", "column", "label")),
    "text": Source(text.load, _TEXT),
    "jsonl": Source(text.load_jsonl, (*_TEXT, "column")),
    "parquet": Source(text.load_parquet, (*_TEXT, "column")),
    "tokens": Source(tokens.load, _TOKENS),
}


def load(data: Data | str | Callable[[], Dataset]) -> Dataset:
    """The dataset that settings name; a text or a function alone is the `source` of otherwise default settings.

    A source is "name:argument" with a name of `SOURCES`, or a function without arguments that returns a Dataset (`build` and
    `sequences` make them); what that function raises passes through.

    Raises:
        ValueError: the source is unknown, its data do not pass its checks, or a field is set that it has no use for.
    """
    data = data if isinstance(data, Data) else Data(source=data)
    config.validate(data, "data")
    if not isinstance(data.source, str):
        _check_unused(data, "a function", ())
        dataset = data.source()
        if not isinstance(dataset, Dataset):
            raise ValueError(f"the data source function returned {type(dataset).__name__}; expected a bmjax.data.Dataset")
        return dataset
    name, _, argument = data.source.partition(":")
    if name not in SOURCES:
        known = ", ".join(SOURCES)
        raise ValueError(f"there is no data source {name!r}; the nearest is {config.nearest(name, SOURCES)!r} of {known}")
    source = SOURCES[name]
    _check_unused(data, name, source.uses)
    return source.load(argument, data)


def _check_unused(data: Data, name: str, uses: tuple[str, ...]) -> None:
    plain = Data()
    for entry in dataclasses.fields(Data):
        value, default = getattr(data, entry.name), getattr(plain, entry.name)
        if entry.name not in ("source", "batch", "threads", *uses) and value != default:
            raise ValueError(
                f"data.{entry.name} is {value!r}, but the data source {name} has no use for it; leave it at {default!r}"
            )
