"""What every job needs: a bench to run on, trained networks, their scores and the shipped file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax
from absl import logging

from bmjax import config as configs
from bmjax import data, deploy, distill, manifest, measure, parallel, trace, trees
from bmjax.config import at_least, field
from bmjax.jobs import architecture
from bmjax.losses import Schedule
from bmjax.train import run as runs
from bmjax.train.log import Log
from bmjax.train.run import Bench, Run
from bmjax.train.step import Problem
from bmjax.types import Batch, LossTerm, Params, Rollout, View

EXPORT = "export"  # the folder of a workdir that holds what was exported


@dataclasses.dataclass
class Machine:
    """The devices, and what is written about a run."""

    devices: int = field(0, "simulate so many CPU devices; 0 takes those that are there", check=at_least(0))
    mesh: str = field("data=-1", "sizes of data, fsdp and tensor, as in data=2,fsdp=4; -1 takes what is left")
    tensorboard: bool = field(True, "write TensorBoard events beside metrics.jsonl")
    wandb: str = field("", "project name at Weights & Biases; empty sends nothing")


class Net(NamedTuple):
    """A model with its trained parameters, and what they cost.

    Attributes:
        model: the `Model`.
        params, model_state: of the model, on the mesh or on the host.
        steps: updates that made it.
        flops: FLOPs that those updates took, the teacher's forward passes included.
    """

    model: Any
    params: Params
    model_state: Params
    steps: int = 0
    flops: int = 0

    @property
    def frozen(self) -> dict[str, Params]:
        """As the step takes a teacher."""
        return {"params": self.params, "model_state": self.model_state}


@contextlib.contextmanager
def bench(config: Any, workdir: pathlib.Path) -> Iterator[Bench]:
    """The bench of a job whose config has `machine`, `data` and `seed`.

    The config is not written yet: the job does that when its checks are done, so that a mistaken command leaves a workdir
    which the corrected one can use.

    Raises:
        ValueError: the devices, the mesh, the batch or the data do not fit, or the workdir holds another config's run.
    """
    parallel.simulate(config.machine.devices)
    dataset = data.load(config.data)
    mesh = parallel.make_mesh(config.machine.mesh)
    parallel.check_batch(config.data.batch, mesh)
    data.train_batches(dataset.train, config.data.batch, config.seed)
    configs.check_workdir(config, workdir, dataset.fingerprint)
    with Log(workdir, tensorboard=config.machine.tensorboard, wandb=config.machine.wandb) as log:
        yield Bench(mesh, dataset, config.data, workdir, log, config.seed)


Terms: TypeAlias = Mapping[str, tuple[float | Schedule, LossTerm]]
Wrap: TypeAlias = Callable[[optax.GradientTransformation, int], optax.GradientTransformation]  # (optimiser, steps) -> optimiser


def _unchanged(tx: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    return tx


def record(config: Any, bench: Bench, teachers: Mapping[str, str] | None = None) -> None:
    """Writes the config and what the run is made of to the workdir, which from then on is theirs; when a job's checks are done.

    Args:
        config, bench: of the job.
        teachers: as for `config.check_workdir`.

    Raises:
        ValueError: as `config.check_workdir`.
    """
    configs.write_resolved(config, bench.directory, bench.dataset.fingerprint, teachers)


def problem(
    model: Any,
    terms: Terms,
    run: Run,
    teacher: Net | None,
    wrap: Wrap = _unchanged,
    views: tuple[View, ...] = (),
    rollout: Rollout | None = None,
    decay: float | None = None,
) -> Problem:
    """What a run trains: its optimiser, wrapped, and all that the run's config says about how."""
    how = run.how if decay is None else {**run.how, "ema": decay, "mean_teacher": True}
    return Problem(
        model,
        terms,
        wrap(run.optimizer.build(run.steps), run.steps),
        teacher=teacher and teacher.model,
        loss_tx=run.optimizer.build_for_terms(run.steps),
        views=views,
        rollout=rollout,
        **how,
    )


def check(
    bench: Bench,
    model: Any,
    terms: Terms,
    run: Run,
    *,
    teacher: Net | None = None,
    wrap: Wrap = _unchanged,
    views: tuple[View, ...] = (),
    rollout: Rollout | None = None,
    decay: float | None = None,
) -> None:
    """Raises ValueError where `train` with these arguments would, before anything is compiled; a teacher may be abstract."""
    architecture.check_logits(model, bench.shapes(model), bench.example(), bench.dataset.classes)
    found = problem(model, terms, run, teacher, wrap, views, rollout, decay)
    runs.check(bench, found, run, teacher and teacher.frozen)


def train(
    bench: Bench,
    name: str,
    model: Any,
    terms: Terms,
    run: Run,
    *,
    start: Net | None = None,
    teacher: Net | None = None,
    spent: int = 0,
    wrap: Wrap = _unchanged,
    views: tuple[View, ...] = (),
    rollout: Rollout | None = None,
    decay: float | None = None,
) -> Net:
    """Trains, or goes on training, one network.

    Args:
        bench, name, run: as for `train.run.fit`.
        model: what is trained.
        terms: {name: (weight, loss term)}.
        start: parameters to start from; its steps are counted to the result's.
        teacher: the frozen partner.
        spent: FLOPs that `start` took already.
        wrap: (optimiser, steps) -> optimiser, for pruning.
        views: what the forward pass sees of the parameters.
        rollout: makes the batch that is trained on.
        decay: of a moving average of the parameters that teaches them.
    """
    trained = problem(model, terms, run, teacher, wrap, views, rollout, decay)
    state = runs.fit(
        bench,
        name,
        trained,
        run,
        params=start and start.params,
        model_state=start and start.model_state,
        frozen=teacher and teacher.frozen,
        schedule=None if run.optimizer.custom else run.optimizer.schedule(run.steps),
    )
    net = Net(model, runs.result(trained, state), state.model_state, run.steps + (start.steps if start else 0))
    partner = net if decay is not None else teacher
    step = runs.step_flops(flops(bench, net), flops(bench, partner) if partner else 0, bench.data.batch)
    return net._replace(flops=spent + run.steps * step)


def flops(bench: Bench, net: Net) -> int:
    """FLOPs of one example's forward pass."""
    example = {name: bench.example()[name] for name in ("inputs", "targets")}  # a teacher may be chosen by the targets
    batch = {name: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype) for name, x in example.items()}
    logits = lambda params, model_state, batch: net.model.apply(params, model_state, batch)[0].logits
    return trace.flops(logits, trees.abstract(net.params), net.model_state, batch) // 2


def evaluate(
    bench: Bench, net: Net, split: data.Split, teacher: Net | None = None
) -> measure.Evaluation | measure.TokenEvaluation:
    """All metrics of a network on a split, with its agreement with a teacher."""

    def logits(net: Net) -> Callable[[Batch], jax.Array]:
        return lambda batch: runs.predictor(net.model)(net.params, net.model_state, batch)

    return runs.evaluate(bench, logits(net), split, logits(teacher) if teacher else None)


def export_in(directory: str) -> str:
    """The export that a folder is, or that it holds as a workdir.

    Raises:
        ValueError: there is no such folder.
    """
    folder = pathlib.Path(directory).expanduser()
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "is not there"
        raise ValueError(f"{directory} {found}; give the folder of an export, or a workdir that holds one")
    return str(folder / EXPORT if (folder / EXPORT).is_dir() else folder)


def identity(directory: str) -> str:
    """SHA-256 of what an exported network is: its parameters, its state and its architecture, not the folder or the date.

    Raises:
        ValueError: the folder is no export, nor a workdir that holds one.
    """
    about, files = manifest.read(export_in(directory))
    hashes = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    architecture_of = (about.get("metadata") or {}).get("architecture", {})
    return hashlib.sha256(json.dumps([hashes, architecture_of], sort_keys=True).encode()).hexdigest()


def load(bench: Bench, model: Any, directory: str, *, vocabulary: int | None = None) -> Net:
    """A network whose parameters were exported, partitioned over the mesh.

    Args:
        bench: where.
        model: the network's config, as `architecture.build` takes it; None takes the one that the export says it is of.
        directory: of an export, or a workdir that holds one.
        vocabulary: for a teacher, from which class on one of export and data only has padding; 0 if none was named. The network
            has the data's classes then. None: the export must have them.

    Raises:
        ValueError: the export is altered, has other classes, does not say what it is of, or does not fit the model (names the
            first parameter that differs).
    """
    directory = export_in(directory)
    about, here = manifest.verify(directory), bench.dataset.classes
    classes = about.get("classes")
    if classes is None:
        raise ValueError(f"{directory} is not an exported model; give the folder that an export wrote")
    if classes != here and not 0 < (vocabulary or 0) <= min(classes, here):
        maybe = vocabulary is not None and (bench.dataset.kind == "tokens" or classes > here)
        padded = f". If the larger only has padding at its end, distill.vocabulary={min(classes, here)} leaves that out"
        raise ValueError(
            f"{directory} has {classes} classes and {bench.dataset.name} has {here}; "
            f"teacher and student need the same classes{padded if maybe else ''}"
        )
    if model is None:
        try:
            model = architecture.rebuild(about["metadata"].get("architecture", {}), bench.dataset, classes)
        except ValueError as error:
            raise ValueError(f"the network of {directory} cannot be built: {error}; give its config as the model") from None
    else:
        model = architecture.build(model, bench.dataset, classes)
    params, state = deploy.map_params(directory), deploy.load_state(directory)
    expected, expected_state = jax.eval_shape(model.init, jax.random.key(0), bench.example())
    misfit = trees.first_difference(expected, params) or trees.first_difference(expected_state, state)
    if misfit:
        raise ValueError(f"{directory} does not fit the model: {misfit}")
    if about["metadata"].get("data_fingerprint") != bench.dataset.fingerprint:
        logging.warning("%s was made on other data than %s, whose normalisation is used now", directory, bench.dataset.name)
    if classes != here:
        model = distill.OfClasses(model, here)
    placed = deploy.place(params, parallel.partition(params, runs.rules_of(model), bench.mesh))
    return Net(model, placed, jax.device_put(state, parallel.replicated(bench.mesh)))


def ship(bench: Bench, net: Net, directory: pathlib.Path, about: dict[str, Any], model: Any = None) -> pathlib.Path:
    """Exports a network that takes raw inputs (or token ids): the data's normalisation is part of the program.

    Args:
        bench: where it was trained.
        net: the network.
        directory: see `deploy.export`.
        about: for the manifest.
        model: its config, perhaps of other sizes, so that `load` can rebuild it.
    """
    dataset, ids = bench.dataset, bench.dataset.ids
    offset, scale = np.asarray(dataset.offset), np.asarray(dataset.scale)
    params, state = jax.device_get((net.params, net.model_state))

    def forward(params: Params, raw: jax.Array) -> jax.Array:
        inputs = raw if ids else (raw - offset) / scale
        return net.model.apply(params, state, {"inputs": inputs})[0].logits

    metadata = {
        "data": dataset.name,
        "data_config": configs.to_dict(bench.data),
        "data_fingerprint": dataset.fingerprint,
        "architecture": architecture.record(model, net.model, params),
        **({} if dataset.kind == "tokens" else {"class_names": list(dataset.class_names)}),
        **({"vocabulary": dataset.vocabulary} if ids else {}),
        **about,
    }
    return deploy.export(
        forward,
        params,
        directory,
        input_shape=dataset.shape,
        input_dtype="int32" if ids else "float32",
        classes=dataset.classes,
        metadata=metadata,
        state=state,
    )


def scores(found: measure.Evaluation | measure.TokenEvaluation) -> dict[str, Any]:
    """An evaluation for the report: its metrics, and the accuracy's 95% interval (not of tokens, which depend on each other)."""
    if isinstance(found, measure.TokenEvaluation):
        return {"metrics": found.summary}
    right = int(found.correct.sum())
    return {"metrics": found.summary, "accuracy_interval": list(measure.accuracy_interval(right, len(found.correct)))}


def scalars(summary: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation's summary that are one number."""
    return {name: value for name, value in summary.items() if isinstance(value, (int, float))}


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes JSON whole or not at all."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
    draft.replace(path)


def environment() -> dict[str, str]:
    """Versions and devices, for the record."""
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"python": sys.version.split()[0], "jax": jax.__version__, "devices": devices}
