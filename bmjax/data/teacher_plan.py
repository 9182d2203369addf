"""What a cache of a teacher's outputs holds, and in what two of them differ."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bmjax.data.dataset import Dataset, Split
from bmjax.data.digest import sha256
from bmjax.data.pipeline import Data
from bmjax.data.teacher_record import RecordLayout

PLAN = "plan.json"
MAX_ROWS = 16384  # of a shard; Parquet writers begin a new page at 20,000


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """What a cache holds, and how it is cut into shards; equal plans and teachers give equal shards.

    Attributes:
        teacher, teacher_sha256: where the teacher was read from, and the hash of what it is.
        data, fingerprint: the data source, and the `Dataset`'s hash of inputs, targets and splits.
        tokenizer, tokenizer_sha256: "" and the hash of "" where there is none.
        split: "train", "valid" or "test".
        ids: hash of the examples' ids in their order.
        examples: in the split.
        item: shape of an example's targets: (), or (T,) for sequences of T tokens.
        layout: how the outputs on an item are packed.
        rows: examples in a shard.
        batch: examples that the teacher saw at once; another batch may round differently.
    """

    teacher: str
    teacher_sha256: str
    data: str
    fingerprint: str
    tokenizer: str
    tokenizer_sha256: str
    split: str
    ids: str
    examples: int
    item: tuple[int, ...]
    layout: RecordLayout
    rows: int
    batch: int

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.examples // self.rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of an example's records."""
        return 4 * self.layout.words * math.prod(self.item)

    def bounds(self, shard: int) -> tuple[int, int]:
        """The first row of a shard, and the one after its last."""
        return shard * self.rows, min((shard + 1) * self.rows, self.examples)

    def name(self, shard: int) -> str:
        """File name of a shard."""
        return f"{shard:05d}-of-{self.shards:05d}.parquet"

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def of_json(cls, plain: Mapping[str, Any]) -> CachePlan:
        """What `to_json` gave. Raises KeyError or TypeError on anything else."""
        inner = plain["layout"]
        layout = RecordLayout(**{**inner, "temperatures": tuple(inner["temperatures"])})
        return cls(**{**plain, "item": tuple(plain["item"]), "layout": layout})


def plan_cache(
    teacher: str,
    teacher_sha256: str,
    dataset: Dataset,
    settings: Data,
    layout: RecordLayout,
    split: str = "train",
    shard_mib: int = 64,
) -> CachePlan:
    """The plan of caching a teacher on a split of a dataset.

    Args:
        teacher, teacher_sha256: as for `CachePlan`.
        dataset, settings: the data, and what they were loaded with; the teacher sees `settings.batch` examples at once.
        layout: how outputs are packed.
        split: which one.
        shard_mib: about how many MiB a shard takes.

    Raises:
        ValueError: the layout is of another number of classes, or the batch is too large for a shard.
    """
    examples: Split = getattr(dataset, split)
    if layout.vocabulary != dataset.classes:
        raise ValueError(f"the cached outputs are of {layout.vocabulary} classes and {dataset.name} has {dataset.classes}")
    batch, item = settings.batch, examples.targets.shape[1:]
    if batch > MAX_ROWS:
        raise ValueError(f"the batch is {batch}; expected at most {MAX_ROWS} to cache a teacher")
    fit = (shard_mib << 20) // (4 * layout.words * math.prod(item))
    return CachePlan(
        teacher,
        teacher_sha256,
        dataset.name,
        dataset.fingerprint,
        settings.tokenizer,
        _file_hash(settings.tokenizer),
        split,
        sha256(np.ascontiguousarray(examples.id)),
        len(examples),
        item,
        layout,
        rows=max(1, min(fit, MAX_ROWS) // batch) * batch,
        batch=batch,
    )


def _file_hash(path: str) -> str:
    return hashlib.sha256(pathlib.Path(path).expanduser().read_bytes() if path else b"").hexdigest()


def check_same(there: CachePlan, wanted: CachePlan, where: str, *, writing: bool = False) -> None:
    """Raises ValueError that names the first thing in which a cache differs from what is wanted.

    Args:
        there: the cache's plan.
        wanted: what it should be.
        where: the cache's folder.
        writing: also compare how it is cut; a reader does not mind.
    """
    short = lambda digest: digest[:12]
    rows: list[tuple[str, Any, Any, Callable[[CachePlan], str]]] = [
        ("teacher", there.teacher_sha256, wanted.teacher_sha256, lambda p: f"{p.teacher} ({short(p.teacher_sha256)})"),
        (
            "tokenizer",
            there.tokenizer_sha256,
            wanted.tokenizer_sha256,
            lambda p: f"{p.tokenizer or 'none'} ({short(p.tokenizer_sha256)})",
        ),
        ("split", there.split, wanted.split, lambda p: p.split),
        ("number of classes", there.layout.vocabulary, wanted.layout.vocabulary, lambda p: str(p.layout.vocabulary)),
        ("shape of an example's targets", there.item, wanted.item, lambda p: str([*p.item])),
        ("number of examples", there.examples, wanted.examples, lambda p: f"{p.examples:,}"),
        ("data", there.fingerprint, wanted.fingerprint, lambda p: f"{p.data} ({short(p.fingerprint)})"),
        ("order of the examples", there.ids, wanted.ids, lambda p: short(p.ids)),
        ("k", there.layout.k, wanted.layout.k, lambda p: str(p.layout.k)),
        ("type of the values", there.layout.values, wanted.layout.values, lambda p: p.layout.values),
        ("temperatures", there.layout.temperatures, wanted.layout.temperatures, lambda p: str([*p.layout.temperatures])),
    ]
    if writing:
        rows.append(("batch", there.batch, wanted.batch, lambda p: str(p.batch)))
        rows.append(("shard size", there.rows, wanted.rows, lambda p: f"{p.rows} examples"))
    for what, a, b, said in rows:
        if a != b:
            raise ValueError(
                f"the {what} of the cache {where} differs: it is {said(there)} there and {said(wanted)} here; "
                + (
                    "cache into another folder"
                    if writing
                    else "give the cache of these, or make one with experiments.cache_teacher"
                )
            )


def read_plan(folder: pathlib.Path) -> CachePlan:
    """The plan of a cache, finished or not. Raises ValueError if there is none, or it is damaged."""
    try:
        return CachePlan.of_json(json.loads((folder / PLAN).read_text()))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no cache of a teacher: it has no {PLAN}; experiments.cache_teacher makes one") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / PLAN} is damaged; remove the folder and cache the teacher again") from None
