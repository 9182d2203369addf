"""Reading what `teacher_shards` wrote: a teacher's packed outputs beside the examples of a split."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import threading
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from bmjax import manifest
from bmjax.data.dataset import Dataset, Split
from bmjax.data.digest import FULL
from bmjax.data.pipeline import Data
from bmjax.data.teacher_plan import PLAN, CachePlan, check_same, plan_cache, read_plan
from bmjax.data.teacher_record import BATCH_KEY, RecordLayout

_AGAIN = "run experiments.cache_teacher again, which goes on where it stopped"


class Records:
    """Records of all examples of a split as a lazy array int32 [examples, *item, words], for `Split.extra`.

    Shards are mapped when they are first read; those of a cache of more than `digest.FULL` bytes are verified then, all others
    were when the cache was opened.
    """

    dtype = np.dtype(np.int32)

    def __init__(self, folder: pathlib.Path, plan: CachePlan, offsets: list[int], unverified: Mapping[str, Any]) -> None:
        self.shape = (plan.examples, *plan.item, plan.layout.words)
        self._folder, self._plan, self._offsets, self._unverified = folder, plan, offsets, unverified
        self._mapped: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, rows: np.ndarray, axis: int = 0) -> np.ndarray:
        """The records of some rows, ints [B], read from the shards. Raises ValueError if a shard was altered."""
        if axis != 0:
            raise ValueError(f"records are taken along axis 0, not {axis}")
        out = np.empty((len(rows), *self.shape[1:]), np.int32)
        shards, places = np.divmod(rows, self._plan.rows)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self._shard(int(shard))[places[here]]
        return out

    def _shard(self, shard: int) -> np.ndarray:
        if (found := self._mapped.get(shard)) is not None:
            return found
        with self._lock:
            if shard not in self._mapped:
                name, (first, last) = self._plan.name(shard), self._plan.bounds(shard)
                if name in self._unverified:
                    _check(self._folder, name, self._unverified[name], content=True)
                shape = (last - first, *self.shape[1:])
                mapped = np.memmap(self._folder / name, np.dtype("<i4"), "r", self._offsets[shard], shape)
                self._mapped[shard] = mapped.view(np.ndarray)
            return self._mapped[shard]


@dataclasses.dataclass(frozen=True)
class TeacherCache:
    """A finished cache.

    Attributes:
        folder: where it is.
        plan: what it holds.
        records: of all examples.
    """

    folder: pathlib.Path
    plan: CachePlan
    records: Records

    @property
    def layout(self) -> RecordLayout:
        """How outputs are packed."""
        return self.plan.layout

    def check(
        self, dataset: Dataset, settings: Data, *, k: int = 0, teacher: tuple[str, str] | None = None, split: str = "train"
    ) -> None:
        """Raises ValueError, which names what differs, if this is no cache of a split.

        Args:
            dataset, settings: the data, and what they were loaded with.
            k: how many log-probabilities it must hold; 0 takes any number.
            teacher: (name, SHA-256) of the teacher that it must be of; None takes any.
            split: which one.
        """
        layout = dataclasses.replace(self.layout, vocabulary=dataset.classes, k=min(k or self.layout.k, dataset.classes))
        name, digest = teacher or (self.plan.teacher, self.plan.teacher_sha256)
        check_same(self.plan, plan_cache(name, digest, dataset, settings, layout, split), str(self.folder))

    def beside(self, split: Split) -> Split:
        """The split with the records in every batch, under `BATCH_KEY`; `check` says whether they are of it."""
        return dataclasses.replace(split, extra={**split.extra, BATCH_KEY: cast(Any, self.records)})


def open_cache(folder: str | os.PathLike[str]) -> TeacherCache:
    """A finished cache. Up to `digest.FULL` bytes all of it is verified now, and of more the shards as they are first read.

    Raises:
        ValueError: it is no cache or not finished, or a file (the first one is named) is missing or altered.
    """
    folder = pathlib.Path(folder).expanduser()
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give the folder of a cache")
    plan = read_plan(folder)
    if not (folder / manifest.NAME).is_file():
        there = sum((folder / plan.name(shard)).is_file() for shard in range(plan.shards))
        raise ValueError(f"the cache {folder} is not finished: {there} of {plan.shards} shards are there; {_AGAIN}")
    try:
        about, files = manifest.read(folder)
    except ValueError:
        raise ValueError(f"{folder / manifest.NAME} is damaged; {_AGAIN}") from None
    large = sum(entry["bytes"] for entry in files.values()) > FULL
    for name, expected in files.items():
        _check(folder, name, expected, content=not large or name == PLAN)
    try:
        offsets = [int(offset) for offset in about["offsets"]]
        same = about["plan"] == json.loads(json.dumps(plan.to_json())) and len(offsets) == plan.shards
    except (KeyError, TypeError, ValueError):
        same = False
    if not same:
        raise ValueError(f"{folder / manifest.NAME} is not of this cache's {PLAN}; {_AGAIN}")
    return TeacherCache(folder, plan, Records(folder, plan, offsets, files if large else {}))


def _check(folder: pathlib.Path, name: str, expected: dict[str, Any], content: bool) -> None:
    """Raises ValueError if a file of a cache is missing or altered."""
    try:
        manifest.check_file(folder, name, expected, content=content)
    except ValueError as error:
        raise ValueError(f"{error}; run experiments.cache_teacher again, which writes damaged shards anew") from None
