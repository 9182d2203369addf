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
from absl import logging

from bmjax import config as configs
from bmjax import data, distill, measure, prune, trace, trees
from bmjax.config import field, within
from bmjax.data import RecordLayout
from bmjax.distill.low_precision import size as count
from bmjax.jobs import architecture, cache, common, teachers
from bmjax.jobs.common import EXPORT, Net, Terms
from bmjax.jobs.teachers import MeanTeacher, Teacher
from bmjax.losses import Schedule, Task
from bmjax.models import Plain
from bmjax.train import cost
from bmjax.train.run import Bench, Run, start_key
from bmjax.types import Batch, LossTerm, View

RESULTS, TEST = "results.json", "test.npz"
Transform = Callable[[optax.GradientTransformation, int], optax.GradientTransformation]  # (optimiser, steps) -> optimiser


@dataclasses.dataclass
class Config:
    """One training."""

    seed: int = field(0, "of parameters, shuffling and augmentation", check=within(0, 2**32, open_high=True))
    machine: common.Machine = field(common.Machine(), "devices and logs")
    data: data.Data = field(data.Data(), "examples")
    model: Any = field(Plain(), "what is trained, or a function (shape, classes) -> Model", kinds=architecture.kinds())
    task: Task = field(Task(), "the loss against the labels")
    terms: dict[str, tuple[float | Schedule, LossTerm]] = field(
        {}, "your own loss terms, {name: (weight or schedule, term)}, added to the objective"
    )
    weights: dict[str, float] = field({}, "weights of loss terms by name, in place of those they come with, as in focal=0.1")
    run: Run = field(Run(), "how long, and with what optimiser")
    transform: Transform | list[Transform] | None = field(
        None, "your own (optimiser, steps) -> optimiser, one or a list in order; pruning comes after it"
    )
    views: list[View] = field([], "your own (params, opt_state, step) -> params: what the forward pass sees")
    prune: prune.Sparsity = field(prune.Sparsity(), "pruning of single weights")
    teacher: Teacher | MeanTeacher | None = field(
        None,
        "distillation; any flag below it turns it on; mean is the moving average of the student itself",
        kinds={"none": lambda: None, "teacher": Teacher, "mean": MeanTeacher},
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

        if isinstance(self.teacher, MeanTeacher) and self.run.ema:
            raise ValueError(
                f"run.ema is {self.run.ema} and teacher.decay {self.teacher.decay}, which are the decay of one moving average; "
                "leave run.ema out"
            )

    @property
    def fixed(self) -> Teacher | None:
        """The teacher that is not the student itself."""
        return self.teacher if isinstance(self.teacher, Teacher) else None

    @property
    def ships_last(self) -> bool:
        """Whether the last student is exported, and not all generations as one."""
        return self.fixed is None or self.fixed.export == "last"

    def origin(self, name: str) -> str:
        """Which parameters a result called `name` is of: "last step", "moving average", "pretrained", or "several networks"."""
        fixed = self.fixed
        if name in ("ensemble", "all teachers"):
            return "several networks"
        own = name.startswith("teacher") and fixed is not None
        if own and fixed is not None and fixed.folders:
            return "pretrained"
        run = fixed.run if own and fixed is not None and fixed.model is not None else self.run
        return "moving average" if run.ema or isinstance(self.teacher, MeanTeacher) else "last step"

    def wrap(
        self, tx: optax.GradientTransformation, steps: int, sides: Mapping[str, trace.Sides] | None = None
    ) -> optax.GradientTransformation:
        """The optimiser with the user's transforms and pruning, for a run of `steps` updates.

        Args:
            tx: the optimiser.
            steps: of the run.
            sides: which axes of the kernels are inputs and outputs, from `prune.sides`.

        Raises:
            ValueError: a transform returns no optax transform.
        """
        return self.prune.after(self.transformed(tx, steps), steps, seed=self.seed, sides=sides)

    def transformed(self, tx: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        """The optimiser with the user's transforms alone. Raises ValueError as `wrap`."""
        own = self.transform if isinstance(self.transform, list) else [self.transform] if self.transform else []
        for transform in own:
            tx = transform(tx, steps)
            if not (hasattr(tx, "init") and hasattr(tx, "update")):
                raise ValueError(f"config.transform returned {type(tx).__name__}; expected an optax transform")
        return tx

    def objective(self, layout: RecordLayout | None = None, layers: Mapping[str, str] | None = None) -> tuple[Terms, Terms]:
        """(the terms of labels alone, all terms that the model is trained on).

        Args:
            layout: of the teacher's cache.
            layers: {student's: teacher's}, where they were to be found first.

        Raises:
            ValueError: a term of the user's has the name of another, or a weight is given for no term.
        """
        task = self.task.term(self.teacher is not None and self.teacher.distill.chunked)
        plain = {"ce": (1.0, task)}
        whole = plain if self.teacher is None else self.teacher.terms(task, self.run.steps, layout, layers)
        if taken := set(whole) & set(self.terms):
            raise ValueError(f"config.terms has {sorted(taken)[0]!r}, which the objective has already; choose another name")
        terms = {**whole, **self.terms}
        if unknown := sorted(set(self.weights) - set(terms)):
            raise ValueError(f"config.weights names {unknown[0]!r}; the loss terms are {', '.join(terms)}")
        return plain, {name: (self.weights.get(name, weight), term) for name, (weight, term) in terms.items()}


def train(config: Config, workdir: pathlib.Path, command: str) -> dict[str, Any]:
    """Trains the teachers, if there are some, and the model; exports the model; returns {"models": [...]} with test metrics.

    Also writes the test split, raw, to test.npz: what experiments.predict can be tried on.

    Raises:
        ValueError: the config does not fit the data or the devices, the workdir holds another config's run, or training diverged.
    """
    with common.bench(config, workdir) as bench:
        if config.teacher is not None:
            bench = _taught(bench, config)
        model, tutor = architecture.build(config.model, bench.dataset), config.fixed
        bench, layout = _beside(bench, tutor) if tutor is not None and tutor.cached else (bench, None)
        plain, terms = config.objective(layout)
        how = _how(config, bench, model)
        first = None
        if tutor is not None and not tutor.cached:
            run = config.run if tutor.model is None else tutor.run
            first = teachers.prepare(bench, tutor, model, plain, run)
        common.check(bench, model, terms, config.run, teacher=first and first.whole, **how)
        if tutor is not None and tutor.generations > 1:
            own = teachers.lowered(bench, Net(model, *bench.shapes(model)), tutor.precision)
            common.check(bench, model, terms, config.run, teacher=own, **how)
        _check_pruning(config, bench.shapes(model)[0])
        common.record(config, bench, {} if tutor is None else _hashes(tutor))
        if tutor is not None and first is not None:
            first = teachers.train(bench, tutor, first, plain, run)
        students = _students(config, bench, model, layout, first and first.whole, how)
        shipped = list(students.values())[-1][0]
        common.ship(bench, shipped, workdir / EXPORT, _about(config), config.model)
        _write_test(bench, workdir / TEST)
        noted = cost.noted(workdir)
        rows = {**_rows_of_teachers(first), **students}
        results = {
            "command": command,
            "kind": bench.dataset.kind,
            "models": [
                {**_measured(bench, name, net, teacher), "weights": config.origin(name), "step": noted.get(name)}
                for name, (net, teacher) in rows.items()
            ],
            "dense": _dense(config, shipped.params),
            **_bigram(bench.dataset),
            "bytes_note": bench.dataset.bytes_note,
        }
        common.write_json(workdir / RESULTS, results)
        return results


def _taught(bench: Bench, config: Config) -> Bench:
    """The bench whose batches may hold no token that the distillation takes for padding; a teacher may have no row for it.

    Raises:
        ValueError: as `Distill.check_classes`.
    """
    settings, dataset = config.teacher.distill, bench.dataset  # type: ignore[union-attr]  # asked with a teacher only
    settings.check_classes(dataset)
    if not settings.teaches and not config.terms:
        logging.warning("distill.share and hint_weight are 0: the teacher teaches nothing")
    return dataclasses.replace(bench, dataset=dataset.within(settings.vocabulary) if settings.vocabulary else dataset)


def _hashes(tutor: Teacher) -> dict[str, str]:
    """{folder: SHA-256} of the exports that teach, or of the cache."""
    if tutor.cached:
        return {tutor.cached: cache.content(tutor.cached)}
    return {folder: common.identity(folder) for folder in tutor.folders}


def _how(config: Config, bench: Bench, model: Any) -> dict[str, Any]:
    """What a student's training takes beside its objective, as arguments of `common.train`."""
    tutor = config.fixed
    return {
        "wrap": functools.partial(config.wrap, sides=sides(config, model, bench.shapes(model), bench.example())),
        "views": (*config.views, *config.prune.views),  # masks come last, so that what is hidden is exactly zero
        "rollout": None if tutor is None else tutor.rollout.build(config.run.steps, tutor.distill.vocabulary or 0),
        "decay": config.teacher.decay if isinstance(config.teacher, MeanTeacher) else None,
    }


def _students(
    config: Config, bench: Bench, model: Any, layout: RecordLayout | None, teacher: Net | None, how: dict[str, Any]
) -> dict[str, tuple[Net, Net | None]]:
    """{name: (network, its teacher)} of the students of all generations, and last the one to export."""
    tutor, found = config.fixed, dict[str, tuple[Net, Net | None]]()
    count = 1 if tutor is None else tutor.generations
    last = "model" if config.teacher is None else "student"
    for generation, name in enumerate((*(f"generation {i}" for i in range(1, count)), last)):
        if tutor is not None and generation > 0:
            teacher = teachers.lowered(bench, found[list(found)[-1]][0], tutor.precision)
        layers = None
        if tutor is not None and teacher is not None and tutor.distill.seeks:
            layers = _most_alike(bench, name, model, teacher, tutor.distill.part)
        terms = config.objective(layout, layers)[1]
        net = common.train(bench, name, model, terms, config.run, teacher=teacher, **how)
        found[name] = net, teacher
    if not config.ships_last:
        nets = [net for net, _ in found.values()]
        found["ensemble"] = teachers.ensemble(nets), found["generation 1"][1]
    return found


def _rows_of_teachers(found: teachers.Teachers | None) -> dict[str, tuple[Net, Net | None]]:
    if found is None:
        return {}
    together = {"all teachers": found.whole} if len(found.members) > 1 else {}
    return {name: (net, found.whole) for name, net in {**found.members, **together}.items()}


def _about(config: Config) -> dict[str, Any]:
    """What the export says of its making."""
    name = "student" if config.ships_last else "ensemble"
    return {"config": configs.fingerprint(config), "weights": config.origin(name)}


def sides(config: Config, model: Any, shapes: tuple[Any, Any], example: Batch) -> dict[str, trace.Sides] | None:
    """Inputs and outputs of the kernels to prune, where they matter; `shapes` are abstract (params, model_state).

    Raises:
        ValueError: as `prune.Sparsity.sides`.
    """
    if not config.prune.sided:
        return None
    params, abstract = shapes
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    return config.prune.sides(lambda p, batch: model.apply(p, state, batch)[0].logits, params, dict(example))


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


def _dense(config: Config, params: Any) -> list[dict[str, Any]]:
    """Parameters that pruning left out, and why; none if nothing is pruned."""
    if not config.prune.works:
        return []
    rows = prune.overview(params, config.prune.where or None)
    return [{"path": row.path, "size": row.size, "why": row.note} for row in rows if row.note != "pruned"]


def _beside(bench: Bench, tutor: Teacher) -> tuple[Bench, RecordLayout]:
    """The bench with the teacher's cached outputs in its batches. Raises ValueError as `cache.beside`."""
    return cache.beside(bench, tutor.cached, k=tutor.k, teacher=tutor.pretrained)


def _most_alike(bench: Bench, name: str, model: Any, teacher: Net, part: str) -> dict[str, str]:
    """{student's: teacher's} layers, by the batch's first sight of them: that of the parameters that the run starts from."""
    key = start_key(bench, name)
    params, model_state = jax.jit(model.init)(key, bench.example())
    found = distill.auto(model, teacher.model, params, teacher.frozen, bench.example(), model_state=model_state, part=part)
    logging.info("the layers most alike: %s", ", ".join(f"{mine} -> {theirs}" for mine, theirs in found.items()))
    return found


def _measured(bench: Bench, name: str, net: Net, teacher: Net | None) -> dict[str, Any]:
    """The figures of one model: the test split's under "metrics", and those to choose by under "valid"."""
    kernels = [leaf for path, leaf in trees.paths(net.params).items() if path.endswith("kernel")]
    zeros = sum(int(np.sum(np.asarray(leaf) == 0)) for leaf in kernels)
    return {
        "name": name,
        **common.scores(common.evaluate(bench, net, bench.dataset.test, teacher)),
        "valid": common.scalars(common.evaluate(bench, net, bench.dataset.valid).summary),
        "parameters": count(net.params),
        "bytes": trees.nbytes(net.params),
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
