"""One training run from its config: data, mesh, checkpoints and log around the step. The same call resumes it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from bmjax import data, measure, parallel, trace
from bmjax.config import at_least, field, within
from bmjax.parallel.rules import Rules
from bmjax.train import cost, executors, gradients, loop
from bmjax.train.checkpoint import Checkpoints
from bmjax.train.log import Log
from bmjax.train.objective import batch_keys
from bmjax.train.optimizer import Optimizer
from bmjax.train.precision import COMPUTE_DTYPES
from bmjax.train.profile import Profile, check_window
from bmjax.train.step import Frozen, Problem, abstract_state, init_state, make_step
from bmjax.train.throughput import Meter
from bmjax.types import Batch, Gradient, Model, Params, TrainState


def _check_gradient(value: Any) -> None:
    if not (callable(value) or isinstance(value, Gradient)):
        raise ValueError(f"a gradient cannot be {value!r}; set a function in a config file")


@dataclasses.dataclass
class Run:
    """How long, with what optimiser, and how the step is computed."""

    steps: int = field(600, "updates", check=at_least(1))
    accumulate: int = field(1, "microbatches a step", check=at_least(1))
    microbatch_statistics: bool = field(False, "batch statistics and terms that relate examples may see single microbatches")
    executor: str = field("auto", "who runs the gradient on the mesh", choices=executors.NAMES)
    compute_dtype: str = field("float32", "of the forward and backward pass", choices=COMPUTE_DTYPES)
    ema: float = field(
        0.0,
        "decay of a moving average of the parameters, which is then what is evaluated and exported; 0 keeps none",
        check=within(0, 1, open_high=True),
    )
    clip_per_example: float = field(0.0, "largest norm of each example's own gradient; 0 does not clip", check=at_least(0))
    gradient: Any = field(None, "your own gradient, (loss_fn, params, batch, ctx) -> (grads, aux)", check=_check_gradient)
    norms: bool = field(False, "log the norms of gradient and update")
    optimizer: Optimizer = field(Optimizer(), "the update rule")
    augment: data.Augment = field(data.Augment(), "random changes of the training inputs")
    time_teacher: bool = field(False, "time the teacher's forward pass against whole steps before training; copies the state")
    every: loop.Every = field(loop.Every(), "how often to log, evaluate and save")
    profile: str = field("", "from:to, the steps to record in workdir/profile, as in 100:110; empty records none")

    def validate(self) -> None:
        """Raises ValueError if the steps to record are not some of the run's, or two gradients are asked for."""
        check_window(self.profile, self.steps)
        if self.gradient is not None and self.clip_per_example:
            raise ValueError("gradient and clip_per_example are two ways to take the gradient; give one of them")

    @property
    def how(self) -> dict[str, Any]:
        """What a `Problem` takes of these settings, beside its optimisers."""
        clipped = gradients.clipped_per_example(self.clip_per_example) if self.clip_per_example else gradients.mean()
        return {
            "accumulate": self.accumulate,
            "microbatch_statistics": self.microbatch_statistics,
            "gradient": self.gradient or clipped,
            "compute_dtype": self.compute_dtype,
            "ema": self.ema or None,
            "norms": self.norms,
        }


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
    bench: Bench,
    name: str,
    problem: Problem,
    run: Run,
    *,
    params: Params | None = None,
    model_state: Params | None = None,
    frozen: Frozen = None,
    schedule: optax.Schedule | None = None,
) -> TrainState:
    """Trains, or goes on with, the run called `name`; returns its last state, partitioned over the mesh.

    Args:
        bench: where.
        name: of the run, in the log and among the checkpoints.
        problem: what is trained; its `tx` is built for `run.steps`.
        run: how long.
        params, model_state: to start from, instead of fresh ones.
        frozen: the teacher's {"params", "model_state"}.
        schedule: step -> learning rate, to be logged; that of `problem.tx`.

    Raises:
        ValueError: the batch does not divide over the mesh; as `Problem.check_schedules`, `init_state`, `Checkpoints.restore` and
            `loop.fit`.
    """
    parallel.check_batch(bench.data.batch, bench.mesh, problem.accumulate)
    problem.check_schedules(run.steps)
    seed = stream(bench.seed, name)
    batches = data.train_batches(bench.dataset.train, bench.data.batch, seed, run.augment)
    rules, key, example = rules_of(problem.model), jax.random.key(seed), batches[0]
    abstract = abstract_state(problem, bench.mesh, rules, key, example, frozen=frozen)
    with Checkpoints(bench.directory / "checkpoints" / name) as checkpoints:
        restored = checkpoints.restore(abstract)
        if restored is None:
            start_from: Any = {"params": params, "model_state": model_state}
            state = init_state(problem, bench.mesh, rules, key, example, **start_from, frozen=frozen)
        else:
            state = restored.state
        start = int(state.step)
        bench.log.resume(start, name)
        if start >= run.steps:
            return state
        step = cost.compiled(make_step(problem, bench.mesh, abstract, run.executor), state, frozen, example)
        figures = cost.measure(step, problem, state, frozen, example)
        if run.time_teacher and problem.partner is not None:
            figures["teacher_time_share"] = cost.teacher_time_share(step, problem, state, frozen, example, bench.mesh)
        cost.note(bench.directory, name, figures)
        # Without threads too, preparing a batch overlaps with the device's work: the step before it is only dispatched.
        with contextlib.closing(data.stream(batches, start, run.steps, bench.data.threads)) as host:
            return loop.fit(
                step,
                state,
                frozen,
                parallel.feed(host, bench.mesh),
                run.steps,
                log=bench.log,
                name=name,
                every=run.every,
                evaluate=lambda state: _scores(bench, problem, state),
                checkpoints=checkpoints,
                best="-nll" if bench.dataset.kind == "tokens" else "accuracy",
                meter=Meter.of(problem, state, frozen, example, bench.mesh.devices.flat, schedule),
                profile=Profile(run.profile, bench.directory / "profile" / name),
            )


def check(bench: Bench, problem: Problem, run: Run, frozen: Frozen = None) -> None:
    """Traces the step and compiles nothing: what would be raised when a run of this problem starts is raised now.

    Args:
        bench, problem, run: as for `fit`.
        frozen: the teacher's {"params", "model_state"}, arrays or abstract.

    Raises:
        ValueError: the batch does not divide over mesh and microbatches, a term does not fit the model, teacher or data, a
            schedule begins or ends at what cannot be, or the data cannot be augmented so.
    """
    executors.choose(run.executor, bench.mesh)  # first, as partitioning the parameters logs what it cannot split
    parallel.check_batch(bench.data.batch, bench.mesh, problem.accumulate)
    problem.check_schedules(run.steps)
    example = data.train_batches(bench.dataset.train, bench.data.batch, bench.seed, run.augment)[0]
    abstract = abstract_state(problem, bench.mesh, rules_of(problem.model), jax.random.key(bench.seed), example, frozen=frozen)
    jax.eval_shape(make_step(problem, bench.mesh, abstract, run.executor), abstract, frozen, example)
    if run.augment.mixes:
        for name, keys in batch_keys(problem, abstract, frozen, example).items():
            mixable = "targets" not in keys or "mix" in keys
            data.check_augment(run.augment, bench.dataset.train, mixable=mixable, loss=f"the loss term {name!r}")


def rules_of(model: Any) -> Rules:
    """A model's partition rules; one without any is held whole by every device."""
    return getattr(model, "rules", None) or ((".*", ()),)


def stream(seed: int, name: str) -> int:
    """The seed of the run called `name`: a retraining does not see the batches of the run before it in the same order."""
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])


def start_key(bench: Bench, name: str) -> jax.Array:
    """The PRNG key that the model of the run called `name` is initialised with; see `state.init_state`."""
    return jax.random.split(jax.random.key(stream(bench.seed, name)), 3)[0]


def outcome(params: Params, extra: Mapping[str, Any]) -> Params:
    """The model's parameters as a run's result: their moving average where one is kept.

    Pruned weights fade from the average and do not vanish; in the parameters they are exactly zero, and so they are here.

    Args:
        params: the state's params["model"].
        extra: the state's.
    """
    if "ema" not in extra:
        return params
    return jax.tree.map(lambda now, average: jnp.where(now == 0, 0, average), params, extra["ema"])


def result(problem: Problem, state: TrainState) -> Params:
    """The model's parameters that are evaluated and exported: the `outcome` as the forward pass sees it, through the views."""

    def through(params: Params, opt_state: Any, step: jax.Array) -> Params:
        for view in problem.views:
            params = view(params, opt_state, step)
        return params

    params = outcome(state.params["model"], state.extra)
    return jax.jit(through)(params, state.opt_state["model"], state.step) if problem.views else params


def _scores(bench: Bench, problem: Problem, state: TrainState) -> dict[str, float]:
    """What is logged of the validation split."""
    logits = functools.partial(predictor(cast(Any, problem.model)), result(problem, state), state.model_state)
    found = evaluate(bench, logits, bench.dataset.valid).summary
    names = ("accuracy", "nll", "bits_per_token", "bits_per_byte", "perplexity")
    return {name: found[name] for name in names if found.get(name) is not None}


@functools.lru_cache(maxsize=16)
def predictor(model: Any) -> Callable[[Params, Params, Batch], jax.Array]:
    """The jitted forward pass (params, model_state, batch) -> logits, compiled once for a model."""
    return jax.jit(lambda params, model_state, batch: model.apply(params, model_state, batch)[0].logits)


def evaluate(
    bench: Bench,
    logits: Callable[[Batch], jax.Array],
    split: data.Split,
    teacher: Callable[[Batch], jax.Array] | None = None,
) -> measure.Evaluation | measure.TokenEvaluation:
    """All metrics on a split, over the whole mesh; token data give a `TokenEvaluation`.

    Args:
        bench: where.
        logits, teacher: jitted functions of a batch.
        split: the examples.
    """
    batches = (parallel.put_batch(batch, bench.mesh) for batch in data.eval_batches(split, bench.data.batch))
    return score(bench.dataset, split, batches, logits, teacher)


def score(
    dataset: data.Dataset,
    split: data.Split,
    batches: Iterable[Batch],
    logits: Callable[[Batch], jax.Array],
    teacher: Callable[[Batch], jax.Array] | None = None,
) -> measure.Evaluation | measure.TokenEvaluation:
    """`evaluate` on a split's batches, wherever they are."""
    return measure.evaluate(
        logits,
        batches,
        classes=dataset.classes,
        teacher_logits_fn=teacher,
        kind=dataset.kind,
        text_bytes=split.text_bytes,
    )


def forward_flops(model: Any, params: Params, model_state: Params, shape: tuple[int, ...], dtype: str = "float32") -> int:
    """FLOPs of one example's forward pass: matrix products and convolutions, a multiply-add counted as 2.

    Args:
        model, params, model_state: the network; its arrays may be abstract.
        shape, dtype: of one example's inputs; token ids are "int32".
    """
    inputs = jax.ShapeDtypeStruct((2, *shape), dtype)
    return trace.flops(lambda p, s, x: model.apply(p, s, {"inputs": x})[0].logits, params, model_state, inputs) // 2


def step_flops(student: int, teacher: int, batch: int) -> int:
    """FLOPs of a training step: the student's backward pass costs twice its forward pass, the teacher only runs forward."""
    return batch * (3 * student + teacher)
