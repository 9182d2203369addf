"""The main job: how small can this model get without getting worse?

big model -> analyse -> propose sizes -> prune with distillation at fixed shapes -> choose on validation -> compact once ->
retrain -> verdict on the test split, once -> measure -> baselines of equal compute -> export -> report. Every stage resumes.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from bmjax import deploy, distill, losses, measure, prune, report, shrink, trace, trees
from bmjax import data as datasets
from bmjax.config import above, at_least, field, within
from bmjax.jobs import common, results
from bmjax.jobs.proposals import Proposal, propose
from bmjax.models import Residual
from bmjax.train import run as runs
from bmjax.train.run import Bench, Run
from bmjax.train.step import Problem
from bmjax.types import Group, Params


@dataclasses.dataclass
class Budget:
    """What may be lost, and how sure the verdict is."""

    max_drop: float = field(0.02, "largest allowed drop of test accuracy, as a fraction", check=within(0.001, 0.5))
    level: float = field(0.05, "chance to call a model not worse that is", check=within(0.0001, 0.5))
    ratios: tuple[float, ...] = field(
        (10.0, 20.0, 40.0), "times fewer parameters to try, rising", check=(lambda v: v and min(v) > 1, "above 1")
    )


@dataclasses.dataclass
class Pruning:
    """Structured pruning at fixed shapes."""

    run: Run = field(Run(), "the pruning run")
    begin: float = field(0.0, "fraction of the steps after which pruning begins", check=within(0, 1))
    end: float = field(0.6, "fraction of the steps after which the target is reached", check=within(0, 1))
    interval: int = field(10, "steps between new masks", check=at_least(1))

    def validate(self) -> None:
        """Raises ValueError if the end is not behind the begin."""
        if self.begin >= self.end:
            raise ValueError(f"begin {self.begin} is not before end {self.end}")


@dataclasses.dataclass
class Latency:
    """How latency is measured."""

    batch: int = field(256, "examples a call", check=at_least(64))
    repeats: int = field(15, "interleaved timings of each model", check=at_least(5))


@dataclasses.dataclass
class Config:
    """The main job."""

    seed: int = field(0, "of parameters, shuffling and augmentation", check=(lambda v: 0 <= v < 2**32, "in [0, 2^32)"))
    machine: common.Machine = field(common.Machine(), "devices and logs")
    data: datasets.Data = field(datasets.Data(), "examples")
    model: Any = field(Residual(), "the big model; the preset chooses its kind")
    pretrained: str = field("", "folder of an export to take the big model's parameters from, instead of training it")
    task: losses.Task = field(losses.Task(), "the loss against the labels")
    distill: distill.Distill = field(distill.Distill(), "what the small model learns from the big one")
    big: Run = field(Run(), "training of the big model")
    prune: Pruning = field(Pruning(), "pruning")
    retrain: Run = field(Run(), "training of the compact model")
    budget: Budget = field(Budget(), "what counts as not worse")
    latency: Latency = field(Latency(), "timing")


class Net(NamedTuple):
    """A model with its trained parameters."""

    model: Any
    params: Params
    model_state: Params

    @property
    def frozen(self) -> dict[str, Params]:
        """As the step takes a teacher."""
        return {"params": self.params, "model_state": self.model_state}


class Spent(NamedTuple):
    """What a training run cost."""

    steps: int
    flops: int


def compress(config: Config, workdir: pathlib.Path, command: str) -> dict[str, Any]:
    """Runs the whole job, or goes on with it; returns the results that report.html shows.

    Raises:
        ValueError: the config does not fit the data or the devices, the workdir holds another config's run, or training diverged.
    """
    with common.bench(config, workdir) as bench:
        model = config.model.build(bench.dataset.shape, bench.dataset.classes)
        job = _Job(config, bench, command)
        big, spent_big = job.big(model)
        analysis = job.analyse(big)
        candidates, chosen = job.search(big, analysis)
        nets, spent, structure = {"big": big}, {"big": spent_big}, None
        if chosen is not None:
            compact, structure = job.compact(big, chosen, analysis)
            nets["small"], spent["small"] = job.retrain(compact, big, job.pruning_cost(big))
            for name, start in (("from scratch", None), ("without teacher", compact.params)):
                nets[name], spent[name] = job.baseline(name, compact, start, spent)
        return job.conclude(nets, spent, candidates, structure)


class Analysis(NamedTuple):
    """What can be removed from the big model.

    Attributes:
        groups: exact groups of axes that the model can be resized along.
        importance: [layers] 1 - cosine of what each layer changes; empty without a stack of layers.
        left_out: {group name: why it is not pruned}.
    """

    groups: tuple[Group, ...]
    importance: np.ndarray
    left_out: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Job:
    """The stages; each is a method of what earlier ones returned."""

    config: Config
    bench: Bench
    command: str

    @property
    def _stages(self) -> pathlib.Path:
        return self.bench.directory / "stages"

    def big(self, model: Any) -> tuple[Net, Spent]:
        """Trains the big model, or takes it from an export."""
        config, run = self.config, self.config.big
        problem = Problem(model, {"ce": (1.0, config.task.term())}, run.optimizer.build(run.steps), accumulate=run.accumulate)
        if not config.pretrained:
            net = self._fit("big", problem, run)
            return net, Spent(run.steps, run.steps * runs.step_flops(self._flops(net), 0, config.data.batch))
        params = deploy.load_params(config.pretrained)
        expected = jax.eval_shape(model.init, jax.random.key(0), self.bench.example())[0]
        if misfit := trees.first_difference(expected, params):
            raise ValueError(f"{config.pretrained} does not fit the model: {misfit}")
        state = runs.place(self.bench, problem, params)
        return Net(model, state.params["model"], state.model_state), Spent(0, 0)

    def analyse(self, big: Net) -> Analysis:
        """Finds the exact groups by replaying the jaxpr, and how much each layer changes on the training data."""
        host = jax.device_get(big.params)
        inputs = np.zeros((3, *self.bench.dataset.shape), np.float32)
        found = trace.groups(_logits(big.model), host, inputs, names=big.model.axes)
        resizable = [group for group in found if group.name in big.model.axes]
        groups = tuple(group for group in resizable if not group.note)
        if not groups:
            raise ValueError("no axis of this model can be removed exactly: " + "; ".join(f"{g.name}: {g.note}" for g in found))
        importance = _importance(big, host, self.bench.dataset.train) if any(g.name == "layers" for g in groups) else np.zeros(0)
        for group in groups:
            logging.info("can shrink: %s, %d elements%s", group.name, group.size, " in each layer" if group.stack else "")
        return Analysis(groups, importance, {group.name: group.note for group in resizable if group.note})

    def search(self, big: Net, analysis: Analysis) -> tuple[list[dict[str, Any]], tuple[Proposal, Net, dict[str, Any]] | None]:
        """Prunes to each proposal in turn, mildest first, until one no longer holds on the validation split.

        A candidate holds if it loses at most half of the allowed drop there: one at the edge of the budget would pass the
        test only by luck.
        """
        bench, dataset = self.bench, self.bench.dataset
        whole = {group.name: group.size for group in analysis.groups}
        reference = runs.evaluate(bench, runs.predictor(big.model), *big[1:], dataset.valid).summary["accuracy"]
        tried, chosen = [], None
        for proposal in propose(big.model, whole, self.config.budget.ratios, dataset.shape):
            net, keeps = self._prune(big, analysis, proposal)
            found = runs.evaluate(bench, runs.predictor(net.model), *net[1:], dataset.valid).summary
            drop = reference - found["accuracy"]
            holds = drop <= self.config.budget.max_drop / 2
            tried.append(
                {
                    "sizes": proposal.sizes,
                    "parameters": proposal.parameters,
                    "valid_accuracy": found["accuracy"],
                    "valid_drop": drop,
                    "holds": holds,
                    "chosen": False,
                }
            )
            logging.info("%s: validation drop %+.4f, %s", proposal.sizes, drop, "holds" if holds else "does not hold")
            if not holds:
                break
            chosen = (proposal, net, keeps)
        if chosen is not None:
            next(entry for entry in tried if entry["sizes"] == chosen[0].sizes)["chosen"] = True
        return tried, chosen

    def _prune(self, big: Net, analysis: Analysis, proposal: Proposal) -> tuple[Net, dict[str, Any]]:
        config, run = self.config.prune, self.config.prune.run
        sparsity = {group.name: 1 - proposal.sizes[group.name] / group.size for group in analysis.groups}
        criterion = prune.magnitude()
        if "layers" in sparsity:
            criterion = prune.given({"layers": jnp.asarray(analysis.importance)}, otherwise=criterion)
        tx = prune.around(
            run.optimizer.build(run.steps),
            criterion,
            sparsity=sparsity,
            pattern=prune.groups(analysis.groups),
            schedule=prune.cubic(int(config.begin * run.steps), max(int(config.end * run.steps), 1)),
            every=config.interval,
        )
        problem = self._distilled(big.model, big, tx, run)
        state = runs.fit(self.bench, f"prune {proposal.ratio:g}x", problem, run, params=big.params, frozen=big.frozen)
        keeps = {name: np.asarray(keep) for name, keep in jax.device_get(prune.keeps(state.opt_state["model"])).items()}
        return Net(big.model, state.params["model"], state.model_state), keeps

    def compact(self, big: Net, chosen: tuple[Proposal, Net, dict[str, Any]], analysis: Analysis) -> tuple[Net, dict[str, Any]]:
        """Cuts the dropped parts away and checks that nothing else changed."""
        _, masked, keeps = chosen
        params = jax.device_get(masked.params)
        sizes = shrink.sizes(analysis.groups, keeps)
        small, small_params = big.model.resize(sizes), shrink.compact(params, analysis.groups, keeps)
        inputs = self.bench.dataset.valid.inputs
        gap = shrink.verify(jax.jit(_logits(big.model)), params, jax.jit(_logits(small)), small_params, inputs)
        logging.info("compact: %s; outputs differ from the masked model's by %.1e", sizes, gap)
        structure = results.structure(analysis.groups, keeps, analysis.importance, analysis.left_out)
        return Net(small, small_params, masked.model_state), structure

    def retrain(self, compact: Net, big: Net, pruned: int) -> tuple[Net, Spent]:
        """Trains the compact model on, still with the original as its teacher."""
        run = self.config.retrain
        problem = self._distilled(compact.model, big, run.optimizer.build(run.steps), run)
        net = self._fit("retrain", problem, run, params=compact.params, frozen=big.frozen)
        cost = run.steps * runs.step_flops(self._flops(net), self._flops(big), self.config.data.batch)
        return net, Spent(self.config.prune.run.steps + run.steps, pruned + cost)

    def pruning_cost(self, big: Net) -> int:
        """FLOPs of one pruning run."""
        flops = self._flops(big)
        return self.config.prune.run.steps * runs.step_flops(flops, flops, self.config.data.batch)

    def baseline(self, name: str, compact: Net, params: Params | None, spent: Mapping[str, Spent]) -> tuple[Net, Spent]:
        """The small architecture trained on labels alone, for as many FLOPs as the small model had.

        From scratch it gets all that pruning and retraining cost; from the compact parameters what retraining cost.
        """
        step = runs.step_flops(self._flops(compact), 0, self.config.data.batch)
        allowance = spent["small"].flops - (0 if params is None else spent["pruning"].flops)
        steps = max(allowance // step, 1)
        run = dataclasses.replace(self.config.retrain, steps=steps)
        problem = Problem(
            compact.model, {"ce": (1.0, self.config.task.term())}, run.optimizer.build(steps), accumulate=run.accumulate
        )
        net = self._fit(name, problem, run, params=params)
        return net, Spent(steps, steps * step)

    def conclude(
        self, nets: dict[str, Net], spent: dict[str, Spent], candidates: list[dict[str, Any]], structure: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The test split, once; then costs, the export and the report."""
        raise NotImplementedError
