"""Training for a benchmark: THE step in a plain loop, timed from the second step on."""

import contextlib
import math
import resource
import sys
import time
from typing import Any, NamedTuple


class Trained(NamedTuple):
    """What `train` returns.

    Attributes:
        state: the last one.
        times: {"seconds" of all steps but the first, "seconds_to_compile" and run that one, "seconds_a_step"}.
        diverged_at: the step whose loss was not finite, which was the last; None if all were.
    """

    state: Any
    times: dict[str, float]
    diverged_at: int | None


def check(problem: Any, mesh: Any, example: Any, executor: str = "auto", frozen: Any = None) -> None:
    """Raises ValueError, and compiles nothing, where the optimiser's state, the mesh or the executor do not fit the problem."""
    import jax

    from bmjax.train import abstract_state, make_step
    from bmjax.train import run as runs

    state = abstract_state(problem, mesh, runs.rules_of(problem.model), jax.random.key(0), example, frozen=frozen)
    make_step(problem, mesh, state, executor)


def train(
    problem: Any,
    mesh: Any,
    batches: Any,
    steps: int,
    seed: int,
    executor: str = "auto",
    threads: int = 0,
    frozen: Any = None,
) -> Trained:
    """Trains a fresh model of the seed for so many steps, batch i of `batches` in step i; `frozen` is the teacher's."""
    import jax

    from bmjax import data, parallel
    from bmjax.train import init_state, make_step
    from bmjax.train import run as runs

    state: Any = init_state(problem, mesh, runs.rules_of(problem.model), jax.random.key(seed), batches[0], frozen=frozen)
    step = make_step(problem, mesh, state, executor)
    start, losses, lost = time.perf_counter(), list[Any](), None
    first = start
    with contextlib.closing(data.stream(batches, 0, steps, threads)) as host:
        for done, batch in enumerate(parallel.feed(host, mesh), 1):
            state, metrics = step(state, frozen, batch)
            losses.append(metrics["loss"])
            if done == 1:  # it compiles
                jax.block_until_ready(losses)
                first = time.perf_counter()
            if done > 1 and not math.isfinite(float(losses.pop(0))):  # read a step late, so that the device does not wait
                lost = done - 1
                break
    if lost is None and not math.isfinite(float(losses[-1])):
        lost = steps
    jax.block_until_ready(state)
    seconds = time.perf_counter() - first
    times = {"seconds": seconds, "seconds_to_compile": first - start, "seconds_a_step": seconds / max((lost or steps) - 1, 1)}
    return Trained(state, times, lost)


def peak() -> float:
    """MiB of memory that this process has held at most."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
