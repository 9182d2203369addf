"""Encoded images to one uint8 array, by threads (Pillow's decoders let go of the interpreter lock)."""

from __future__ import annotations

import concurrent.futures
import io
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_BYTES = 8 << 30  # of decoded images in memory


class _Head(NamedTuple):
    """What an image's header says; `fault` says why there is none."""

    height: int = 0
    width: int = 0
    grey: bool = True
    fault: str = ""


def decode(name: str, names: Sequence[str], read: Callable[[int], bytes], size: int) -> tuple[np.ndarray, dict[int, str]]:
    """All images in one array.

    Headers are read first, so that shapes and memory are checked before anything is decoded.

    Args:
        name: of the source, for messages.
        names: what errors call each image.
        read: the encoded bytes of image i; called from threads.
        size: height and width that all are resized to (bilinear, not cropped); 0 keeps theirs.

    Returns:
        (uint8 [n, H, W, C], {i: why} of the images that cannot be read, whose pixels are undefined).

    Raises:
        ValueError: shapes differ and `size` is 0, or the array would be larger than MAX_BYTES.
    """
    heads = _threaded(lambda i: _head(read, i), len(names))
    failed = {i: head.fault for i, head in enumerate(heads) if head.fault}
    good = [i for i in range(len(names)) if i not in failed]
    if not good:
        return np.empty((len(names), 1, 1, 1), np.uint8), failed
    shapes = {(heads[i].height, heads[i].width): i for i in reversed(good)}
    if not size and len(shapes) > 1:
        (one, first), *_, (other, second) = sorted(shapes.items(), key=lambda item: item[1])
        raise ValueError(
            f"{name}: images have {len(shapes)} shapes: {names[first]} is {one[0]}x{one[1]} and {names[second]} is "
            f"{other[0]}x{other[1]}; set data.size to resize all of them"
        )
    height, width = (size, size) if size else next(iter(shapes))
    grey = all(heads[i].grey for i in good)
    shape = (len(names), height, width, 1 if grey else 3)
    needed = int(np.prod(shape, dtype=np.float64))
    if needed > MAX_BYTES:
        raise ValueError(
            f"{name}: {shape[0]} images of {height}x{width}x{shape[3]} take {needed / 1e9:.1f} GB, and at most "
            f"{MAX_BYTES / 1e9:.1f} GB are kept in memory; set data.size or data.limit lower"
        )
    pixels = np.empty(shape, np.uint8)
    faults = _threaded(lambda i: _fill(pixels[i], read, i) if i not in failed else "", len(names))
    return pixels, failed | {i: fault for i, fault in enumerate(faults) if fault}


def _threaded(function: Callable[[int], Any], count: int) -> list[Any]:
    """`function` of 0 to count - 1, in order; a task is 64 of them: handing over one costs more than decoding a small image."""
    with concurrent.futures.ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
        tasks = pool.map(lambda first: [function(i) for i in range(first, min(first + 64, count))], range(0, count, 64))
        return [item for task in tasks for item in task]


def _head(read: Callable[[int], bytes], i: int) -> _Head:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read(i))) as image:
            if image.mode.startswith(("I", "F")):
                return _Head(fault=f"its pixels are of mode {image.mode}, not of 8 bits")
            return _Head(image.height, image.width, image.mode in ("1", "L", "LA", "La"))
    except Exception as error:  # on broken bytes decoders raise almost anything
        return _Head(fault=_words(error))


def _fill(pixels: np.ndarray, read: Callable[[int], bytes], i: int) -> str:
    """Decodes image i into uint8 [H, W, C]; returns "" or why not."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read(i))) as image:
            plain = image.convert("L" if pixels.shape[-1] == 1 else "RGB")
            wanted = (pixels.shape[1], pixels.shape[0])
            plain = plain if plain.size == wanted else plain.resize(wanted, Image.Resampling.BILINEAR)
            pixels[:] = np.asarray(plain).reshape(pixels.shape)
        return ""
    except Exception as error:  # as above
        return _words(error)


def _words(error: Exception) -> str:
    # Pillow names the object in memory that it could not read, which says nothing.
    text = str(error).partition("<_io.BytesIO")[0].rstrip() or type(error).__name__
    return "not an image, or broken" if "cannot identify image" in text else text.splitlines()[0]
