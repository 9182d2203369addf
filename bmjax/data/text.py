"""Text as token ids: bytes, or those of a tokenizers file."""

from __future__ import annotations

import json
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import Any

import numpy as np

from bmjax.data import spelling
from bmjax.data.dataset import Dataset
from bmjax.data.packing import Documents, sequences
from bmjax.data.pipeline import Data

_UNSPELT = (
    "bits per byte are left out: the tokens that {tokenizer} makes of {where} do not spell its text exactly (it normalises, "
    "drops white space, or has unknown tokens)"
)
_FOREIGN = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def load(argument: str, data: Data) -> Dataset:
    """The sequences of a text file, or of all files below a folder but hidden ones, a document each in the order of their names.

    Without an argument the text is the source of the running Python's own library, tests left out.

    Raises:
        ValueError: there is nothing to read, a file is no UTF-8 where a tokenizer needs that, or as `packing.sequences`.
    """
    if argument:
        files = _files(pathlib.Path(argument).expanduser())
    else:
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        files = [path for path in sorted(root.rglob("*.py")) if not _FOREIGN & set(path.relative_to(root).parts)]
    if not files:
        raise ValueError(f"there is no text at {argument or 'the library of this Python'!r}; expected text:<file or folder>")
    return _sequences(f"text:{argument}", ((str(path), path.read_bytes()) for path in files), data)


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.is_dir():
        return [path] if path.is_file() else []
    below = (file for file in sorted(path.rglob("*")) if file.is_file())
    return [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def load_jsonl(argument: str, data: Data) -> Dataset:
    """The sequences of the field `data.column` ("text" if not set) of a file of one JSON object a line, each a document.

    Raises:
        ValueError: the file is missing, a line is no JSON object or has no text there, or as `packing.sequences`.
    """
    path, column = pathlib.Path(argument).expanduser(), data.column or "text"
    if not argument or not path.is_file():
        raise ValueError(f"there is no data file {argument!r}; expected jsonl:<file>")

    def documents() -> Iterator[tuple[str, bytes]]:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"line {number} of {argument}"
                try:
                    found = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{where} is not readable as JSON: {error}") from None
                if not isinstance(found, dict) or not isinstance(found.get(column), str):
                    keys = ", ".join(found) if isinstance(found, dict) else type(found).__name__
                    raise ValueError(f"{where} has no text in {column!r}; it has {keys}; set data.column")
                try:
                    yield where, found[column].encode()
                except UnicodeEncodeError:
                    raise ValueError(f"{where} has half of a surrogate pair in {column!r}, which is no text; mend it") from None

    return _sequences(f"jsonl:{argument}", documents(), data)


def load_parquet(argument: str, data: Data) -> Dataset:
    """The sequences of the column `data.column` ("text" if not set) of a parquet file, a document each row.

    Raises:
        ValueError: the file is missing or broken, the column is not there or holds no text, or as `packing.sequences`.
    """
    path, column = pathlib.Path(argument).expanduser(), data.column or "text"
    if not argument or not path.is_file():
        raise ValueError(f"there is no data file {argument!r}; expected parquet:<file>")
    import pyarrow
    import pyarrow.parquet

    def documents() -> Iterator[tuple[str, bytes]]:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            kind = schema.field(column).type if column in schema.names else None
            if kind is None or not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                there = ", ".join(f"{entry.name} ({entry.type})" for entry in schema)
                raise ValueError(f"{argument} has no column of text {column!r}; it has {there}; set data.column")
            for batch in file.iter_batches(columns=[column]):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        raise ValueError(f"row {number} of {argument} has no text in {column!r}; drop it or fill it")
                    yield f"row {number} of {argument}", text.encode()
                    number += 1

    try:
        return _sequences(f"parquet:{argument}", documents(), data)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{argument} is not readable as a parquet file: {str(error).splitlines()[0]}") from None


def _sequences(name: str, documents: Iterator[tuple[str, bytes]], data: Data) -> Dataset:
    """The dataset of documents given as (what an error calls it, UTF-8)."""
    sizes: list[np.ndarray] | int | None = 1
    note = ""
    if data.tokenizer:
        ids, sizes, found, note = _tokenized(documents, data)
    else:
        ids, found = [np.frombuffer(content, np.uint8) for _, content in documents], 256
    vocabulary = data.vocabulary or max(found, data.end + 1)
    if vocabulary < found:
        what = f"the tokenizer {data.tokenizer} has {found} ids" if data.tokenizer else f"bytes have {found} values"
        raise ValueError(f"{name}: {what}, and data.vocabulary is {vocabulary}; set it to 0 or to at least {found}")
    if data.end >= vocabulary:
        raise ValueError(
            f"{name}: data.end is {data.end}; expected an id of the vocabulary, 0 to {vocabulary - 1}, or -1 for none"
        )
    kind = np.min_scalar_type(vocabulary - 1)
    if isinstance(sizes, list):
        sizes = [document for document in sizes if len(document)]
    ids = [document.astype(kind, copy=False) for document in ids if len(document)]
    if not ids:
        raise ValueError(f"{name}: there is no text in it; expected at least one document that is not empty")
    if data.end >= 0:  # it must be predicted like any other, and stands for no text
        sizes = [np.ones(len(document), np.uint8) for document in ids] if sizes == 1 else sizes
        sizes = [np.append(document, document.dtype.type(0)) for document in sizes] if isinstance(sizes, list) else sizes
        ids = [np.append(document, kind.type(data.end)) for document in ids]
    return sequences(name, Documents.of(ids, sizes), data, vocabulary, note)


def _tokenized(documents: Iterator[tuple[str, bytes]], data: Data) -> tuple[list[np.ndarray], list[np.ndarray] | None, int, str]:
    """Ids of each document, without special tokens; the bytes each stands for; the number of ids; why those bytes are None."""
    tokenizer = _tokenizer(data.tokenizer)
    texts, places = [], []
    for where, content in documents:
        places.append(where)
        try:
            texts.append(content.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is no UTF-8 text, which a tokenizer needs: {error}") from None
    spelt = spelling.spellings(tokenizer)
    lengths = np.array([len(content) for content in spelt])
    lengths = lengths.astype(np.min_scalar_type(lengths.max(initial=0)))
    ids: list[np.ndarray] = []
    sizes: list[np.ndarray] | None = []
    note = ""
    for first in range(0, len(texts), 256):
        batch = tokenizer.encode_batch_fast(texts[first : first + 256], add_special_tokens=False)
        for place, encoded in enumerate(batch, first):
            ids.append(np.array(encoded.ids, np.uint32))
            found = None if sizes is None else spelling.sizes(spelt, lengths, encoded.ids, texts[place].encode())
            if sizes is not None and found is not None:
                sizes.append(found)
            elif sizes is not None:
                sizes, note = None, _UNSPELT.format(tokenizer=data.tokenizer, where=places[place])
    return ids, sizes, len(spelt), note


def _tokenizer(path: str) -> Any:
    if not pathlib.Path(path).expanduser().is_file():
        raise ValueError(
            f"there is no tokenizer file {path!r}; expected data.tokenizer to be a JSON file of the package tokenizers"
        )
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "data.tokenizer needs the package tokenizers, which is not installed: pip install 'bmjax[text]'"
        ) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(pathlib.Path(path).expanduser()))
    except Exception as error:  # the package raises plain Exceptions
        raise ValueError(f"{path} is not readable as a tokenizers JSON file: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
