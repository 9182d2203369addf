"""What every job needs: a bench to run on, stages that are done once, and the shipped file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bmjax import config as configs
from bmjax import data, deploy, measure, parallel
from bmjax.config import at_least, field
from bmjax.train.log import Log
from bmjax.train.run import Bench
from bmjax.types import Params


@dataclasses.dataclass
class Machine:
    """The devices, and what is written about a run."""

    devices: int = field(0, "simulate so many CPU devices; 0 takes those that are there", check=at_least(0))
    mesh: str = field("data=-1", "sizes of data, fsdp and tensor, as in data=2,fsdp=4; -1 takes what is left")
    tensorboard: bool = field(True, "write TensorBoard events beside metrics.jsonl")
    wandb: str = field("", "project name at Weights & Biases; empty sends nothing")


@contextlib.contextmanager
def bench(config: Any, workdir: pathlib.Path) -> Iterator[Bench]:
    """The bench of a job whose config has `machine`, `data` and `seed`; everything that can be checked early is.

    Raises:
        ValueError: the devices, the mesh, the batch or the data do not fit, or the workdir holds another config's run.
    """
    parallel.simulate(config.machine.devices)
    dataset = data.load(config.data.source)
    mesh = parallel.make_mesh(config.machine.mesh)
    parallel.check_batch(config.data.batch, mesh)
    data.train_batches(dataset.train, config.data.batch, config.seed, config.data.augment)
    configs.write_resolved(config, workdir)
    with Log(workdir, tensorboard=config.machine.tensorboard, wandb=config.machine.wandb) as log:
        yield Bench(mesh, dataset, config.data, workdir, log, config.seed)


def once(path: pathlib.Path, make: Callable[[], Any]) -> Any:
    """What `make` returns, written to a JSON file; read from there where it exists, so that a resumed job goes on behind it."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(make(), indent=1), encoding="utf-8")
    os.replace(draft, path)
    return json.loads(path.read_text(encoding="utf-8"))


def ship(bench: Bench, model: Any, params: Params, model_state: Params, directory: pathlib.Path, about: dict[str, Any]) -> None:
    """Exports a model that takes raw inputs: the data's normalisation is part of the program."""
    dataset = bench.dataset
    offset, scale = np.asarray(dataset.offset), np.asarray(dataset.scale)

    def forward(params: Params, raw: Any) -> Any:
        return model.apply(params, model_state, {"inputs": (raw - offset) / scale})[0].logits

    metadata = {"class_names": list(dataset.class_names), "data": dataset.name, "data_fingerprint": dataset.fingerprint, **about}
    deploy.export(
        forward,
        params,
        directory,
        input_shape=dataset.shape,
        input_dtype="float32",
        classes=dataset.classes,
        metadata=metadata,
    )


def scores(found: measure.Evaluation) -> dict[str, Any]:
    """An evaluation for the report: its metrics, and the accuracy's 95% interval."""
    right = int(found.correct.sum())
    return {"metrics": found.summary, "accuracy_interval": list(measure.accuracy_interval(right, len(found.correct)))}
