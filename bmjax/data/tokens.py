"""Token ids from a NumPy .npy file, which stays on the disk."""

from __future__ import annotations

import pathlib

import numpy as np

from bmjax.data.dataset import Dataset
from bmjax.data.packing import Documents, blocks, sequences
from bmjax.data.pipeline import Data


def load(argument: str, data: Data) -> Dataset:
    """The sequences of a flat array of ids, memory-mapped: the first part trains, the last two are held out.

    Without `data.vocabulary` all ids are read once to find the largest. A file of more than `digest.FULL` bytes is not read whole
    otherwise: its fingerprint is that of 64 blocks and its size, and ids outside the vocabulary are found in those and in each
    batch.

    Ids of uint8 with a vocabulary of 256 are taken for the bytes of a text.

    Raises:
        ValueError: the file is missing, is no .npy, is not one-dimensional, empty or no integers, or as `packing.sequences`.
    """
    name, path = f"tokens:{argument}", pathlib.Path(argument).expanduser()
    if not argument or not path.is_file():
        raise ValueError(f"there is no data file {argument!r}; expected tokens:<file.npy>")
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{argument} is not readable as an .npy file of plain numbers: {error}") from None
    if not isinstance(ids, np.ndarray):  # an .npz archive
        ids.close()
        raise ValueError(f"{argument} holds several arrays; expected an .npy file with one")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
        raise ValueError(f"{name}: found {ids.dtype} {list(ids.shape)}; expected integers [tokens], one after another")
    if data.packing != "concat":
        raise ValueError(f"{name}: a file of ids has no documents to pack; set data.packing to concat")
    stream = ids.view(np.ndarray)
    vocabulary = data.vocabulary or max(int(block.max()) for block in blocks(stream)) + 1
    is_bytes = stream.dtype == np.uint8 and vocabulary == 256
    note = "" if is_bytes else "bits per byte are left out: a file of ids does not say how many bytes of text each stands for"
    return sequences(name, Documents(stream, np.array([len(stream)]), 1 if is_bytes else None), data, vocabulary, note)
