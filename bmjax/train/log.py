"""Where a run's figures go: metrics.jsonl, TensorBoard, Weights & Biases, and a progress bar."""

from __future__ import annotations

import collections
import hashlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
from absl import logging

FILE = "metrics.jsonl"
EVENTS_EVERY = 10.0  # seconds between flushes of TensorBoard's file


class Log:
    """Writes scalars of a run; a context manager. Only the first of several processes writes.

    Args:
        directory: for metrics.jsonl and the folder tensorboard.
        tensorboard: write TensorBoard events too.
        wandb: project name for Weights & Biases; "" for none.
        progress: show how far the run is.

    Raises:
        ValueError: wandb is asked for and not installed.
    """

    def __init__(
        self, directory: pathlib.Path | str, *, tensorboard: bool = True, wandb: str = "", progress: bool = True
    ) -> None:
        first = jax.process_index() == 0
        self._directory = pathlib.Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._show = progress and first
        self._wandb = _wandb_run(wandb, self._directory) if wandb and first else None
        self._events = _Events(self._directory / "tensorboard") if tensorboard and first else None
        self._lines = (self._directory / FILE).open("a", encoding="utf-8") if first else None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def scalars(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Appends one line {"step", "prefix", name: value, ...} and flushes it; NaN and infinity are written as null.

        Args:
            step: updates done.
            values: floats by name.
            prefix: which part of the run they are of ("big", "prune 0.9").
        """
        if self._lines is None:
            return
        plain = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in plain.items()}
        self._lines.write(json.dumps({"step": step, "prefix": prefix, **finite}) + "\n")
        self._lines.flush()
        run = prefix.replace(" ", "_")  # TensorBoard takes no spaces
        tags = {f"{run}/{name}" if run else name: value for name, value in plain.items()}
        if self._events is not None:
            self._events(step, tags)
        if self._wandb is not None:  # its own step must never go back, ours starts anew with each prefix
            self._wandb.log({**tags, f"{prefix}/step" if prefix else "step": step})

    def resume(self, step: int, prefix: str = "") -> None:
        """Drops the lines of this prefix after a step, which a run that was cut off had written beyond its last checkpoint."""
        if self._lines is None:
            return
        path = self._directory / FILE
        self._lines.close()
        draft = path.with_suffix(".tmp")
        kept = [row for row in _rows(path) if row["prefix"] != prefix or row["step"] <= step]
        draft.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(draft, path)
        self._lines = path.open("a", encoding="utf-8")

    def progress(self, total: int, start: int = 0, title: str = "train") -> Progress:
        """A context manager; call it with each step. A bar on an interactive terminal, else a log line now and then."""
        return Progress(total, start, title, show=self._show)

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._lines is not None:
            self._lines.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


class Progress:
    """Shows step, loss, steps per second and time left. A call that has nothing to show costs a clock reading."""

    def __init__(self, total: int, start: int = 0, title: str = "train", *, show: bool = True) -> None:
        self._total, self._title, self._step = total, title, start
        self._loss: float | None = None
        self._bar = _rich_bar(title, total, start) if show and sys.stderr.isatty() else None
        self._every = 0.2 if self._bar is not None else 10.0
        self._recent = collections.deque([(time.monotonic(), start)], maxlen=20)  # (seconds, step) at each showing
        self._next = time.monotonic() + self._every if show else math.inf

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __call__(self, step: int, loss: float | None = None) -> None:
        """Says that `step` updates are done; `loss` is the newest one known."""
        self._step = step
        if loss is not None:
            self._loss = loss
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._every
            self._display(now)

    def _display(self, now: float) -> None:
        self._recent.append((now, self._step))
        (before, first), (now, last) = self._recent[0], self._recent[-1]
        rate = (last - first) / max(now - before, 1e-9)
        left = _clock((self._total - last) / rate) if rate > 0 else "?"
        loss = "-" if self._loss is None else f"{float(self._loss):.4g}"
        figures = f"loss {loss}, {rate:.3g} steps/s, {left} left"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=last, figures=figures, refresh=True)
        else:
            logging.info("%s: step %d of %d, %s", self._title, last, self._total, figures)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._next < math.inf and self._step != self._recent[-1][1]:
            self._display(time.monotonic())
        if self._bar is not None:
            self._bar.stop()


def read(directory: pathlib.Path | str) -> dict[str, list[dict[str, Any]]]:
    """{prefix: rows {"step", name: value or None} in the order written} of a directory's metrics.jsonl; {} if there is none."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(pathlib.Path(directory) / FILE):
        rows.setdefault(row.pop("prefix"), []).append(row)
    return rows


def _rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole: a killed process may have left half of one."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                logging.warning("%s: dropped a line that is cut off", path)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _rich_bar(title: str, total: int, start: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
    bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False)  # no thread beside the loop
    bar.add_task(title, total=total, completed=start, figures="")
    return bar


class _Events:
    """TensorBoard's event file, one event a line.

    tensorboardX's SummaryWriter hands each scalar through a process queue to a thread of its own: 94 us a scalar, at moments of
    that thread's choosing, where writing the whole line here takes 27.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"))
        self._flushed = time.monotonic()

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer.write_event(Event(step=step, wall_time=time.time(), summary=Summary(value=scalars)))
        if time.monotonic() - self._flushed > EVENTS_EVERY:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def _wandb_run(project: str, directory: pathlib.Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError(
            "wandb is asked for and not installed; install the extra bmjax[wandb] or leave the project empty"
        ) from None
    name = hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:16]  # the same run after a restart
    return wandb.init(project=project, dir=str(directory), id=name, resume="allow")
