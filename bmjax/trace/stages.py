"""What lies between a function's linear layers, compiled: the programs, visits and loops that a pass over data consists of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax

from bmjax.trace.bind import bind
from bmjax.trace.linear import Constant, Loop, Planner, Product, Run, runs


@dataclasses.dataclass(eq=False)
class Segment:
    """Primitives that are compiled together. `keep` are the slots that stay afterwards."""

    ins: list[int]
    outs: list[int]
    program: Any
    batched: bool
    keep: frozenset[int]


@dataclasses.dataclass(eq=False)
class Visit:
    """A layer's kernel may change before the product is run."""

    product: Product
    input: int
    keep: frozenset[int]


@dataclasses.dataclass(eq=False)
class Layers:
    """A loop whose body is run step by step; `stacked` are the (output, slot inside) that must be collected."""

    loop: Loop
    body: list[Stage]
    stacked: list[tuple[int, int | Constant]]
    keep: frozenset[int]


Stage: TypeAlias = Segment | Visit | Layers


def slots(values: Iterable[int | Constant], planner: Planner) -> set[int]:
    """Those that an environment has to hold."""
    return {v for v in values if not isinstance(v, Constant) and v not in planner.places and v not in planner.consts}


def staged(steps: Sequence[Run | Loop], wanted: set[int], planner: Planner) -> list[Stage]:
    """Backwards through the steps, so that each stage knows what is still wanted after it; what nobody wants is left out."""
    stages: list[Stage] = []
    pending: list[Run] = []

    def close() -> None:
        # What does not depend on the batch goes first and is run once.
        for batched in (True, False):
            runs = [run for run in pending[::-1] if run.batched == batched]
            if runs:
                stages.append(_segment(runs, wanted, batched, planner))
        pending.clear()

    for step in reversed(steps):
        if isinstance(step, Loop):
            close()
            stage = _layers(step, wanted, planner)
            if stage is not None:
                stages.append(stage)
            continue
        if not wanted.isdisjoint(step.outs) or any(not later.isdisjoint(step.outs) for later in _needs(pending, planner)):
            pending.append(step)
        if step.product is not None:
            close()
            (other,) = slots([step.ins[1 - step.product.kernel]], planner)
            stages.append(Visit(step.product, other, frozenset(wanted)))
            wanted.add(other)
    close()
    return stages[::-1]


def _needs(pending: Sequence[Run], planner: Planner) -> Iterable[set[int]]:
    return (slots(run.ins, planner) for run in pending)


def _segment(steps: Sequence[Run], wanted: set[int], batched: bool, planner: Planner) -> Segment:
    """Updates `wanted` to what is wanted before it."""
    keep = frozenset(wanted)
    made = {slot for step in steps for slot in step.outs}
    outs = sorted(made & wanted)
    ins = sorted({value for step in steps for value in step.ins if not isinstance(value, Constant)} - made)
    wanted -= made
    wanted |= slots(ins, planner)

    def program(*values: Any) -> list[Any]:
        env: dict[int, Any] = dict(zip(ins, values))
        for step in steps:
            inputs = [value.value if isinstance(value, Constant) else env[value] for value in step.ins]
            env.update(zip(step.outs, bind(step, inputs)))
        return [env[slot] for slot in outs]

    return Segment(ins, outs, jax.jit(program), batched, keep)


def _layers(loop: Loop, wanted: set[int], planner: Planner) -> Layers | None:
    """None if nothing in it is wanted and no layer in it is visited."""
    visited = any(run.product is not None for run in runs(loop.body))
    if not visited and wanted.isdisjoint(loop.outs):
        return None
    keep = frozenset(wanted)
    carried, stacked = loop.body_outs[: loop.carries], list(zip(loop.outs, loop.body_outs))[loop.carries :]
    stacked = [(out, inside) for out, inside in stacked if out in wanted]
    inner = slots([*carried, *(inside for _, inside in stacked)], planner)
    body = staged(loop.body, inner, planner)
    wanted -= set(loop.outs)
    wanted |= slots(loop.ins, planner)
    return Layers(loop, body, stacked, keep)
