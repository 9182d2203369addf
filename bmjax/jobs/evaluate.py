"""All metrics of a model that was trained: of its exported file, or of a checkpoint in its workdir."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bmjax import config as configs
from bmjax import data, deploy, manifest, parallel, trees
from bmjax.config import at_least, field
from bmjax.jobs import architecture, common, rebuilt
from bmjax.train import checkpoint
from bmjax.train import run as runs

CHECKPOINTS = "checkpoints"
_LAST = ("student", "model", "retrain", "big")  # which run of a job a workdir's name stands for, the first that is there


@dataclasses.dataclass
class Config:
    """What is evaluated, and on what."""

    model: str = field("", "folder of an export, or workdir of a training or compression; required")
    split: str = field("test", "examples to evaluate on", choices=("train", "valid", "test"))
    run: str = field("", "workdir: the run whose checkpoint is meant, as in teacher; empty is the final model's")
    step: int | None = field(None, "workdir: the checkpoint of this step; none is the newest", check=at_least(0))
    best: bool = field(False, "workdir: the checkpoint that was best on the validation split")
    data: data.Data = field(data.Data(), "examples; as in training where nothing else is said")
    devices: int = field(0, "simulate so many CPU devices; 0 takes those that are there", check=at_least(0))
    mesh: str = field("data=-1", "workdir: sizes of data, fsdp and tensor; -1 takes what is left")
    output: str = field("", "JSON file for the figures; empty is evaluation*.json in the workdir, or beside the export")

    def validate(self) -> None:
        """Raises ValueError if there is no model, or if two checkpoints are asked for."""
        if not self.model:
            raise ValueError("--model must be given: the folder of an export, or a workdir")
        if self.best and self.step is not None:
            raise ValueError(f"--best and --step={self.step} ask for two checkpoints; give one of them")


def defaults(model: str) -> Config:
    """The settings for a model, with the data that it was trained on; those of no model for "".

    Raises:
        ValueError: the folder is neither an export nor a workdir, or is damaged.
    """
    if not model:
        return Config()
    recorded = _about(pathlib.Path(model)).get("data_config")
    if recorded is None:
        return Config(model=model)
    return Config(model=model, data=configs.from_dict(recorded, {"Data": data.Data}))


def evaluate(config: Config, command: str, given: Any = None) -> dict[str, Any]:
    """Evaluates; returns the figures, which are also written as JSON.

    Args:
        config: what, and on what.
        command: for the record.
        given: the training's own config, made of its config file again: its functions are what a record cannot hold.

    Raises:
        ValueError: the data have other classes or shapes than the model, there is no such checkpoint, a file is missing or
            altered, `given` is of another version of its file or another config, or the network cannot be rebuilt.
    """
    folder = pathlib.Path(config.model)
    about = _about(folder)
    if (target := output(config)).is_dir() or not target.parent.is_dir():
        raise ValueError(f"--output={target} must be a file in a folder that exists")
    if given is not None:
        rebuilt.check_given(given, folder, about)
    config = dataclasses.replace(config, data=_of_its_kind(config.data, about))
    config = _with_source(config, about, given)
    parallel.simulate(config.devices)
    dataset = data.load(config.data)
    split = getattr(dataset, config.split)
    if _is_export(folder):
        found, step, weights = _program(config, folder, about, dataset, split)
    else:
        found, step, weights = _checkpoint(config, folder, about, dataset, split, given)
    same = about.get("data_fingerprint") in (None, dataset.fingerprint)
    results = {
        "command": command,
        "model": str(folder),
        "step": step,
        "weights": weights,
        "split": config.split,
        "data": dataset.name,
        "note": "" if same else "these are other data than it was trained on",
        "kind": dataset.kind,
        "bytes_note": dataset.bytes_note,
        "class_names": list(dataset.class_names),
        **common.scores(found),
    }
    common.write_json(output(config), results)
    return results


def output(config: Config) -> pathlib.Path:
    """Where the figures go: a file for each thing that can be evaluated, so that none overwrites another."""
    if config.output:
        return pathlib.Path(config.output)
    folder = pathlib.Path(config.model)
    if _is_export(folder):
        parts, place = [folder.name] if folder.name != common.EXPORT else [], folder.parent
    else:
        checkpoint = "best" if config.best else "" if config.step is None else f"step{config.step}"
        parts, place = ["checkpoint", config.run, checkpoint], folder
    name = "_".join(["evaluation", *filter(None, parts), *([config.split] if config.split != "test" else [])])
    return place / f"{name}.json"


def _of_its_kind(given: data.Data, about: Mapping[str, Any]) -> data.Data:
    """The data's settings without what was recorded of another kind of source, which this one has no use for."""
    recorded = about.get("data_config")
    if recorded is None or _kind(recorded.get("source")) == _kind(given.source):
        return given
    plain, old = data.Data(), configs.from_dict(dict(recorded), {"Data": data.Data})
    names = [entry.name for entry in dataclasses.fields(data.Data) if entry.name not in ("source", "batch", "threads")]
    fresh = {name: getattr(plain, name) for name in names if getattr(given, name) == getattr(old, name)}
    return dataclasses.replace(given, **fresh)


def _kind(source: Any) -> str:
    return str(source).partition(":")[0]


def _is_export(folder: pathlib.Path) -> bool:
    return (folder / manifest.NAME).is_file()


def _about(folder: pathlib.Path) -> Mapping[str, Any]:
    """What a folder says of itself: an export's metadata with classes and input, or a workdir's config.

    Raises:
        ValueError: it is neither, or a file is missing or altered.
    """
    if _is_export(folder):
        about = manifest.verify(folder)
        if "classes" not in about:
            raise ValueError(f"{folder} is not an exported model; give the folder that an export wrote, or a workdir")
        return {**about["metadata"], "classes": about["classes"], "input": about["input"]}
    try:
        resolved = configs.read_resolved(folder)
    except OSError:
        raise ValueError(
            f"{folder} is neither an export (manifest.json) nor a workdir (config.json); give one of the two"
        ) from None
    return {**resolved, "data_config": resolved.get("data")}


def _with_source(config: Config, about: Mapping[str, Any], given: Any) -> Config:
    """The config whose data can be loaded: a function that made those of training is the given config's.

    Raises:
        ValueError: the data are those of training, and were made by a function of a config file that is not given.
    """
    source = config.data.source
    recorded = (about.get("data_config") or {}).get("source")
    if source == recorded and isinstance(source, str) and source.partition(":")[0] not in data.SOURCES:
        if given is not None:
            return dataclasses.replace(config, data=dataclasses.replace(config.data, source=given.data.source))
        raise ValueError(
            f"the data of {config.model} came from a function, {source}, which evaluate cannot call; give a source by name as "
            "--data.source, or the training's config file again as --config=<file.py>"
        )
    return config


def _program(
    config: Config, folder: pathlib.Path, about: Mapping[str, Any], dataset: data.Dataset, split: data.Split
) -> tuple[Any, int | None, str | None]:
    """(evaluation, None, of which parameters if it says so) of an exported program, which takes raw inputs."""
    _check_classes(config, int(about["classes"]), dataset)
    if list(about["input"]["shape"]) != list(dataset.shape):
        raise ValueError(f"{folder} takes inputs {about['input']['shape']}, but {dataset.name} has {list(dataset.shape)}")
    call = deploy.load(folder)
    offset, scale = np.asarray(dataset.offset, np.float32), np.asarray(dataset.scale, np.float32)
    if "segments" in split.extra:
        raise ValueError(
            f"{folder} takes one document a row, and {dataset.name} packs several; set --data.packing=concat, or evaluate the "
            "workdir"
        )
    raw = (lambda inputs: inputs) if dataset.ids else (lambda inputs: inputs * scale + offset)
    batches = data.eval_batches(split, config.data.batch)
    return runs.score(dataset, split, batches, lambda batch: call(raw(batch["inputs"]))), None, about.get("weights")


def _checkpoint(
    config: Config, folder: pathlib.Path, about: Mapping[str, Any], dataset: data.Dataset, split: data.Split, given: Any
) -> tuple[Any, int, str]:
    """(evaluation, step, of which parameters) of a checkpoint, over the whole mesh."""
    name = _run(config, folder)
    teaches = name.startswith("teacher")  # "teacher 2" is the second of several
    restored = checkpoint.read(folder / CHECKPOINTS / name, step=config.step, best=config.best)
    held = trees.nested(restored.state)
    params, state = runs.outcome(held["params"]["model"], held.get("extra", {})), held.get("model_state", {})
    model = rebuilt.network(given, folder, about, dataset, teacher=teaches)
    mesh = parallel.make_mesh(config.mesh)
    parallel.check_batch(config.data.batch, mesh)
    example = data.eval_batches(split, config.data.batch)[0]
    expected = jax.eval_shape(model.init, jax.random.key(0), example)
    if trees.first_difference(expected[0], params) and getattr(model, "axes", None):  # what was pruned is smaller
        model = architecture.with_sizes_of(model, params)
        expected = jax.eval_shape(model.init, jax.random.key(0), example)
    if misfit := trees.first_difference(expected[0], params) or trees.first_difference(expected[1], state):
        raise ValueError(f"the checkpoint of {folder} does not fit {dataset.name}: {misfit}; is this its data?")
    shardings = parallel.partition(params, runs.rules_of(model), mesh)
    placed = jax.device_put(params, shardings)
    if not teaches:
        placed = rebuilt.seen(given, folder, about, restored.state, placed, model, example, (shardings, mesh))
    state = jax.device_put(state, parallel.replicated(mesh))
    batches = (parallel.put_batch(batch, mesh) for batch in data.eval_batches(split, config.data.batch))
    logits = lambda batch: runs.predictor(model)(placed, state, batch)
    weights = "moving average" if "ema" in held.get("extra", {}) else "last step"
    return runs.score(dataset, split, batches, logits), restored.step, weights


def _run(config: Config, folder: pathlib.Path) -> str:
    """The name of the run whose checkpoint is meant."""
    there = sorted(path.name for path in (folder / CHECKPOINTS).glob("*") if path.is_dir())
    if not there:
        raise ValueError(f"{folder} holds no checkpoint; was the run stopped before it saved one?")
    if config.run and config.run not in there:
        nearest = configs.nearest(config.run, there)
        raise ValueError(f"{folder} has no run {config.run!r}; the nearest is {nearest!r} of {', '.join(there)}")
    return config.run or next((name for name in _LAST if name in there), there[0])


def _check_classes(config: Config, classes: int, dataset: data.Dataset) -> None:
    if classes != dataset.classes:
        raise ValueError(f"{config.model} has {classes} classes and {dataset.name} has {dataset.classes}; give its own data")
