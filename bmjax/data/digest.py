"""Fingerprints of arrays."""

from __future__ import annotations

import hashlib

import numpy as np

FULL = 1 << 30  # bytes of an array on a disk up to which all of it is read to be hashed
BLOCK = 1 << 20


def sha256(*parts: np.ndarray | str, full: int | None = None) -> str:
    """sha256 (hex) of texts, and of arrays with their types and shapes.

    A flat array larger than `full` bytes, if that is given, counts with 64 evenly spaced blocks of 1 MiB, its first and its
    last bytes among them: another length, another beginning or end is seen, a change between the blocks is not.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
            continue
        digest.update(f"{part.dtype.str}{part.shape}".encode())
        for block in [part] if full is None or part.nbytes <= full else sampled(part):
            digest.update(np.ascontiguousarray(block))  # type: ignore[arg-type]  # any buffer
    return digest.hexdigest()


def sampled(array: np.ndarray, blocks: int = 64) -> list[np.ndarray]:
    """Evenly spaced blocks of BLOCK bytes of a flat array, its beginning and its end among them."""
    size = max(1, BLOCK // array.itemsize)
    starts = np.linspace(0, max(0, len(array) - size), blocks).astype(np.int64)
    return [array[start : start + size] for start in starts]
