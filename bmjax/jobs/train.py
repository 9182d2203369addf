"""Training alone: dense or pruned, from labels or from a teacher; ends with the test split's metrics and an exported file."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from bmjax import config as configs
from bmjax import data, prune, trees
from bmjax.config import field, within
from bmjax.distill import Distill
from bmjax.jobs import common
from bmjax.jobs.common import Net, Terms
from bmjax.losses import Task
from bmjax.models import Plain
from bmjax.train.run import Bench, Run

EXPORT, RESULTS, TEST = "export", "results.json", "test.npz"


@dataclasses.dataclass
class Teacher:
    """A teacher, and what is learned from it."""

    model: Any = field(Plain(), "the teacher's architecture")
    pretrained: str = field("", "folder of an export with its parameters; empty trains it first, on the same data")
    run: Run = field(Run(), "training of the teacher")
    distill: Distill = field(Distill(), "how the student learns from it")


@dataclasses.dataclass
class Config:
    """One training."""

    seed: int = field(0, "of parameters, shuffling and augmentation", check=within(0, 2**32, open_high=True))
    machine: common.Machine = field(common.Machine(), "devices and logs")
    data: data.Data = field(data.Data(), "examples")
    model: Any = field(Plain(), "what is trained; the preset chooses its kind")
    task: Task = field(Task(), "the loss against the labels")
    run: Run = field(Run(), "how long, and with what optimiser")
    prune: prune.Sparsity = field(prune.Sparsity(), "pruning of single weights")
    teacher: Teacher | None = field(None, "distillation; the preset gives a teacher or none")
    predict: bool = field(False, "run the exported file on the test split with experiments.predict, and write predictions.csv")


def train(config: Config, workdir: pathlib.Path, command: str) -> dict[str, Any]:
    """Trains the teacher, if there is one, and the model; exports the model; returns {"models": [...]} with test metrics.

    Also writes the test split, raw, to test.npz: what experiments.predict can be tried on.

    Raises:
        ValueError: the config does not fit the data or the devices, the workdir holds another config's run, or training diverged.
    """
    with common.bench(config, workdir) as bench:
        model, tutor = config.model.build(bench.dataset.shape, bench.dataset.classes), config.teacher
        plain = {"ce": (1.0, config.task.term())}
        terms = plain if tutor is None else tutor.distill.terms(config.task.term())
        name = "model" if tutor is None else "student"
        teacher = None if tutor is None else _teacher(bench, tutor, plain)
        common.check(bench, model, terms, config.run, teacher=teacher, wrap=config.prune.after)
        configs.write_resolved(config, workdir)
        if tutor is not None and teacher is not None and not tutor.pretrained:
            teacher = common.train(bench, "teacher", teacher.model, plain, tutor.run)
        net = common.train(bench, name, model, terms, config.run, teacher=teacher, wrap=config.prune.after)
        nets = {name: net} if teacher is None else {"teacher": teacher, name: net}
        common.ship(bench, net, workdir / EXPORT, {"config": configs.fingerprint(config)})
        _write_test(bench, workdir / TEST)
        results = {"command": command, "models": [_measured(bench, name, net, teacher) for name, net in nets.items()]}
        (workdir / RESULTS).write_text(json.dumps(results, indent=1), encoding="utf-8")
        return results


def _teacher(bench: Bench, tutor: Teacher, plain: Terms) -> Net:
    """The teacher from its export; its shapes alone, checked, where it is still to be trained."""
    model = tutor.model.build(bench.dataset.shape, bench.dataset.classes)
    if tutor.pretrained:
        return common.load(bench, model, tutor.pretrained)
    common.check(bench, model, plain, tutor.run)
    return Net(model, *bench.shapes(model))


def _measured(bench: Bench, name: str, net: Net, teacher: Net | None) -> dict[str, Any]:
    kernels = [leaf for path, leaf in trees.paths(net.params).items() if path.endswith("kernel")]
    zeros = sum(int(np.sum(np.asarray(leaf) == 0)) for leaf in kernels)
    return {
        "name": name,
        **common.scores(common.evaluate(bench, net, bench.dataset.test, teacher)),
        "parameters": trees.size(net.params),
        "sparsity": zeros / max(trees.size(kernels), 1),
        "train_steps": net.steps,
    }


def _write_test(bench: Bench, path: pathlib.Path) -> None:
    dataset = bench.dataset
    raw = dataset.test.inputs * dataset.scale + dataset.offset
    np.savez(path, inputs=raw.astype(np.float32), targets=dataset.test.targets)
