"""Training alone: dense or pruned, from labels or from a teacher; ends with the test split's metrics and an exported file."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from bmjax import config as configs
from bmjax import data, measure, prune, trees
from bmjax.config import field, within
from bmjax.distill import Distill
from bmjax.jobs import architecture, common
from bmjax.jobs.common import EXPORT, Net, Terms
from bmjax.losses import Task
from bmjax.models import Plain
from bmjax.train.run import Bench, Run
from bmjax.types import LossTerm, View

RESULTS, TEST = "results.json", "test.npz"
Transform = Callable[[optax.GradientTransformation, int], optax.GradientTransformation]  # (optimiser, steps) -> optimiser


@dataclasses.dataclass
class Teacher:
    """A teacher, and what is learned from it. From the command line: `--config.teacher.pretrained=<folder>` is enough."""

    model: Any = field(
        None, "the teacher's architecture; none takes the pretrained export's own", kinds=architecture.optional_kinds()
    )
    pretrained: str = field("", "export (or workdir) with its parameters; empty trains it first, on the same data")
    run: Run = field(Run(), "training of the teacher")
    distill: Distill = field(Distill(), "how the student learns from it")

    def validate(self) -> None:
        """Raises ValueError where there is nothing to make a teacher of."""
        if self.model is None and not self.pretrained:
            raise ValueError("a teacher needs pretrained=<export or workdir>, or a model to train first, as in model=Residual")


@dataclasses.dataclass
class Config:
    """One training."""

    seed: int = field(0, "of parameters, shuffling and augmentation", check=within(0, 2**32, open_high=True))
    machine: common.Machine = field(common.Machine(), "devices and logs")
    data: data.Data = field(data.Data(), "examples")
    model: Any = field(Plain(), "what is trained, or a function (shape, classes) -> Model", kinds=architecture.kinds())
    task: Task = field(Task(), "the loss against the labels")
    terms: dict[str, tuple[float, LossTerm]] = field({}, "your own loss terms, {name: (weight, term)}, added to the objective")
    weights: dict[str, float] = field({}, "weights of loss terms by name, in place of those they come with, as in focal=0.1")
    run: Run = field(Run(), "how long, and with what optimiser")
    transform: Transform | list[Transform] | None = field(
        None, "your own (optimiser, steps) -> optimiser, one or a list in order; pruning comes after it"
    )
    views: list[View] = field([], "your own (params, opt_state, step) -> params: what the forward pass sees")
    prune: prune.Sparsity = field(prune.Sparsity(), "pruning of single weights")
    teacher: Teacher | None = field(
        None, "distillation; any flag below it turns it on", kinds={"none": lambda: None, "teacher": Teacher}
    )
    predict: bool = field(False, "run the exported file on the test split with experiments.predict, and write predictions.csv")
    code: dict[str, str] = configs.recorded("SHA-256 of the config file and of the modules beside it that it imports")

    def validate(self) -> None:
        """Raises ValueError if a function of the user's takes other arguments than it will be called with."""
        own = self.transform if isinstance(self.transform, list) else [self.transform]
        functions: list[tuple[str, Any, tuple[str, ...]]] = [("transform", one, ("optimiser", "steps")) for one in own]
        functions += [("views", view, ("params", "opt_state", "step")) for view in self.views]
        functions += [("model", self.model, ("shape", "classes"))] if not hasattr(self.model, "build") else []
        functions += [(f"terms[{name!r}]", term, ("student", "teacher", "batch")) for name, (_, term) in self.terms.items()]
        functions += [("data.source", self.data.source, ())]
        for where, function, arguments in functions:
            if callable(function) and (wrong := configs.misfit(function, arguments)):
                raise ValueError(f"config.{where}: {wrong}")

    def wrap(
        self, tx: optax.GradientTransformation, steps: int, axes: Mapping[str, int] | None = None
    ) -> optax.GradientTransformation:
        """The optimiser with the user's transforms and pruning, for a run of `steps` updates.

        Args:
            tx: the optimiser.
            steps: of the run.
            axes: {kernel: the axis that an n:m pattern runs along}, from `prune.axes`.

        Raises:
            ValueError: a transform returns no optax transform.
        """
        return self.prune.after(self.transformed(tx, steps), steps, seed=self.seed, axes=axes)

    def transformed(self, tx: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        """The optimiser with the user's transforms alone. Raises ValueError as `wrap`."""
        own = self.transform if isinstance(self.transform, list) else [self.transform] if self.transform else []
        for transform in own:
            tx = transform(tx, steps)
            if not (hasattr(tx, "init") and hasattr(tx, "update")):
                raise ValueError(f"config.transform returned {type(tx).__name__}; expected an optax transform")
        return tx

    def objective(self) -> tuple[Terms, Terms]:
        """(the terms of labels alone, all terms that the model is trained on).

        Raises:
            ValueError: a term of the user's has the name of another, or a weight is given for no term.
        """
        plain = {"ce": (1.0, self.task.term())}
        whole = plain if self.teacher is None else self.teacher.distill.terms(self.task.term())
        if taken := set(whole) & set(self.terms):
            raise ValueError(f"config.terms has {sorted(taken)[0]!r}, which the objective has already; choose another name")
        terms = {**whole, **self.terms}
        if unknown := sorted(set(self.weights) - set(terms)):
            raise ValueError(f"config.weights names {unknown[0]!r}; the loss terms are {', '.join(terms)}")
        return plain, {name: (self.weights.get(name, weight), term) for name, (weight, term) in terms.items()}


def train(config: Config, workdir: pathlib.Path, command: str) -> dict[str, Any]:
    """Trains the teacher, if there is one, and the model; exports the model; returns {"models": [...]} with test metrics.

    Also writes the test split, raw, to test.npz: what experiments.predict can be tried on.

    Raises:
        ValueError: the config does not fit the data or the devices, the workdir holds another config's run, or training diverged.
    """
    with common.bench(config, workdir) as bench:
        model, tutor = architecture.build(config.model, bench.dataset), config.teacher
        plain, terms = config.objective()
        name = "model" if tutor is None else "student"
        views = (*config.views, *config.prune.views)  # masks come last, so that what is hidden is exactly zero
        wrap = functools.partial(config.wrap, axes=_axes(config, bench, model))
        teacher = None if tutor is None else _teacher(bench, tutor, plain)
        common.check(bench, model, terms, config.run, teacher=teacher, wrap=wrap, views=views)
        _check_pruning(config, bench.shapes(model)[0])
        common.record(config, bench)
        if tutor is not None and teacher is not None and not tutor.pretrained:
            teacher = common.train(bench, "teacher", teacher.model, plain, tutor.run)
        net = common.train(bench, name, model, terms, config.run, teacher=teacher, wrap=wrap, views=views)
        nets = {name: net} if teacher is None else {"teacher": teacher, name: net}
        common.ship(bench, net, workdir / EXPORT, {"config": configs.fingerprint(config)}, config.model)
        _write_test(bench, workdir / TEST)
        results = {
            "command": command,
            "kind": bench.dataset.kind,
            "models": [_measured(bench, name, net, teacher) for name, net in nets.items()],
            **_bigram(bench.dataset),
            "bytes_note": bench.dataset.bytes_note,
        }
        common.write_json(workdir / RESULTS, results)
        return results


def _axes(config: Config, bench: Bench, model: Any) -> dict[str, int] | None:
    """{kernel: the axis that the layer contracts} for an n:m pattern. Raises ValueError as `prune.Sparsity.axes`."""
    if not config.prune.neighbours:
        return None
    params, abstract = bench.shapes(model)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    return config.prune.axes(lambda p, batch: model.apply(p, state, batch)[0].logits, params, dict(bench.example()))


def _check_pruning(config: Config, params: Any) -> None:
    """Raises ValueError if both the user's transforms and the config prune: their sparsities would not add up to either."""
    if not config.prune.works:
        return
    own = config.transformed(config.run.optimizer.build(config.run.steps), config.run.steps)
    if prune.prunes(jax.eval_shape(own.init, params)):
        raise ValueError(
            f"config.transform prunes already, and config.prune.sparsity is {config.prune.sparsity:g}; set one of them "
            "(a criterion of your own can be config.prune.criterion)"
        )


def _teacher(bench: Bench, tutor: Teacher, plain: Terms) -> Net:
    """The teacher from its export; its shapes alone, checked, where it is still to be trained."""
    model: Any = None if tutor.model is None else architecture.build(tutor.model, bench.dataset)
    if tutor.pretrained:
        return common.load(bench, model, tutor.pretrained)
    common.check(bench, model, plain, tutor.run)
    return Net(model, *bench.shapes(model))


def _measured(bench: Bench, name: str, net: Net, teacher: Net | None) -> dict[str, Any]:
    """The figures of one model: the test split's under "metrics", and those to choose by under "valid"."""
    kernels = [leaf for path, leaf in trees.paths(net.params).items() if path.endswith("kernel")]
    zeros = sum(int(np.sum(np.asarray(leaf) == 0)) for leaf in kernels)
    return {
        "name": name,
        **common.scores(common.evaluate(bench, net, bench.dataset.test, teacher)),
        "valid": common.scalars(common.evaluate(bench, net, bench.dataset.valid).summary),
        "parameters": trees.size(net.params),
        "sparsity": zeros / max(trees.size(kernels), 1),
        "train_steps": net.steps,
    }


def _bigram(dataset: data.Dataset) -> dict[str, float | None]:
    """{"bigram_bits", "bigram_bits_per_byte"} on the test split of the bigram model of the train split: what a language model
    must beat. The first is a token's; None for vocabularies of which most pairs are never seen.
    """
    if dataset.kind != "tokens" or dataset.classes > 4096:
        return {"bigram_bits": None, "bigram_bits_per_byte": None}
    train, test = (_pairs(split) for split in (dataset.train, dataset.test))
    bits, text_bytes = measure.bigram_bits(train, test, dataset.classes), dataset.test.text_bytes
    return {"bigram_bits": bits, "bigram_bits_per_byte": bits * len(test) / text_bytes if text_bytes else None}


def _pairs(split: data.Split) -> np.ndarray:
    """Every input beside its target, ints [tokens, 2]: all that a model is asked, without padding and across no border."""
    pairs = np.stack([split.inputs.reshape(-1), split.targets.reshape(-1)], axis=1)
    weights = split.extra.get("weights")
    return pairs if weights is None else pairs[np.broadcast_to(weights > 0, split.targets.shape).reshape(-1)]


def _write_test(bench: Bench, path: pathlib.Path) -> None:
    split = bench.dataset.test
    arrays: dict[str, Any] = {**split.extra, "inputs": bench.dataset.raw(split), "targets": split.targets}
    np.savez(path, **arrays)
