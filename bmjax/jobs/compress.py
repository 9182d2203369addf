"""The main job: how small can this model get without getting worse?

big model -> analyse, sensitivity -> propose sizes -> prune with distillation from the original, at fixed shapes
-> choose on validation -> compact once -> retrain -> baselines of equal compute -> test split, once -> export -> report.
The same command resumes it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

from absl import logging

from bmjax import config as configs
from bmjax import data, measure, report
from bmjax.config import at_least, field, within
from bmjax.distill import Distill
from bmjax.jobs import architecture, common, results
from bmjax.jobs.common import Net, Terms
from bmjax.jobs.search import Pruning, analyse, compact, measure_sensitivity, search
from bmjax.losses import Task
from bmjax.models import Residual
from bmjax.train import run as runs
from bmjax.train.run import Bench, Run

RESULTS, REPORT, EXPORT = "results.json", "report.html", "export"


@dataclasses.dataclass
class Budget:
    """What may be lost, and how sure the verdict is."""

    max_drop: float = field(0.02, "largest allowed drop of test accuracy, as a fraction", check=within(0.001, 0.5))
    level: float = field(0.05, "chance to call a model not worse that is", check=within(0.0001, 0.5))


@dataclasses.dataclass
class Latency:
    """How latency is measured."""

    batch: int = field(256, "examples a call", check=at_least(64))
    repeats: int = field(15, "interleaved timings of each model", check=at_least(5))


@dataclasses.dataclass
class Config:
    """The main job."""

    title: str = field("digits, residual MLP", "what the report is called")
    seed: int = field(0, "of parameters, shuffling and augmentation", check=within(0, 2**32, open_high=True))
    machine: common.Machine = field(common.Machine(), "devices and logs")
    data: data.Data = field(data.Data(), "examples")
    model: Any = field(Residual(), "the big model, or a function (shape, classes) -> Model", kinds=architecture.kinds())
    pretrained: str = field("", "folder of an export to take the big model's parameters from, instead of training it")
    task: Task = field(Task(), "the loss against the labels")
    distill: Distill = field(Distill(), "what the small model learns from the big one")
    big: Run = field(Run(), "training of the big model")
    prune: Pruning = field(Pruning(), "pruning")
    retrain: Run = field(Run(), "training of the compact model")
    budget: Budget = field(Budget(), "what counts as not worse")
    latency: Latency = field(Latency(), "timing")
    code: dict[str, str] = configs.recorded("SHA-256 of the config file and of the modules beside it that it imports")


def compress(config: Config, workdir: pathlib.Path, command: str) -> dict[str, Any]:
    """Runs the whole job, or goes on with it; returns the results that report.html shows.

    Raises:
        ValueError: the config does not fit the data or the devices, the workdir holds another config's run, or training diverged.
    """
    with common.bench(config, workdir) as bench:
        finished = (workdir / RESULTS).exists()
        there = config.pretrained and (not finished or pathlib.Path(config.pretrained).expanduser().is_dir())
        given = {config.pretrained: common.identity(config.pretrained)} if there else {}
        configs.check_workdir(config, workdir, bench.dataset.fingerprint, given)
        if finished:
            logging.info("%s is finished already; its report is shown again", workdir)
            return json.loads((workdir / RESULTS).read_text(encoding="utf-8"))
        model = architecture.build(config.model, bench.dataset)
        config.distill.check_classes(bench.dataset)
        task = config.task.term(config.distill.chunked)
        plain, distilled = {"ce": (1.0, task)}, functools.partial(config.distill.terms, task)
        pretrained = common.load(bench, config.model, config.pretrained) if config.pretrained else None
        _check(config, bench, model, plain)
        common.record(config, bench, given)
        big = pretrained or common.train(bench, "big", model, plain, config.big)
        analysis = analyse(bench, big)
        sensitivity = measure_sensitivity(bench, big, analysis)
        terms = distilled(config.prune.run.steps)
        tried = search(bench, big, analysis, sensitivity, config.prune, terms, config.budget.max_drop)
        nets = {"big": big}
        held = [candidate for candidate in tried if candidate.holds]
        if held:
            start = compact(bench, held[-1], analysis)
            spent = start.flops
            terms = distilled(config.retrain.steps)
            nets["small"] = common.train(
                bench, "retrain", start.model, terms, config.retrain, start=start, teacher=big, spent=spent
            )
            nets["from scratch"] = _baseline(config, bench, "from scratch", start.model, None, nets["small"].flops)
            nets["without teacher"] = _baseline(config, bench, "without teacher", start.model, start, nets["small"].flops - spent)
        measured = results.gather(
            bench,
            nets,
            tried,
            analysis,
            max_drop=config.budget.max_drop,
            level=config.budget.level,
            latency=dataclasses.asdict(config.latency),
        )
        measured["notes"] += _augmentation(config) if held else []
        return _conclude(config, bench, nets, {**measured, "sensitivity": sensitivity.as_dict()}, command)


def _check(config: Config, bench: Bench, model: Any, plain: Terms) -> None:
    """Traces every kind of run, at the big model's sizes, before the first one starts."""
    if bench.dataset.kind == "tokens":
        raise ValueError(
            f"{bench.dataset.name} holds tokens, and the verdict compares classes of whole examples; "
            "prune or distil a language model with experiments.train"
        )
    examples, budget = len(bench.dataset.test.targets), config.budget
    needed = measure.examples_needed(0.0, budget.max_drop, level=budget.level)
    if needed is not None and examples < needed:
        raise ValueError(
            f"the test split has {examples:,} example{'s'[: examples != 1]}, of which no verdict can come: to call even a model "
            f"that errs alike not worse takes {needed:,} at budget.max_drop={budget.max_drop:g} and budget.level="
            f"{budget.level:g}; take a larger test split or budget"
        )
    if config.distill.seeks:
        raise ValueError("config.distill.layers is auto, which experiments.train finds; here take uniform, as depths change")
    teacher = Net(model, *bench.shapes(model))
    if not config.pretrained:
        common.check(bench, model, plain, config.big)
    task = config.task.term(config.distill.chunked)
    for run in (config.prune.run, config.retrain):
        common.check(bench, model, config.distill.terms(task, run.steps), run, teacher=teacher)


def _augmentation(config: Config) -> list[str]:
    """A sentence for the report where the runs see differently augmented inputs: equal compute is not an equal recipe then."""

    def said(run: Run) -> str:
        plain = dataclasses.asdict(type(run.augment)())
        changed = {name: value for name, value in dataclasses.asdict(run.augment).items() if value != plain[name]}
        return (
            "with augmentation ({})".format(", ".join(f"{k}={v}" for k, v in changed.items()))
            if changed
            else "without augmentation"
        )

    first = "given as it is, trained elsewhere" if config.pretrained else f"trained {said(config.big)}"
    later = [said(config.prune.run), said(config.retrain)]
    if not config.pretrained and {*later} == {said(config.big)}:
        return []
    pruned = "" if later[0] == later[1] else f", and pruning went {later[0]}"
    return [f"The big model was {first}; the small model and the baselines were trained {later[1]}{pruned}."]


def _baseline(config: Config, bench: Bench, name: str, model: Any, start: Net | None, allowance: int) -> Net:
    """The small architecture trained on labels alone for as many FLOPs as `allowance`.

    From scratch it is given all that pruning and retraining took; from the compact parameters what retraining took.
    """
    shape = start or Net(model, *bench.shapes(model))
    steps = max(round(allowance / runs.step_flops(common.flops(bench, shape), 0, bench.data.batch)), 1)
    run = dataclasses.replace(config.retrain, steps=steps)
    spent = start.flops if start else 0
    plain = {"ce": (1.0, config.task.term(config.distill.chunked))}
    return common.train(bench, name, model, plain, run, start=start, spent=spent)


def _conclude(config: Config, bench: Bench, nets: dict[str, Net], measured: dict[str, Any], command: str) -> dict[str, Any]:
    """Writes the export, the results and the report."""
    workdir = bench.directory
    everything = {
        "title": config.title,
        "command": command,
        "seed": config.seed,
        **measured,
    }
    if "small" in nets:
        export = common.ship(
            bench,
            nets["small"],
            workdir / EXPORT,
            {"config": configs.fingerprint(config), "verdict": measured["verdict"]["verdict"]},
            config.model,
        )
        everything["files"] = {
            "export": str(export),
            "predict": f"python -m experiments.predict --model={export} --input=<new.npz>",
        }
    report.write(everything, workdir / REPORT)
    draft = workdir / f"{RESULTS}.tmp"
    draft.write_text(json.dumps(everything, indent=1), encoding="utf-8")
    draft.rename(workdir / RESULTS)
    return everything
