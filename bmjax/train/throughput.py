"""How fast a run goes and how well it uses the devices: figures for each line of the log."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bmjax import prune, trace, trees
from bmjax.types import Batch, Params, TrainState

Item = TypeVar("Item")

MACHINE = (
    "steps_per_s",
    "examples_per_s",
    "tokens_per_s",
    "data_wait",
    "mfu",
    "memory_gib",
)  # figures of the machine, not the run

# Dense bfloat16 FLOP/s of one device by what its `device_kind` starts with, from the vendors' data sheets (NVIDIA's figures
# halved where they assume 2:4 sparsity; Google's are of a chip, which is a device). The first match counts.
PEAKS: tuple[tuple[str, float], ...] = (
    ("NVIDIA H200 NVL", 836e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 836e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA A100", 312e12),
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
)


def peak_flops(devices: Sequence[Any]) -> float | None:
    """bfloat16 FLOP/s of all devices together; None where one has no figure in `PEAKS`: a CPU, or a part (MIG) of a GPU."""
    total = 0.0
    for device in devices:
        kind = device.device_kind
        peak = next((peak for start, peak in PEAKS if kind.startswith(start) and "MIG" not in kind), None)
        if peak is None:
            return None
        total += peak
    return total or None


def model_flops(problem: Any, state: TrainState, frozen: Any, batch: Batch) -> int:
    """FLOPs that a training step needs: three forward passes of the student (one, and two backward) and one of the teacher.

    What an implementation repeats to save memory is not counted, and what pruning has zeroed is. Arguments as `forward_flops`.
    """
    student, teacher = forward_flops(problem, state, frozen, batch)
    return 3 * student + teacher


def forward_flops(problem: Any, state: TrainState, frozen: Any, batch: Batch) -> tuple[int, int]:
    """FLOPs of a forward pass of the student and of its teacher, 0 without one, on a whole batch.

    Args:
        problem: a `train.Problem`.
        state: its state, real or abstract.
        frozen: the teacher's {"params", "model_state"}, or None.
        batch: arrays or ShapeDtypeStructs of one whole batch.
    """

    def forward(model: Any, params: Any, model_state: Any) -> int:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, model_state, dict(batch)))
        return trace.flops(lambda p, s, b: model.apply(p, s, b)[0].logits, *shapes)

    student = forward(problem.model, state.params["model"], state.model_state)
    if problem.mean_teacher:
        return student, student
    return student, forward(problem.teacher, frozen["params"], frozen["model_state"]) if problem.teacher is not None else 0


def peak_memory(devices: Sequence[Any]) -> int | None:
    """Most bytes that were ever in use on one of the devices; None where none of them counts, as on a CPU."""
    stats = [device.memory_stats() or {} for device in devices]
    peaks = [int(stat["peak_bytes_in_use"]) for stat in stats if "peak_bytes_in_use" in stat]
    return max(peaks, default=None)


class Meter:
    """Speed between two lines of the log. A step costs two clock readings; everything else happens at a line.

    The clock starts when the first step is done, so that compiling it does not count, and stands still while the loop
    evaluates and saves.

    Args:
        items: examples or tokens of a batch, padding included.
        unit: "examples" or "tokens".
        flops: of a step, as `model_flops` counts them; None without a peak to compare them with.
        devices: those of the mesh, for memory and peak.
        schedule: step -> learning rate, to log it too.
        clock: seconds.
    """

    def __init__(
        self,
        items: int,
        unit: str = "examples",
        *,
        flops: int | None = None,
        devices: Iterable[Any] = (),
        schedule: optax.Schedule | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._items, self._unit, self._flops = items, unit, flops
        devices = list(devices)
        self._peak = peak_flops(devices)
        self._local = [device for device in devices if device.process_index == jax.process_index()]
        self._schedule = schedule
        self._clock = clock
        self._start, self._done = 0.0, -1  # when, and after how many steps, the present window began
        self._waited = 0.0
        self._silent = False  # nothing to say of a state, so nothing to dispatch

    @classmethod
    def of(cls, problem: Any, state: TrainState, frozen: Any, batch: Batch, devices: Iterable[Any], schedule: Any) -> Meter:
        """The meter of a run; `batch` is any one of it, the other arguments are as for `model_flops` and for the class."""
        targets, devices = np.shape(batch["targets"]), list(devices)
        # Tracing the models takes a while; without a peak nothing is divided by it.
        flops = model_flops(problem, state, frozen, batch) if peak_flops(devices) else None
        unit = "tokens" if len(targets) > 1 else "examples"
        return cls(math.prod(targets), unit, flops=flops, devices=devices, schedule=schedule)

    def next(self, batches: Iterator[Item]) -> Item:
        """`next(batches)`, and the time it takes is counted as waiting for data."""
        before = self._clock()
        batch = next(batches)
        self._waited += self._clock() - before
        return batch

    def probe(self, state: TrainState) -> dict[str, jax.Array]:
        """What a line says of a state, on the device; it does not wait."""
        if self._silent:
            return {}
        figures = probe(state.step, state.opt_state["model"], state.params["model"], self._schedule)
        self._silent = not figures
        return figures

    @property
    def running(self) -> bool:
        """Whether the clock has started, which the first `line` does."""
        return self._done >= 0

    def line(self, done: int) -> dict[str, float]:
        """Figures of the steps since the last line that had some.

        Args:
            done: how many updates the device is known to have done now.

        Returns:
            steps_per_s; examples_per_s or tokens_per_s; data_wait, the fraction of the time that went to `next`; mfu, the
            model FLOPs of the steps as a fraction of what all devices could have done in bfloat16; memory_gib, the most that was
            ever in use on one device. What cannot be known is left out: speed where no step was done since, mfu and memory on
            a CPU.
        """
        figures, now = {}, self._clock()
        seconds, steps = now - self._start, done - self._done
        if self.running and steps > 0 and seconds > 0:
            rate = steps / seconds
            figures = {"steps_per_s": rate, f"{self._unit}_per_s": rate * self._items, "data_wait": self._waited / seconds}
            if self._flops is not None and self._peak is not None:
                figures["mfu"] = rate * self._flops / self._peak
        if figures or not self.running:
            self._start, self._done, self._waited = now, done, 0.0
        memory = peak_memory(self._local)
        return figures if memory is None else {**figures, "memory_gib": memory / 2**30}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands still meanwhile."""
        before = self._clock()
        yield
        self._start += self._clock() - before


@functools.partial(jax.jit, static_argnames="schedule")
def probe(step: jax.Array, opt_state: Any, params: Params, schedule: optax.Schedule | None) -> dict[str, jax.Array]:
    """Scalars of a state: the learning rate of its last update, and how sparse the pruned arrays are.

    Args:
        step: updates done.
        opt_state: of the model's optimiser; pruning masks are found in it, if there are any.
        params: of the model; packed masks take their shapes from them.
        schedule: step -> learning rate.

    Returns:
        learning_rate; "sparsity/<path>", the fraction that is dropped of each pruned array; and "sparsity/layers/3", that of all
        pruned arrays in one layer, where arrays below "layers" stack the layers on their first axis; nan_scores, how many scores
        that masks were made from were NaN so far.
    """
    figures = {}
    if schedule is not None:
        figures["learning_rate"] = jnp.asarray(schedule(jnp.maximum(step - 1, 0)), jnp.float32)
    if prune.prunes(opt_state):
        figures.update({f"sparsity/{path}": value for path, value in _sparsity(opt_state, params).items()})
        figures["nan_scores"] = prune.nan_scores(opt_state)
    return figures


def _sparsity(opt_state: Any, params: Params) -> dict[str, jax.Array]:
    pruned = {path: mask for path, mask in trees.paths(prune.masks(opt_state, params)).items() if mask.ndim > 0}
    figures = {path: _dropped(mask).sum() / mask.size for path, mask in pruned.items()}
    stacks = [mask for path, mask in pruned.items() if re.match(r"layers/(?!\d)", path) and mask.ndim > 2]
    if stacks:
        size = sum(mask[0].size for mask in stacks)
        by_layer = sum(_dropped(mask).sum(axis=range(1, mask.ndim - 1)) for mask in stacks) / size
        figures.update({f"layers/{layer}": by_layer[layer] for layer in range(len(stacks[0]))})
    return figures


def _dropped(mask: jax.Array) -> jax.Array:
    """Float32 counts of what is dropped in each last axis: whole numbers of weights add up beyond int32."""
    return jnp.sum(~mask, axis=-1, dtype=jnp.int32).astype(jnp.float32)
