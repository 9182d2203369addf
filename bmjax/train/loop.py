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


def _floats(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    return {key: float(value) for key, value in jax.device_get(dict(metrics)).items()}


def _no_transfers() -> Any:
    return jax.transfer_guard("disallow")


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


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
        ValueError: the loss or, where a state is saved, a parameter became NaN or infinite; that state is not saved.
        Stop: Ctrl-C; the state was saved.
    """
    done = int(state.step)
    if done >= steps:
        return state
    held: Mapping[str, jax.Array] | None = None
    # On an accelerator every transfer is meant: batches were put by the iterator, metrics are fetched by name.
    guard = contextlib.nullcontext if jax.default_backend() == "cpu" else _no_transfers
    with _interrupts() as interrupted, log.progress(steps, done, name) as progress:
        last = waited = False
        while not last:
            previous = held
            batch = next(batches)
            with guard():
                state, held = step(state, frozen, batch)
            if previous is not None:
                progress(done, _loss(done, previous, checkpoints))
                if _due(every.log, done) and not waited:
                    log.scalars(done, _floats(previous), name)
            done += 1
            last = done == steps or interrupted()
            saves = last or _due(every.save, done)
            evaluates = evaluate is not None and (last or _due(every.evaluate, done))
            waited = saves or evaluates
            if waited:
                progress(done, _loss(done, held, checkpoints))
                if last or _due(every.log, done):
                    log.scalars(done, _floats(held), name)
            if saves:  # only a state that is known to be good is saved
                _check_parameters(done, state, held, checkpoints)
            scores = None
            if evaluate is not None and evaluates:
                scores = evaluate(state)
                log.scalars(done, {f"valid_{key}": value for key, value in scores.items()}, name)
            if checkpoints is not None and saves:
                checkpoints.save(done, state, metric=None if scores is None else scores[best])
        if checkpoints is not None:
            checkpoints.wait()
        if interrupted():  # also where it came while the last step was evaluated and saved
            logging.warning("%s: stopped at step %d of %d; the same command goes on from here", name, done, steps)
            raise Stop
    return state
