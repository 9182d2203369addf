"""The host side of training: feed the step, watch the loss one step late, log, evaluate, save, stop cleanly."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from bmjax import trees
from bmjax.config import at_least, field
from bmjax.train.profile import Profile
from bmjax.train.throughput import Meter
from bmjax.types import TrainState


class Stop(KeyboardInterrupt):
    """Ctrl-C, after the step in flight was finished and the state saved."""


@dataclasses.dataclass
class Every:
    """After how many steps what happens. The last step always logs, evaluates and saves."""

    log: int = field(50, "steps between lines in the log; 0 is only the last", check=at_least(0))
    evaluate: int = field(0, "steps between evaluations on the validation split; 0 is only the last", check=at_least(0))
    save: int = field(1000, "steps between checkpoints; 0 is only the last", check=at_least(0))


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a flag; a second one interrupts at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped.is_set
        return

    def handle(number: int, frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stopped.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def _loss(step: int, metrics: Mapping[str, jax.Array], checkpoints: Any) -> float:
    """The loss of a step, waiting for it. Raises ValueError if it is not a finite number."""
    loss = float(metrics["loss"])  # `device_get` would take three times as long
    if not math.isfinite(loss):
        raise _diverged(f"the loss is {loss:g} at step {step}", metrics, checkpoints)
    return loss


def _check_parameters(step: int, state: TrainState, metrics: Mapping[str, jax.Array], checkpoints: Any) -> None:
    """Raises ValueError if an update left NaN or infinity in the parameters: a finite loss can have a gradient that is not."""
    seen = {**state.params, "model_state": state.model_state}
    if not jax.device_get(_all_finite(seen)):
        bad = next(path for path, leaf in trees.paths(seen).items() if not jax.device_get(_all_finite(leaf)))
        raise _diverged(f"{bad} is not finite after step {step}", metrics, checkpoints)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in floats]))


def _diverged(what: str, metrics: Mapping[str, jax.Array], checkpoints: Any) -> ValueError:
    terms = ", ".join(f"{name} {float(jax.device_get(value)):g}" for name, value in metrics.items() if name != "loss")
    if checkpoints is not None:
        checkpoints.wait()  # the newest may still be on its way to the disk
    saved = checkpoints.steps() if checkpoints is not None else []
    kept = f"the last good checkpoint is step {saved[-1]}" if saved else "nothing was saved"
    return ValueError(f"{what} ({terms}); {kept}; look at that batch, or lower the learning rate or clip the gradient")


def _guarded(step: Callable[..., Any]) -> Callable[..., Any]:
    """On an accelerator every transfer is meant: batches were put by the iterator, metrics are fetched by name."""
    if jax.default_backend() == "cpu":
        return step

    def call(*arguments: Any) -> Any:
        with jax.transfer_guard("disallow"):
            return step(*arguments)

    return call


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


@dataclasses.dataclass
class _Host:
    """What happens beside the steps; the attributes are the arguments of `fit`."""

    name: str
    every: Every
    log: Any
    progress: Callable[[int, float], None]
    evaluate: Callable[[TrainState], dict[str, float]] | None
    checkpoints: Any
    best: str
    meter: Meter | None
    probed: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)  # what a line says beside the step's metrics

    def probe(self, done: int, state: TrainState, last: bool) -> None:
        """Has the device look at a state that a line will speak of, while it is still there: the next step takes it."""
        if self.meter is not None and (last or _due(self.every.log, done)):
            self.probed = self.meter.probe(state)

    def look(
        self, done: int, metrics: Mapping[str, jax.Array], *, newest: Mapping[str, Any] | None = None, last: bool = False
    ) -> None:
        """Waits for a step's loss, shows it, and logs the step if it is time; `newest` are the metrics of the step after it.

        Raises ValueError if the loss is not finite.
        """
        self.progress(done, _loss(done, metrics, self.checkpoints))
        logs = last or _due(self.every.log, done)
        if not logs and (self.meter is None or self.meter.running):
            return
        speed = self._speed(done, newest)
        if logs:
            values = {name: float(value) for name, value in jax.device_get({**metrics, **self.probed}).items()}
            self.log.scalars(done, {**values, **speed}, self.name)

    def _speed(self, done: int, newest: Mapping[str, Any] | None) -> dict[str, float]:
        if self.meter is None:
            return {}
        # The device may be done with the newest step as well: a CPU computes a small one within the call.
        return self.meter.line(done + 1 if newest is not None and newest["loss"].is_ready() else done)

    def settle(self, done: int, state: TrainState, metrics: Mapping[str, jax.Array], last: bool) -> bool:
        """Evaluates and saves if it is time; returns whether it was, in which case the step has been looked at too."""
        saves = last or _due(self.every.save, done)
        evaluates = self.evaluate is not None and (last or _due(self.every.evaluate, done))
        if not saves and not evaluates:
            return False
        self.look(done, metrics, last=last)
        with self.aside():
            if saves:  # only a state that is known to be good is saved
                _check_parameters(done, state, metrics, self.checkpoints)
            scores = None
            if self.evaluate is not None and evaluates:
                scores = self.evaluate(state)
                self.log.scalars(done, {f"valid_{key}": value for key, value in scores.items()}, self.name)
            if self.checkpoints is not None and saves:
                self.checkpoints.save(done, state, metric=None if scores is None else self._metric(scores))
        return True

    def _metric(self, scores: Mapping[str, float]) -> float:
        """What the best checkpoint has most of."""
        return -scores[self.best[1:]] if self.best.startswith("-") else scores[self.best]

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Around what is no part of training, so that it does not count as slow steps."""
        return contextlib.nullcontext() if self.meter is None else self.meter.paused()


def fit(
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    frozen: Any,
    batches: Iterator[Any],
    steps: int,
    *,
    log: Any,
    name: str,
    every: Every,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    checkpoints: Any = None,
    best: str = "accuracy",
    meter: Meter | None = None,
    profile: Profile | None = None,
) -> TrainState:
    """Trains until `state.step` is `steps`.

    Metrics are read one step late: step n is dispatched before the loss of step n-1 is looked at, so the device never
    waits for the host, and never more than two steps are in flight.

    Args:
        step: from `make_step`; it donates the state.
        state: where to start; its step is the position in the data.
        frozen: the step's second argument.
        batches: iterator over batches on the mesh, from the state's step on.
        steps: the total number of updates.
        log: a `train.log.Log`.
        name: what this run is called in the log.
        every: how often to log, evaluate and save.
        evaluate: state -> metrics; the one called `best` decides the best checkpoint, the highest or, as in "-nll", the lowest.
        checkpoints: a `train.checkpoint.Checkpoints`, or None to save nothing.
        best: see `evaluate`.
        meter: adds its figures to the lines of the log.
        profile: records some of the steps.

    Returns:
        The state after `steps` updates.

    Raises:
        ValueError: the loss or, where a state is saved, a parameter became NaN or infinite; that state is not saved.
        Stop: Ctrl-C; the state was saved.
    """
    done = int(state.step)
    if done >= steps:
        return state
    with _interrupts() as interrupted, log.progress(steps, done, name) as progress, profile or Profile("", "") as recording:
        host = _Host(name, every, log, progress, evaluate, checkpoints, best, meter)
        state, done = _train(step, state, frozen, batches, done, steps, host, recording, interrupted)
        if checkpoints is not None:
            checkpoints.wait()
        if interrupted():  # also where it came while the last step was evaluated and saved
            logging.warning("%s: stopped at step %d of %d; the same command goes on from here", name, done, steps)
            raise Stop
    return state


def _train(
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    frozen: Any,
    batches: Iterator[Any],
    done: int,
    steps: int,
    host: _Host,
    profile: Profile,
    interrupted: Callable[[], bool],
) -> tuple[TrainState, int]:
    """The loop itself, from `done` updates on; returns the last state and how many there are then."""
    step = _guarded(step)
    take = next if host.meter is None else host.meter.next
    host.probe(0, state, last=True)  # compiles it before the clock starts; what it says of this state no line asks for
    late: tuple[int, Mapping[str, jax.Array]] | None = None  # a step that nobody has waited for yet
    last = False
    while not last:
        batch = take(batches)
        with profile.step(done):
            state, metrics = step(state, frozen, batch)
        if late is not None:
            host.look(*late, newest=metrics)
        done += 1
        last = done == steps or interrupted()
        host.probe(done, state, last)
        if profile.due(done, last):
            with host.aside():
                profile.end(metrics)
        late = None if host.settle(done, state, metrics, last) else (done, metrics)
    return state, done
