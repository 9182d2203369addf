"""Caching a teacher: it runs once over a split, and its largest log-probabilities are written beside each item."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from bmjax import config as configs
from bmjax import data, manifest, parallel
from bmjax.config import at_least, field, within
from bmjax.data.teacher_record import VALUES
from bmjax.jobs import architecture, common
from bmjax.jobs.common import Net
from bmjax.train.run import Bench
from bmjax.types import Batch, Params

RESULTS = "results.json"


@dataclasses.dataclass
class Config:
    """What is cached, and how."""

    teacher: str = field("", "export of the teacher, or the workdir that holds it; required")
    model: Any = field(
        None, "the teacher's architecture; none takes the one that the export is of", kinds=architecture.optional_kinds()
    )
    k: int = field(64, "log-probabilities of each example, or token; all where there are fewer classes", check=at_least(1))
    values: str = field("bfloat16", "what log-probabilities are rounded to", choices=tuple(VALUES))
    temperatures: tuple[float, ...] = field(
        (1.0, 2.0, 4.0), "distillation temperatures at which the cache can be read, 4 bytes an item each"
    )
    split: str = field("train", "examples to cache", choices=("train", "valid", "test"))
    shard: int = field(64, "MiB of a file, about", check=within(1, 1024))
    data: data.Data = field(data.Data(), "examples, as the student will be given them; batch is what the teacher sees at once")
    devices: int = field(0, "simulate so many CPU devices; 0 takes those that are there", check=at_least(0))
    mesh: str = field("data=-1", "sizes of data, fsdp and tensor over a process's devices; -1 takes what is left")
    coordinator: str = field("", "several processes: host:port of process 0, on a port that is free there; empty is one process")
    processes: int = field(1, "how many processes write the cache, each its own shards", check=at_least(1))
    process: int = field(0, "which of them this is, from 0", check=at_least(0))

    def validate(self) -> None:
        """Raises ValueError if there is no teacher, no record can be made so, or the processes do not go together."""
        if not self.teacher:
            raise ValueError("--config.teacher must be given: the folder of an export, or a workdir that holds one")
        data.RecordLayout(1, 2, self.values, self.temperatures)
        parallel.check_processes(self.coordinator, self.processes, self.process)


def cache(config: Config, workdir: pathlib.Path, command: str) -> dict[str, Any]:
    """Caches a teacher, or goes on caching it; returns the figures, which are also written as JSON.

    Where there are several processes, each runs the teacher on its own devices and writes its own shards.

    Raises:
        ValueError: the teacher does not fit the data or the devices, its logits are NaN, or the folder is another cache's.
    """
    configs.make_workdir(workdir)
    parallel.join(config.coordinator, config.processes, config.process)
    parallel.simulate(config.devices)
    dataset = data.load(config.data)
    mesh = parallel.make_mesh(config.mesh, jax.local_devices())
    split: data.Split = getattr(dataset, config.split)
    parallel.check_batch(config.data.batch, mesh)
    bench = Bench(mesh, dataset, config.data, workdir, cast(Any, None), 0)  # nothing is logged
    teacher = identity(config.teacher)
    net = common.load(bench, config.model, config.teacher)
    architecture.check_logits(net.model, bench.shapes(net.model), bench.example(), dataset.classes)
    layout = data.RecordLayout(min(config.k, dataset.classes), dataset.classes, config.values, config.temperatures)
    plan = data.plan_cache(config.teacher, teacher, dataset, config.data, layout, split=config.split, shard_mib=config.shard)
    index, count = jax.process_index(), jax.process_count()
    start = time.perf_counter()
    records = functools.partial(_records, bench, net, split, layout)
    finished = data.write_cache(workdir, plan, split.id, records, index, count)
    items = plan.examples * int(np.prod(plan.item))
    results = {
        "command": command,
        "cache": str(workdir),
        "finished": finished,
        "teacher": config.teacher,
        "data": dataset.name,
        "split": config.split,
        "examples": plan.examples,
        "items": items,
        "k": layout.k,
        "shards": plan.shards,
        "bytes_per_item": sum(path.stat().st_size for path in workdir.glob("*.parquet")) / items if finished else None,
        "seconds": time.perf_counter() - start,
    }
    if finished:
        common.write_json(workdir / RESULTS, results)
    return results


def identity(directory: str) -> str:
    """`common.identity` of a teacher to cache. Raises ValueError as it does, and if several are given."""
    if "," in directory and not pathlib.Path(directory).expanduser().exists():
        raise ValueError(f"the teacher is {directory}: a cache is of one export; several as one are an export of generations")
    return common.identity(directory)


def content(folder: str) -> str:
    """SHA-256 of the records of a finished cache."""
    files = manifest.read(pathlib.Path(folder).expanduser())[1]
    hashes = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".parquet")}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _records(bench: Bench, net: Net, split: data.Split, layout: data.RecordLayout, first: int, last: int) -> Iterator[np.ndarray]:
    """The packed outputs on the rows from `first`, a multiple of the batch, to before `last`, a batch at a time.

    Raises:
        ValueError: the teacher's logits are NaN.
    """
    size = bench.data.batch
    batches = data.eval_batches(split, size)
    waiting: tuple[int, Any] | None = None
    for step in range(first // size, -(-last // size)):
        placed = parallel.put_batch(batches[step], bench.mesh)
        dispatched = step, _packed(net.model, layout)(net.params, net.model_state, placed)
        if waiting is not None:  # a step late, so that the devices do not wait
            yield _fetched(split, size, last, *waiting)
        waiting = dispatched
    if waiting is not None:
        yield _fetched(split, size, last, *waiting)
    logging.info("examples %d to %d of %d are cached", first, last - 1, len(split))


def _fetched(split: data.Split, size: int, last: int, step: int, found: tuple[jax.Array, jax.Array]) -> np.ndarray:
    records, bad = (np.asarray(array)[: last - step * size] for array in found)
    if bad.any():
        row = step * size + int(np.argmax(bad))
        raise ValueError(f"the teacher's logits of the example {split.id[row]} hold NaN; nothing can be learned from them")
    return records


@functools.lru_cache(maxsize=4)
def _packed(model: Any, layout: data.RecordLayout) -> Any:
    """The jitted (params, model_state, batch) -> (records, [B] whether an example's logits hold NaN)."""

    def run(params: Params, model_state: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(params, model_state, batch)[0].logits
        weights = batch["weights"]
        counted = jnp.isnan(logits) & (weights.reshape(*weights.shape, *(1,) * (logits.ndim - weights.ndim)) > 0)
        return layout.pack(logits), counted.reshape(len(logits), -1).any(-1)

    return jax.jit(run)


def beside(bench: Bench, folder: str, *, k: int = 0, teacher: str = "") -> tuple[Bench, data.RecordLayout]:
    """The bench with a cache's records in every batch of the train split, and how they are packed.

    Args:
        bench: of the student.
        folder: of the cache.
        k: log-probabilities of each item that it must hold; 0 takes any number.
        teacher: export, or workdir, of the teacher that it must be of; "" takes any.

    Raises:
        ValueError: it is no finished cache of these data, that teacher or that k (names what differs), or a shard was altered.
    """
    found = data.open_cache(folder)
    found.check(bench.dataset, bench.data, k=k, teacher=(teacher, identity(teacher)) if teacher else None)
    dataset = dataclasses.replace(bench.dataset, train=found.beside(bench.dataset.train))
    return dataclasses.replace(bench, dataset=dataset), found.layout
