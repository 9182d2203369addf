"""The teachers of a training: what a config says of them, and the networks that come of it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from bmjax import distill, parallel
from bmjax.config import at_least, field
from bmjax.data import RecordLayout
from bmjax.distill import Distill, Rollouts, cached_terms, low_precision, off_policy
from bmjax.distill.low_precision import PRECISIONS
from bmjax.distill.teachers import CHOICES, SPACES
from bmjax.jobs import architecture, common
from bmjax.jobs.common import Net, Terms
from bmjax.train import run as runs
from bmjax.train.run import Bench, Run
from bmjax.types import LossTerm


@dataclasses.dataclass
class Teacher:
    """A teacher, and what is learned from it. From the command line: `--config.teacher.pretrained=<folder>` is enough."""

    model: Any = field(
        None,
        "the teacher's architecture; none takes the pretrained export's own, or, with generations, the student's",
        kinds=architecture.optional_kinds(),
    )
    pretrained: str = field(
        "", "export (or workdir) with its parameters, or several with commas between; empty trains it first, on the same data"
    )
    cached: str = field(
        "", "its outputs by experiments.cache_teacher: no teacher runs, and `pretrained` only says whose they are"
    )
    k: int = field(0, "cached: log-probabilities that each item must have; 0 takes what is there", check=at_least(0))
    run: Run = field(Run(), "training of the teacher, where it has a model and is not pretrained")
    distill: Distill = field(Distill(), "how the student learns from it")
    rollout: Rollouts = field(Rollouts(), "learning on what the student writes itself")
    copies: int = field(1, "train so many teachers, each from its own random numbers", check=at_least(1))
    combine: str = field(
        "probability",
        "several teachers: what is averaged, at the temperature that the loss begins with, or who is chosen for each item: "
        "the one of least entropy, or of least error",
        choices=(*SPACES, *CHOICES),
    )
    weights: tuple[float, ...] = field((), "several teachers: one for each in their average; empty weighs all alike")
    precision: str = field(
        "float32", "in which the teacher is kept and run, once it is trained", choices=("float32", *PRECISIONS)
    )
    generations: int = field(
        1, "students one after the other, each taught by the one before it, the first by the teacher", check=at_least(1)
    )
    export: str = field("last", "generations: which is exported, or all of them as one", choices=("last", "ensemble"))

    def validate(self) -> None:
        """Raises ValueError where there is nothing to make a teacher of, or two things that do not go together."""
        if self.model is None and not self.pretrained and not self.cached and self.generations == 1:
            raise ValueError("a teacher needs pretrained=<export or workdir>, or a model to train first, as in model=Residual")
        if self.model is not None and self.cached:
            raise ValueError("cached and model are two ways to have a teacher; give one of them")
        if self.k and not self.cached:
            raise ValueError(f"k is {self.k}, which is of cached outputs; give cached=<folder>, or leave k out")
        if self.cached and (self.copies, self.precision, self.generations) != (1, "float32", 1):
            raise ValueError("cached outputs come from one teacher that does not run; leave copies, precision, generations out")
        if self.rollout.on and self.cached:
            raise ValueError("cached outputs are of the data's tokens; for a rollout give a teacher that runs, or fraction=0")
        if self.pretrained and self.copies > 1:
            raise ValueError("copies are teachers to be trained, and pretrained ones need no training; give one of the two")
        if self.weights and len(self.weights) != self.number:
            raise ValueError(f"weights has {len(self.weights)} numbers for {self.number} teachers; give one for each")
        if self.weights and self.combine in CHOICES:
            raise ValueError(f"weights and combine={self.combine} are two ways to weigh the teachers; give one of them")
        if self.number == 1 and (self.weights or self.combine != "probability"):
            raise ValueError("weights and combine are of several teachers, and there is one; give copies, or leave them out")
        if self.number > 1 and self.distill.chunked and self.combine != "logits":
            raise ValueError(
                f"a chunked loss needs one head, and several teachers with combine={self.combine} have none; set combine to "
                "logits, or distill.chunked to False"
            )
        # With a model both may come from a preset, and its `pretrained` from a flag.
        if self.model is None and self.run != Run():
            raise ValueError("run trains a teacher from its model, and none is given; give model, or leave run out")
        if self.export != "last" and self.generations == 1:
            raise ValueError("export=ensemble is of several generations; set generations to 2 or more")

    @property
    def folders(self) -> tuple[str, ...]:
        """The exports to load; a path that holds a comma and is there counts as one."""
        if pathlib.Path(self.pretrained).expanduser().exists():
            return (self.pretrained,) if self.pretrained else ()
        return tuple(part.strip() for part in self.pretrained.split(",") if part.strip())

    @property
    def number(self) -> int:
        """How many teachers there are."""
        return len(self.folders) or self.copies

    def terms(self, task: LossTerm, steps: int, layout: RecordLayout | None, layers: Mapping[str, str] | None = None) -> Terms:
        """The terms of a student's objective; `layers` as in `Distill.terms`, of which labels see no sampled tokens.

        Raises:
            ValueError: as `distill.cached_terms`, given a cache's layout.
        """
        if layout is not None:
            return cached_terms(self.distill, task, layout, steps)
        return self.distill.terms(off_policy(task) if self.rollout.on else task, steps, layers)


@dataclasses.dataclass
class MeanTeacher:
    """The moving average of the student teaches it; it is what is evaluated and exported."""

    decay: float = field(0.99, "of the moving average", check=(lambda value: 0 < value < 1, "above 0 and below 1, such as 0.999"))
    distill: Distill = field(Distill(share=0.9, temperature=1.0, loss="consistency"), "how the student learns from its average")

    def validate(self) -> None:
        """Raises ValueError if the layers most alike are sought in one network."""
        if self.distill.layers == "auto":
            raise ValueError("distill.layers is auto, and a moving average has the student's own layers; take uniform")

    def terms(self, task: LossTerm, steps: int, layout: RecordLayout | None, layers: Mapping[str, str] | None = None) -> Terms:
        """The terms of the objective; the layers of one network are compared with themselves."""
        return self.distill.terms(task, steps, layers)


class Teachers(NamedTuple):
    """Networks by the names of their runs, and all of them as the step takes them."""

    members: dict[str, Net]
    whole: Net


def prepare(bench: Bench, tutor: Teacher, model: Any, plain: Terms, run: Run) -> Teachers:
    """The teachers from their exports; their shapes alone, checked, where they are still to be trained.

    Args:
        bench: where.
        tutor: the config.
        model: the student's network, which is the first generation's teacher too where the config names no other.
        plain: {name: (weight, term)} that a teacher is trained on.
        run: the training of a teacher.

    Raises:
        ValueError: as `common.load` and `common.check`.
    """
    if tutor.folders:
        vocabulary = tutor.distill.vocabulary or 0
        loaded = [common.load(bench, tutor.model, folder, vocabulary=vocabulary) for folder in tutor.folders]
        return _together(bench, tutor, dict(zip(_names(len(loaded)), loaded)))
    own = model if tutor.model is None else architecture.build(tutor.model, bench.dataset)
    net = Net(own, *bench.shapes(own))
    common.check(bench, net.model, plain, run)
    return _together(bench, tutor, dict.fromkeys(_names(tutor.copies), net))


def train(bench: Bench, tutor: Teacher, teachers: Teachers, plain: Terms, run: Run) -> Teachers:
    """Trains those that `prepare` knows the shapes of; the rest is as it was."""
    if tutor.folders:
        return teachers
    found = {}
    for name, net in teachers.members.items():
        model = net.model if tutor.precision == "float32" else net.model.model  # trained in full
        found[name] = common.train(bench, name, model, plain, run)
    return _together(bench, tutor, found)


def lowered(bench: Bench, net: Net, precision: str) -> Net:
    """The network in fewer bits, each device converting its own part; as it is for "float32". Its arrays may be abstract."""
    if precision == "float32":
        return net
    small, example = low_precision(net.model, precision), dict(bench.example())
    convert = lambda params: small.convert(params, example)
    shapes = jax.eval_shape(convert, net.params)
    if isinstance(jax.tree.leaves(net.params)[0], jax.ShapeDtypeStruct):
        return net._replace(model=small, params=shapes)
    placed = parallel.partition(shapes, runs.rules_of(small), bench.mesh)
    return net._replace(model=small, params=jax.jit(convert, out_shardings=placed)(net.params))


def ensemble(nets: list[Net], **how: Any) -> Net:
    """Networks as one. Arguments as `distill.ensemble`; it costs what they cost together."""
    model = distill.ensemble([net.model for net in nets], **how)
    params, state = ({str(i): part(net) for i, net in enumerate(nets)} for part in (lambda n: n.params, lambda n: n.model_state))
    return Net(model, params, state, sum(net.steps for net in nets), sum(net.flops for net in nets))


def _names(number: int) -> list[str]:
    return ["teacher", *(f"teacher {i}" for i in range(2, number + 1))]


def _softened(net: Net, temperature: float) -> Net:
    """An ensemble averages softened probabilities, exported as one or given as several; any other network as it is."""
    if isinstance(net.model, distill.OfClasses):
        inner = _softened(net._replace(model=net.model.model), temperature)
        return net._replace(model=dataclasses.replace(net.model, model=inner.model))
    if not isinstance(net.model, distill.Ensemble):
        return net
    return net._replace(model=dataclasses.replace(net.model, temperature=temperature))


def _together(bench: Bench, tutor: Teacher, members: dict[str, Net]) -> Teachers:
    softened = {name: _softened(net, tutor.distill.temperature) for name, net in members.items()}
    found = {name: lowered(bench, net, tutor.precision) for name, net in softened.items()}
    if len(found) == 1:
        return Teachers(found, *found.values())
    how = {"choose": tutor.combine} if tutor.combine in CHOICES else {"space": tutor.combine}
    whole = ensemble(list(found.values()), weights=tutor.weights or None, temperature=tutor.distill.temperature, **how)
    return Teachers(found, whole)
