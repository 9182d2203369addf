"""A trace of some steps of a run, for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

import contextlib
import pathlib
import re
from types import TracebackType
from typing import Any

import jax
from absl import logging

_IDLE = contextlib.nullcontext()


def parse(text: str) -> tuple[int, int] | None:
    """(from, to) of "from:to"; None of "".

    Raises:
        ValueError: it is neither.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    begin, end = map(int, found.groups()) if found else (0, 0)
    if begin >= end:
        raise ValueError(f"profile is {text!r}; expected from:to with from below to, as in 100:110, or nothing")
    return begin, end


def check_window(text: str, steps: int) -> None:
    """Raises ValueError unless `text` is "" or names steps of a run of `steps` updates."""
    wanted = parse(text)
    if wanted is not None and wanted[1] > steps:
        raise ValueError(f"profile is {text!r}, but the run has {steps} steps; expected from:to with to at most {steps}")


class Profile:
    """Writes what host and devices do between two steps of a run; a context manager around its loop.

    "100:110" records the ten updates that follow the first hundred. A run that goes on beyond `from` records what is left of
    them, and one that ends earlier records until it ends, however it ends.

    Args:
        text: "from:to", or "" for nothing.
        directory: where the trace goes, as TensorBoard's profiler reads it.
    """

    def __init__(self, text: str, directory: pathlib.Path | str) -> None:
        self._begin, self._end = parse(text) or (0, 0)
        self._directory = str(directory)
        self._active = False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._write()

    def step(self, done: int) -> contextlib.AbstractContextManager[Any]:
        """Goes around the dispatch of the update that follows `done` others; starts the trace where it is due."""
        if not self._begin <= done < self._end:
            return _IDLE
        if not self._active:
            jax.profiler.start_trace(self._directory)
            self._active = True
        return jax.profiler.StepTraceAnnotation("train", step_num=done)

    def due(self, done: int, last: bool) -> bool:
        """Whether the trace ends now that `done` updates are dispatched."""
        return self._active and (last or done >= self._end)

    def end(self, results: Any) -> None:
        """Waits for the results of the last step, and writes the trace."""
        jax.block_until_ready(results)
        self._write()

    def _write(self) -> None:
        if self._active:
            self._active = False
            jax.profiler.stop_trace()
            logging.info("wrote a profile to %s", self._directory)
