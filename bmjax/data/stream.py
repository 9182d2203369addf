"""Batches in order, prepared by threads while the device works."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Generator
from typing import Any


def stream(batches: Any, start: int, stop: int, threads: int = 0) -> Generator[Any, None, None]:
    """`batches[start]` to `batches[stop - 1]`, in order.

    With threads, twice as many batches as threads are prepared ahead. Without, each is prepared when it is asked for, which is
    faster for batches that are only gathered: handing one over costs about 50 us. An exception is raised where its batch would
    have come. Closing the iterator, or dropping it, ends the threads.

    Args:
        batches: anything with `[step]` that may be called from several threads.
        start, stop: the first step, and the one after the last.
        threads: how many prepare batches.
    """
    if threads == 0:
        yield from (batches[step] for step in range(start, stop))
        return
    pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="batches")
    try:
        waiting: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
        for step in range(start, stop):
            waiting.append(pool.submit(batches.__getitem__, step))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
