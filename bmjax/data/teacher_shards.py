"""A teacher's packed outputs on a split, on a disk: Parquet shards of a fixed plan, written in any order by any processes.

A cache is a folder. `plan.json` says what is cached: of which teacher, on which data, cut how; it is written first. Shard i holds
the examples from i * rows on, whoever writes it, and appears whole or not at all; so a command that was killed goes on where it
stopped, and one process writes what several would. `manifest.json` comes last and lists every file's SHA-256.

A shard is a Parquet file of the columns `id` (int32) and `record` (fixed-size binary: the records of one example, see
`teacher_record`), not compressed and in one page. So any Parquet reader reads it, and here it is memory-mapped: an example is a
slice of the file.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bmjax import manifest
from bmjax.data.digest import sha256
from bmjax.data.teacher_plan import PLAN, CachePlan, check_same, read_plan


def write(
    folder: str | os.PathLike[str],
    plan: CachePlan,
    ids: np.ndarray,
    records: Callable[[int, int], Iterator[np.ndarray]],
    index: int = 0,
    count: int = 1,
) -> bool:
    """Writes, or goes on writing, the shards that process `index` of `count` has: each count-th from `index` on.

    Args:
        folder: made where it does not exist.
        plan: what is written.
        ids: int32 [examples], the split's.
        records: (first, last) -> int32 arrays [rows, *item, words] that make up the rows from first to before last.
        index, count: of the processes; who writes a shard changes nothing in it.

    Returns:
        Whether the cache is finished: the process that finds all shards there writes the manifest.

    Raises:
        ValueError: the folder holds another plan's cache, or records of another shape.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan = _claim(folder, plan)
    for shard in range(index, plan.shards, count):
        path = folder / plan.name(shard)
        if path.is_file() and _intact(path, plan, shard):
            continue
        first, last = plan.bounds(shard)
        parts = list(records(first, last))
        found = np.concatenate(parts) if parts else np.zeros(0)
        expected = (last - first, *plan.item, plan.layout.words)
        if found.shape != expected or found.dtype != np.int32:
            raise ValueError(
                f"the records of shard {shard} are {found.dtype} {list(found.shape)}; expected int32 {list(expected)}"
            )
        # Gone before the shard is new: other devices round otherwise, so that its bytes may be others than those listed.
        (folder / manifest.NAME).unlink(missing_ok=True)
        _write_shard(path, ids[first:last], found.reshape(last - first, -1))
    return _finish(folder, plan)


def _claim(folder: pathlib.Path, plan: CachePlan) -> CachePlan:
    """The folder becomes the plan's; returns the plan that it has. Raises ValueError if it is another's, or no cache."""
    path = folder / PLAN
    if path.is_file():
        check_same(there := read_plan(folder), plan, str(folder), writing=True)
        return there
    if foreign := sorted(file.name for file in folder.iterdir() if file.suffix != ".tmp"):
        raise ValueError(f"{folder} holds {foreign[0]}, so it is no folder of a cache; give an empty one, or a new one")
    draft = path.with_name(f"{PLAN}.{os.getpid()}.tmp")
    draft.write_text(json.dumps(plan.to_json(), indent=1))
    os.replace(draft, path)
    return plan


def _write_shard(path: pathlib.Path, ids: np.ndarray, records: np.ndarray) -> None:
    """One Parquet file, whole or not at all, with the hash of what it holds in its own metadata."""
    import pyarrow
    import pyarrow.parquet

    rows, kind = len(records), pyarrow.binary(records.nbytes // len(records))
    schema = pyarrow.schema(
        [pyarrow.field("id", pyarrow.int32(), nullable=False), pyarrow.field("record", kind, nullable=False)],
        metadata={"sha256": _content(ids, records)},
    )
    column = pyarrow.FixedSizeBinaryArray.from_buffers(kind, rows, [None, pyarrow.py_buffer(np.ascontiguousarray(records))])
    table = pyarrow.table([pyarrow.array(ids.astype(np.int32)), column], schema=schema)
    draft = path.with_name(f"{path.name}.tmp")
    with draft.open("wb") as file:
        pyarrow.parquet.write_table(
            table,
            file,
            row_group_size=rows,
            write_batch_size=rows,
            data_page_size=(1 << 31) - 1,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _content(ids: np.ndarray, records: np.ndarray) -> str:
    """Hash of a shard's ids, and of its records [rows, words] or, the same, their bytes."""
    return sha256(ids.astype(np.int32), np.ascontiguousarray(records).view(np.uint8))


def _intact(path: pathlib.Path, plan: CachePlan, shard: int) -> bool:
    """Whether a shard that an earlier run left is whole and holds what it says."""
    import pyarrow
    import pyarrow.parquet

    first, last = plan.bounds(shard)
    try:
        offset, ids, said = _inside(path, last - first, plan.row_bytes)
        held = np.memmap(path, np.uint8, "r", offset, (last - first, plan.row_bytes))
    except (pyarrow.ArrowException, OSError, ValueError):
        return False
    return _content(ids, held) == said


def _inside(path: pathlib.Path, rows: int, row_bytes: int) -> tuple[int, np.ndarray, str]:
    """(where in a shard its records begin, its ids, the hash that it says). Raises ValueError if it is cut in another way."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        about, said = file.metadata, (file.schema_arrow.metadata or {}).get(b"sha256", b"").decode()
        column = about.row_group(0).column(1)
        # A page is a header and, of fixed-size values that are never null, their bytes one after another.
        header = column.total_compressed_size - rows * row_bytes
        if about.num_row_groups != 1 or about.num_rows != rows or column.compression != "UNCOMPRESSED" or not 0 < header < 64:
            raise ValueError(f"{path} is no shard of {rows} x {row_bytes} bytes in one page")
        ids = file.read(["id"]).column(0).to_numpy()
    return column.data_page_offset + header, ids, said


def _finish(folder: pathlib.Path, plan: CachePlan) -> bool:
    """Writes the manifest if all shards are there and it is not right already; returns whether they are.

    A manifest that lists other bytes was damaged itself, or is one that another process wrote before this one wrote its shards.
    """
    if not all((folder / plan.name(shard)).is_file() for shard in range(plan.shards)):
        return False
    import pyarrow

    offsets = []
    for shard in range(plan.shards):
        first, last = plan.bounds(shard)
        try:
            offsets.append(_inside(folder / plan.name(shard), last - first, plan.row_bytes)[0])
        except (pyarrow.ArrowException, OSError, ValueError):
            return False  # damaged, and another process's, which is still to write it again
    about = {"plan": plan.to_json(), "offsets": offsets}
    if not _listed(folder, about):
        manifest.write(folder, about, [PLAN, *map(plan.name, range(plan.shards))])
    return True


def _listed(folder: pathlib.Path, about: dict[str, Any]) -> bool:
    """Whether there is a manifest that says this, and all files are as it lists them."""
    try:
        return manifest.verify(folder) == json.loads(json.dumps(about))
    except ValueError:
        return False
