"""One training run from its config: data, mesh, checkpoints and log around the step. The same call resumes it."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from bmjax import data, measure, parallel, trace
from bmjax.config import at_least, field
from bmjax.parallel.rules import Rules
from bmjax.train import loop
from bmjax.train.checkpoint import Checkpoints
from bmjax.train.log import Log
from bmjax.train.optimizer import Optimizer
from bmjax.train.step import Frozen, Problem, abstract_state, init_state, make_step
from bmjax.types import Batch, Model, Params, TrainState


@dataclasses.dataclass
class Run:
    """How long, and with what optimiser."""

    steps: int = field(600, "updates", check=at_least(1))
    accumulate: int = field(1, "microbatches a step", check=at_least(1))
    optimizer: Optimizer = field(Optimizer(), "the update rule")
    augment: data.Augment = field(data.Augment(), "random changes of the training inputs")
    every: loop.Every = field(loop.Every(), "how often to log, evaluate and save")


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where runs take place.

    Attributes:
        mesh: the devices.
        dataset: the examples.
        data: how they are batched.
        directory: checkpoints of the run called name go to directory/checkpoints/name.
        log: where figures go.
        seed: of parameters, shuffling and all that is random.
    """

    mesh: Mesh
    dataset: data.Dataset
    data: data.Data
    directory: pathlib.Path
    log: Log
    seed: int

    def example(self) -> Batch:
        """A batch on the host, for shapes."""
        return data.train_batches(self.dataset.train, self.data.batch, self.seed)[0]

    def shapes(self, model: Model) -> tuple[Params, Params]:
        """Abstract (params, model_state) of a model on this data."""
        return jax.eval_shape(model.init, jax.random.key(self.seed), self.example())


def fit(
    bench: Bench, name: str, problem: Problem, run: Run, *, params: Params | None = None, frozen: Frozen = None
) -> TrainState:
    """Trains, or goes on with, the run called `name`; returns its last state, partitioned over the mesh.

    Args:
        bench: where.
        name: of the run, in the log and among the checkpoints.
        problem: what is trained; its `tx` is built for `run.steps`.
        run: how long.
        params: model parameters to start from, instead of fresh ones.
        frozen: the teacher's {"params", "model_state"}.

    Raises:
        ValueError: the batch does not divide over the mesh; as `init_state`, `Checkpoints.restore` and `loop.fit`.
    """
    parallel.check_batch(bench.data.batch, bench.mesh, problem.accumulate)
    seed = stream(bench.seed, name)
    batches = data.train_batches(bench.dataset.train, bench.data.batch, seed, run.augment)
    rules, key, example = _rules(problem), jax.random.key(seed), bench.example()
    abstract = abstract_state(problem, bench.mesh, rules, key, example, frozen=frozen)
    with Checkpoints(bench.directory / "checkpoints" / name) as checkpoints:
        restored = checkpoints.restore(abstract)
        if restored is None:
            state = init_state(problem, bench.mesh, rules, key, example, params=params, frozen=frozen)
        else:
            state = restored.state
        start = int(state.step)
        bench.log.resume(start, name)
        if start >= run.steps:
            return state
        # The step is dispatched before its batch is needed again, so preparing the next one overlaps with the device's work.
        fed = parallel.feed((batches[i] for i in range(start, run.steps)), bench.mesh)
        return loop.fit(
            make_step(problem, bench.mesh, abstract),
            state,
            frozen,
            fed,
            run.steps,
            log=bench.log,
            name=name,
            every=run.every,
            evaluate=lambda state: _scores(bench, problem, state),
            checkpoints=checkpoints,
        )


def check(bench: Bench, problem: Problem, run: Run, frozen: Frozen = None) -> None:
    """Traces the step and compiles nothing: what would be raised when a run of this problem starts is raised now.

    Args:
        bench, problem, run: as for `fit`.
        frozen: the teacher's {"params", "model_state"}, arrays or abstract.

    Raises:
        ValueError: the batch does not divide over mesh and microbatches, a term does not fit the model, teacher or data, or
            the data cannot be augmented so.
    """
    parallel.check_batch(bench.data.batch, bench.mesh, problem.accumulate)
    data.train_batches(bench.dataset.train, bench.data.batch, bench.seed, run.augment)
    example = bench.example()
    abstract = abstract_state(problem, bench.mesh, _rules(problem), jax.random.key(bench.seed), example, frozen=frozen)
    jax.eval_shape(make_step(problem, bench.mesh, abstract), abstract, frozen, example)


def _rules(problem: Problem) -> Rules:
    return getattr(problem.model, "rules", ((".*", ()),))


def stream(seed: int, name: str) -> int:
    """The seed of the run called `name`: a retraining does not see the batches of the run before it in the same order."""
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])


def _scores(bench: Bench, problem: Problem, state: TrainState) -> dict[str, float]:
    """What is logged of the validation split."""
    logits = functools.partial(predictor(cast(Any, problem.model)), state.params["model"], state.model_state)
    found = evaluate(bench, logits, bench.dataset.valid).summary
    return {"accuracy": found["accuracy"], "nll": found["nll"]}


@functools.lru_cache(maxsize=16)
def predictor(model: Any) -> Callable[[Params, Params, Batch], jax.Array]:
    """The jitted forward pass (params, model_state, batch) -> logits, compiled once for a model."""
    return jax.jit(lambda params, model_state, batch: model.apply(params, model_state, batch)[0].logits)


def evaluate(
    bench: Bench,
    logits: Callable[[Batch], jax.Array],
    split: data.Split,
    teacher: Callable[[Batch], jax.Array] | None = None,
) -> measure.Evaluation:
    """All metrics on a split, over the whole mesh. `logits` and `teacher` are jitted functions of a batch."""
    batches = (parallel.put_batch(batch, bench.mesh) for batch in data.eval_batches(split, bench.data.batch))
    return measure.evaluate(logits, batches, classes=bench.dataset.classes, teacher_logits_fn=teacher)


def forward_flops(model: Any, params: Params, model_state: Params, shape: tuple[int, ...]) -> int:
    """FLOPs of one example's forward pass: matrix products and convolutions, a multiply-add counted as 2."""
    inputs = jax.ShapeDtypeStruct((2, *shape), "float32")
    return trace.flops(lambda p, x: model.apply(p, model_state, {"inputs": x})[0].logits, params, inputs) // 2


def step_flops(student: int, teacher: int, batch: int) -> int:
    """FLOPs of a training step: the student's backward pass costs twice its forward pass, the teacher only runs forward."""
    return batch * (3 * student + teacher)
