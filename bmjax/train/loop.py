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
from absl import logging

from bmjax.config import at_least, field
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
    loss = float(jax.device_get(metrics["loss"]))
    if math.isfinite(loss):
        return loss
    terms = ", ".join(f"{name} {float(jax.device_get(value)):g}" for name, value in metrics.items() if name != "loss")
    saved = checkpoints.steps() if checkpoints is not None else []
    kept = f"the last good checkpoint is step {saved[-1]}" if saved else "nothing was saved"
    raise ValueError(
        f"the loss is {loss:g} at step {step} ({terms}); {kept}; "
        "look at that batch, or lower the learning rate or clip the gradient"
    )


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
        evaluate: state -> metrics; the one called `best` decides the best checkpoint.
        checkpoints: a `train.checkpoint.Checkpoints`, or None to save nothing.
        best: see `evaluate`.

    Returns:
        The state after `steps` updates.

    Raises:
        ValueError: the loss became NaN or infinite.
        Stop: Ctrl-C; the state was saved.
    """
    done = int(state.step)
    if done >= steps:
        return state
    held: Mapping[str, jax.Array] | None = None
    with _interrupts() as interrupted, log.progress(steps, done, name) as progress:
        while done < steps:
            previous = held
            batch = next(batches)
            # Every transfer here is meant: batches were put by the iterator, metrics are fetched by name.
            with jax.transfer_guard("disallow"):
                state, held = step(state, frozen, batch)
            if previous is not None:
                progress(done, _loss(done, previous, checkpoints))
            done += 1
            last = done == steps or interrupted()
            if last or (every.log and done % every.log == 0):
                _loss(done, held, checkpoints)
                log.scalars(done, {key: float(value) for key, value in jax.device_get(held).items()}, name)
            scores = None
            if evaluate is not None and (last or (every.evaluate and done % every.evaluate == 0)):
                scores = evaluate(state)
                log.scalars(done, {f"valid_{key}": value for key, value in scores.items()}, name)
            if checkpoints is not None and (last or (every.save and done % every.save == 0)):
                # A state is saved only when its own loss is known to be finite.
                _loss(done, held, checkpoints)
                checkpoints.save(done, state, metric=None if scores is None else scores[best])
            if last:
                progress(done, _loss(done, held, checkpoints))
            if last and done < steps:
                if checkpoints is not None:
                    checkpoints.wait()
                logging.warning("%s: stopped at step %d of %d; the same command goes on from here", name, done, steps)
                raise Stop
    if checkpoints is not None:
        checkpoints.wait()
    return state
