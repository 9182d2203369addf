"""What a step costs, from the program that runs it: memory on a device, and how much of it is the teacher's doing."""

from __future__ import annotations

import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from bmjax import parallel
from bmjax.train import precision
from bmjax.train.problem import Frozen, Problem
from bmjax.train.throughput import forward_flops
from bmjax.types import Batch, Params, TrainState

FILE = "costs.json"


def compiled(step: Any, state: TrainState, frozen: Frozen, batch: Batch) -> Any:
    """The step of `make_step`, compiled ahead for arguments like these; it is called like it, and can tell its memory.

    Args:
        step: the jitted step.
        state, frozen: real ones; how they are partitioned is part of the program.
        batch: any one, host arrays.
    """
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), (state, frozen))
    return step.lower(*like, {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}).compile()


def measure(program: Any, problem: Problem, state: TrainState, frozen: Frozen, batch: Batch) -> dict[str, Any]:
    """Figures of a compiled step.

    Args:
        program: of `compiled`.
        problem, state, frozen, batch: what it was compiled for.

    Returns:
        Bytes on each device, as the compiler planned them: argument_bytes (state, teacher, batch), temporary_bytes, output_bytes,
        aliased_bytes (outputs that take the place of arguments), and peak_bytes, the sum of the first three less the last; {} of
        these where the backend does not tell. With a teacher, fixed or moving, teacher_flops_share: its forward pass's part of
        the FLOPs of the matrix products of a step.
    """
    figures: dict[str, Any] = {}
    if (memory := program.memory_analysis()) is not None:
        parts = {"argument": "argument", "temporary": "temp", "output": "output", "aliased": "alias"}
        figures = {f"{name}_bytes": int(getattr(memory, f"{part}_size_in_bytes")) for name, part in parts.items()}
        figures["peak_bytes"] = sum(figures.values()) - 2 * figures["aliased_bytes"]
    if problem.partner is not None:
        student, teacher = forward_flops(problem, state, frozen, batch)
        figures["teacher_flops_share"] = teacher / max(3 * student + teacher, 1)
    return figures


def teacher_time_share(
    program: Any, problem: Problem, state: TrainState, frozen: Frozen, batch: Batch, mesh: Any, pairs: int = 15
) -> float:
    """Median time of the teacher's forward pass over that of a whole step, interleaved; the state is copied and left alone.

    Args:
        program, problem, state, frozen, batch: as for `measure`, with a teacher.
        mesh: where they are.
        pairs: timings of each.
    """
    partner, captured = problem.partner, problem.captures[1]
    assert partner is not None

    def forward(params: Params, model_state: Params, batch: Batch) -> Any:
        narrow = lambda tree: precision.narrow(tree, problem.compute_dtype)
        found, _ = partner.apply(narrow(params), model_state, {**batch, "inputs": narrow(batch["inputs"])}, capture=captured)
        return found.logits, found.features

    held = frozen
    if problem.mean_teacher:
        held = {"params": state.extra["ema"], "model_state": state.model_state}
    alone, put = jax.jit(forward), parallel.put_batch(batch, mesh)
    state, held = jax.tree.map(jnp.copy, (state, held))
    seconds = []
    for _ in range(pairs + 1):
        spent, _outputs = _timed(alone, held["params"], held["model_state"], put)
        whole, (state, _metrics) = _timed(program, state, frozen, put)
        seconds.append((spent, whole))
    teacher, step = zip(*seconds[1:])  # the first ones compile
    return statistics.median(teacher) / statistics.median(step)


def _timed(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    found = jax.block_until_ready(call(*arguments))
    return time.perf_counter() - start, found


def note(directory: pathlib.Path, name: str, figures: dict[str, Any]) -> None:
    """Logs a run's figures in one line, and keeps them in the workdir's costs.json."""
    parts = []
    if "peak_bytes" in figures:
        held, temporary = (figures[f"{part}_bytes"] / 2**20 for part in ("argument", "temporary"))
        peak = figures["peak_bytes"] / 2**20
        parts.append(f"{peak:.3g} MiB on each device ({held:.3g} of arguments, {temporary:.3g} of temporaries)")
    if "teacher_flops_share" in figures:
        parts.append(f"{figures['teacher_flops_share']:.1%} of its FLOPs are the teacher's")
    if "teacher_time_share" in figures:
        parts.append(f"so is {figures['teacher_time_share']:.1%} of its time")
    logging.info("%s: a step takes %s", name, ", ".join(parts) or "what this backend does not tell")
    if jax.process_index() == 0:
        draft = directory / f"{FILE}.tmp"
        draft.write_text(json.dumps({**noted(directory), name: figures}, indent=1), encoding="utf-8")
        draft.replace(directory / FILE)


def noted(directory: pathlib.Path) -> dict[str, dict[str, Any]]:
    """{run: its figures} of a workdir; {} if none were noted."""
    path = directory / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
