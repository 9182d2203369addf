"""The search for the smallest network that holds: analyse, prune with distillation, choose on validation, compact."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from bmjax import data, prune, shrink, trace
from bmjax.config import above, at_least, field, within
from bmjax.jobs import common
from bmjax.jobs.common import Net, Terms
from bmjax.jobs.proposals import Proposal, propose
from bmjax.prune.curves import curve
from bmjax.train import run as runs
from bmjax.train.run import Bench, Run
from bmjax.types import Group, Params

SENSITIVITY = "sensitivity.json"
SPARSITIES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.9375, 0.97, 1 - 2**-20)  # the last leaves one element
EXAMPLES = 2048  # of the validation split, at most, at each point of a curve


@dataclasses.dataclass
class Pruning:
    """Structured pruning at fixed shapes."""

    ratios: tuple[float, ...] = field(
        (10.0, 20.0, 40.0), "times fewer parameters to try, mildest first", check=(lambda v: v and min(v) > 1, "above 1")
    )
    run: Run = field(Run(), "the pruning run")
    begin: float = field(0.0, "fraction of the steps after which pruning begins", check=within(0, 1))
    end: float = field(0.6, "fraction of the steps after which the target is reached", check=above(0))
    interval: int = field(10, "steps between new masks", check=at_least(1))

    def validate(self) -> None:
        """Raises ValueError if pruning does not end after it begins and before the run does."""
        if not self.begin < self.end <= 1:
            raise ValueError(f"pruning begins at {self.begin} and ends at {self.end}; expected begin < end <= 1")
        if list(self.ratios) != sorted(set(self.ratios)):
            raise ValueError(f"ratios are {self.ratios}; expected rising numbers")


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


class Candidate(NamedTuple):
    """A pruned network at the big one's shapes.

    Attributes:
        proposal: the sizes it was pruned to.
        net: zero where elements were dropped.
        keeps: {group name: bool [size] or [stack, size]}.
        accuracy: on the validation split.
        holds: it lost at most the allowed drop there.
    """

    proposal: Proposal
    net: Net
    keeps: dict[str, np.ndarray]
    accuracy: float
    holds: bool


def analyse(bench: Bench, big: Net) -> Analysis:
    """Finds the groups that can be removed exactly, by replaying the jaxpr, and how much each layer changes.

    Raises:
        ValueError: nothing can be removed exactly.
    """
    host, state = jax.device_get((big.params, big.model_state))
    inputs = np.zeros((3, *bench.dataset.shape), np.int32 if bench.dataset.ids else np.float32)
    traced = trace.groups(_logits(big.model), host, inputs, names=big.model.axes, state=state)
    found = [group for group in traced if group.name in big.model.axes]
    exact = tuple(group for group in found if not group.note)
    if not exact:
        why = "; ".join(f"{group.name}: {group.note}" for group in found) or "it names no sizes in `axes`"
        raise ValueError(f"nothing of this model can be removed exactly: {why}")
    for group in exact:
        logging.info("can shrink: %s, %d elements%s", group.name, group.size, " in each layer" if group.stack else "")
    stacked = any(group.name == "layers" for group in exact)
    importance = _importance(big, host, bench.dataset.train) if stacked else np.zeros(0)
    return Analysis(exact, importance, {group.name: group.note for group in found if group.note})


def _logits(model: Any) -> Callable[[Params, Params, Any], jax.Array]:
    return lambda params, model_state, inputs: model.apply(params, model_state, {"inputs": inputs})[0].logits


def _importance(big: Net, params: Params, split: data.Split) -> np.ndarray:
    """[layers] how much each layer changes the residual stream on up to 1024 training examples."""
    layers = sum(name.startswith("layers/") and name.count("/") == 1 for name in big.model.features)
    names = ("embed", *(f"layers/{i}" for i in range(layers)))
    inputs = split.take(slice(1024))["inputs"]

    @jax.jit
    def importance(params: Params, inputs: jax.Array) -> jax.Array:
        outputs, _ = big.model.apply(params, big.model_state, {"inputs": inputs}, capture=names)
        return shrink.depth.importance([outputs.features[name] for name in names], jnp.ones(len(inputs)))

    return np.asarray(importance(params, inputs))


def measure_sensitivity(bench: Bench, big: Net, analysis: Analysis) -> prune.Sensitivity:
    """Validation accuracy against sparsity of each group, and of each layer's own elements; nothing is trained.

    It is written to the workdir, and read from there if the job was cut.
    """
    path = bench.directory / SENSITIVITY
    if path.exists():
        return prune.Sensitivity.load(path)
    valid = bench.dataset.valid
    every = slice(None, None, math.ceil(len(valid) / EXAMPLES))
    extra = {name: array[every] for name, array in valid.extra.items()}
    some = dataclasses.replace(valid, inputs=valid.inputs[every], targets=valid.targets[every], id=valid.id[every], extra=extra)

    def accuracy(params: Params) -> float:
        return common.evaluate(bench, big._replace(params=params), some).summary["accuracy"]

    found = prune.analyse(
        accuracy, big.params, sparsities=SPARSITIES, criterion=_criterion(analysis), pattern=prune.groups(analysis.groups)
    )
    found.save(path)
    return found


def _criterion(analysis: Analysis) -> prune.Criterion:
    """What an element is worth: its magnitude, and a layer what it changes."""
    if not len(analysis.importance):
        return prune.magnitude()
    return prune.given({"layers": jnp.asarray(analysis.importance)}, otherwise=prune.magnitude())


def search(
    bench: Bench,
    big: Net,
    analysis: Analysis,
    sensitivity: prune.Sensitivity,
    config: Pruning,
    terms: Terms,
    max_drop: float,
) -> list[Candidate]:
    """Prunes to each proposal in turn, mildest first, until one loses more than `max_drop` on the validation split.

    That is a screen before the retraining, not a proof: the verdict is the test split's.
    """
    whole = {group.name: group.size for group in analysis.groups}
    reference = common.evaluate(bench, big, bench.dataset.valid).summary["accuracy"]
    tried: list[Candidate] = []
    curves = {name: curve(sensitivity, name) for name in whole}
    proposals = propose(big.model, whole, config.ratios, bench.dataset.shape, curves)
    for ratio in sorted(set(config.ratios) - {proposal.ratio for proposal in proposals}):
        logging.warning("%gx fewer parameters is not tried: no sizes reach it, or a ratio before it has the same sizes", ratio)
    for proposal in proposals:
        net, keeps = _prune(bench, big, analysis, proposal, config, terms)
        accuracy = common.evaluate(bench, net, bench.dataset.valid).summary["accuracy"]
        holds = reference - accuracy <= max_drop
        tried.append(Candidate(proposal, net, keeps, accuracy, holds))
        logging.info("%s: validation accuracy %.4f, big %.4f", proposal.sizes, accuracy, reference)
        if not holds:
            break
    return tried


def _prune(
    bench: Bench,
    big: Net,
    analysis: Analysis,
    proposal: Proposal,
    config: Pruning,
    terms: Terms,
) -> tuple[Net, dict[str, np.ndarray]]:
    """One pruning run, from the big model and with it as teacher."""
    run = config.run
    begin, end = int(config.begin * run.steps), max(int(config.end * run.steps), 1)

    def around(optimizer: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        return prune.around(
            optimizer,
            _criterion(analysis),
            sparsity={group.name: 1 - proposal.sizes[group.name] / group.size for group in analysis.groups},
            pattern=prune.groups(analysis.groups),
            schedule=prune.cubic(min(begin, end - 1), end),
            every=config.interval,
        )

    problem = common.problem(big.model, terms, run, big, around)
    name = f"prune {proposal.ratio:g}x"
    state = runs.fit(bench, name, problem, run, params=big.params, model_state=big.model_state, frozen=big.frozen)
    keeps = {name: np.asarray(keep) for name, keep in jax.device_get(prune.keeps(state.opt_state["model"])).items()}
    forward = common.flops(bench, big)
    cost = run.steps * runs.step_flops(forward, forward, bench.data.batch)
    return Net(big.model, state.params["model"], state.model_state, run.steps, cost), keeps


def compact(bench: Bench, candidate: Candidate, analysis: Analysis) -> Net:
    """Cuts the dropped parts away and checks that the outputs stay the masked model's.

    Raises:
        ValueError: the outputs differ by more than 1e-5 of their scale.
    """
    params, state = jax.device_get((candidate.net.params, candidate.net.model_state))
    masked = candidate.net._replace(params=params, model_state=state)
    sizes = shrink.sizes(analysis.groups, candidate.keeps)
    small = masked._replace(
        model=masked.model.resize(sizes),
        params=shrink.compact(params, analysis.groups, candidate.keeps),
        model_state=shrink.compact_state(state, analysis.groups, candidate.keeps),
    )
    inputs = bench.dataset.valid.take(slice(None))["inputs"]
    forward = lambda net: jax.jit(lambda both, inputs: _logits(net.model)(both[0], both[1], inputs))
    both = lambda net: (net.params, net.model_state)
    gap = shrink.verify(forward(masked), both(masked), forward(small), both(small), inputs)
    logging.info("compact: %s; outputs differ from the masked model's by %.1e", sizes, gap)
    return small
