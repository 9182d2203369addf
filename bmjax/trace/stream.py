"""Runs a function over calibration batches from one linear layer to the next, and lets each kernel change on the way.

Between two layers only what the rest still needs is kept, for every batch: one cut through the network. What lies between them
is compiled as one program and run batch by batch, so that large intermediates (attention's scores) exist for one batch at a
time. A scan over layers is run layer by layer by the same programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from bmjax import trees
from bmjax.trace.inputs import Inputs
from bmjax.trace.layout import Step, read
from bmjax.trace.linear import Constant, Linear, Loop, Planner, Product, Run, plan, runs
from bmjax.trace.sides import Sides, sides_of
from bmjax.trace.stages import Layers, Segment, Stage, Visit, slots, staged
from bmjax.types import Params

Visitor: TypeAlias = Callable[[Linear, jax.Array, Inputs], jax.Array | None]
Environment: TypeAlias = dict[int, Any]  # a slot's value; a list, one for each batch, if it depends on the batch

_IN_FLIGHT = 8  # batches dispatched without waiting; hundreds would deadlock collectives on simulated devices


class Linears:
    """The linear layers of a function, and the means to go through them on data. Made by `linears`.

    Attributes:
        layers: in the order in which they are run.
        left: {path: why it is no linear layer's kernel}, of the parameters that the function uses in another way.
    """

    def __init__(self, fn: Callable[..., Any], params: Params, batch: Any, where: Iterable[str] | None):
        self._like = _shapes(batch)
        self._shapes = {path: tuple(leaf.shape) for path, leaf in trees.paths(params).items()}
        self._planner, steps, reasons, self._batch_slots = plan(fn, params, batch)
        chosen = set(self._shapes if where is None else where)
        self.left = {path: why for path, why in reasons.items() if why}
        kernels = {path for path, why in reasons.items() if not why} & chosen
        for run in runs(steps):
            if run.product is not None and run.product.place.path not in kernels:
                run.product = None
        self.layers = tuple(_listed(steps))
        self._stages = staged(steps, set(), self._planner)

    def sides(self) -> dict[str, Sides]:
        """{path: which axes of the whole parameter are inputs and outputs}; of a kernel used twice, as it is used last."""
        found = {layer.path: sides_of(layer, self._shapes[layer.path]) for layer in self.layers}
        return {path: sides for path, sides in found.items() if sides is not None}

    def contracting(self) -> dict[str, int]:
        """{path: the innermost axis of the whole parameter that its products contract}, negative: what n:m runs along."""
        both = {path: [*sides.taps, *sides.inputs] for path, sides in self.sides().items()}
        long = {path: [axis for axis in axes if self._shapes[path][axis] > 1] for path, axes in both.items()}
        return {path: axes[-1] for path, axes in long.items() if axes}

    def stream(self, params: Params, batches: Sequence[Any], visit: Visitor) -> Params:
        """Goes through the layers in order; each sees the inputs that the changed layers before it make.

        Args:
            params: as traced; they are left as they are.
            batches: of the structure and shapes that were traced, on any mesh.
            visit: (layer, its kernel [in, out] in the parameter's dtype, what enters it) -> the kernel from now on, or None for
                no change.

        Returns:
            The parameters with the kernels changed.

        Raises:
            ValueError: a batch has other shapes than the one that was traced.
        """
        for number, batch in enumerate(batches):
            if difference := trees.first_difference(self._like, _shapes(batch)):
                # A batch that is one array has no path.
                named = f"the batch{difference}" if difference.startswith(" ") else difference
                raise ValueError(f"calibration batches must be alike: in batch {number}, {named}")
        return _Stream(self._planner, params, batches, visit).run(self._stages, self._batch_slots)


def linears(fn: Callable[..., Any], params: Params, batch: Any, where: Iterable[str] | None = None) -> Linears:
    """Finds the linear layers of `fn(params, batch)` without running it.

    A layer is a product of something that depends on the batch with one parameter, or an ungrouped convolution by it. Parameters
    that are used in any other way beside it (a table that is looked up in and is the head too), by several products, or with
    batch axes (a kernel for each expert) are none; `left` says why.

    Args:
        fn: any JAX function. Calls, remat and custom derivatives are looked into, and scans over stacked kernels.
        params: tree of arrays or ShapeDtypeStructs.
        batch: any pytree of them. Where it is a mapping with "inputs" [B, ...] and "weights" [B] or [B, T], positions of weight 0
            do not count in the statistics of layers in whose rows the batch's axes can be followed.
        where: paths of the parameters that may change; all if None.
    """
    return Linears(fn, params, batch, where)


def contracting(fn: Callable[..., Any], params: Params, batch: Any) -> dict[str, int]:
    """{path: the axis that n:m runs along} of the kernels of `fn(params, batch)`, as `Linears.contracting`.

    Args:
        fn, params, batch: as for `linears`.
    """
    return linears(fn, params, batch).contracting()


def sides(fn: Callable[..., Any], params: Params, batch: Any) -> dict[str, Sides]:
    """{path: which axes are inputs and outputs} of the kernels of `fn(params, batch)`, as `Linears.sides`.

    Args:
        fn, params, batch: as for `linears`.
    """
    return linears(fn, params, batch).sides()


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.canonicalize_dtype(leaf.dtype)), tree)


def _listed(steps: Sequence[Run | Loop], at: tuple[int, ...] = ()) -> Iterable[Linear]:
    for step in steps:
        if isinstance(step, Loop):
            for i in _order(step):
                yield from _listed(step.body, (*at, i))
        elif step.product is not None:
            yield _linear(step.product, at)


def _linear(product: Product, at: tuple[int, ...]) -> Linear:
    inputs, outputs = product.place.chain[-1].shape  # type: ignore[union-attr]  # its last step is the matrix
    taps = 0 if product.rows.window is None else len(product.rows.window.shape)
    return Linear(product.place.path, at, inputs, outputs, product.place, taps)


def _order(loop: Loop) -> Sequence[int]:
    return range(loop.length)[::-1] if loop.reverse else range(loop.length)


@jax.jit
def _stack(values: Sequence[Any]) -> jax.Array:
    return jnp.stack(values)


@jax.jit
def _at(value: jax.Array, i: jax.Array) -> jax.Array:
    return value[i]


class _Stream:
    """One pass: the parameters as they are now, and what visits them."""

    def __init__(self, planner: Planner, params: Params, batches: Sequence[Any], visit: Visitor):
        self._planner, self._params, self._batches, self._visit = planner, params, batches, visit
        self._leaves = dict(trees.paths(params))
        self._written: set[str] = set()
        self._latest: tuple[int, Product, Inputs] | None = None
        weighted = isinstance(batches[0], Mapping) and "weights" in batches[0]
        self._weights = [batch["weights"] for batch in batches] if weighted else None

    def run(self, stages: Sequence[Stage], batch_slots: Sequence[int]) -> Params:
        columns = zip(*(jax.tree.leaves(batch) for batch in self._batches))
        self._stages(stages, {slot: list(column) for slot, column in zip(batch_slots, columns)}, ())
        return trees.replace(self._params, {path: self._leaves[path] for path in self._written})

    def _stages(self, stages: Sequence[Stage], env: Environment, at: tuple[int, ...]) -> None:
        for stage in stages:
            match stage:
                case Segment():
                    self._segment(stage, env, at)
                case Visit():
                    self._layer(stage, env, at)
                case Layers():
                    self._loop(stage, env, at)
            for slot in [slot for slot in env if slot not in stage.keep]:
                del env[slot]

    def _value(self, slot: int | Constant, env: Environment, at: tuple[int, ...]) -> Any:
        if isinstance(slot, Constant):
            return slot.value
        if slot in env:
            return env[slot]
        if slot in self._planner.places:
            place = self._planner.places[slot]
            depths = [layout.depth for layout in place.chain if isinstance(layout, Step)]
            return read(place, jnp.asarray(self._leaves[place.path]), at if depths else ())
        return self._planner.consts[slot]

    def _segment(self, stage: Segment, env: Environment, at: tuple[int, ...]) -> None:
        values = [self._value(slot, env, at) for slot in stage.ins]
        if not stage.batched:
            env.update(zip(stage.outs, stage.program(*values)))
            return
        found: list[list[Any]] = [[] for _ in stage.outs]
        dying = [env[s] for s in stage.ins if s in env and s not in stage.keep and isinstance(env[s], list)]
        for number in range(len(self._batches)):
            results = stage.program(*(value[number] if isinstance(value, list) else value for value in values))
            for column, result in zip(found, results):
                column.append(result)
            for column in dying:
                column[number] = None
            if number % _IN_FLIGHT == _IN_FLIGHT - 1:
                jax.block_until_ready(results)
        env.update(zip(stage.outs, found))

    def _layer(self, stage: Visit, env: Environment, at: tuple[int, ...]) -> None:
        layer, path = _linear(stage.product, at), stage.product.place.path
        if self._latest is None or self._latest[0] != stage.input or self._latest[1].rows != stage.product.rows:
            self._latest = None  # one layer's second moments at a time
            self._latest = (stage.input, stage.product, Inputs(stage.product.rows, env[stage.input], self._weights))
        leaf = jnp.asarray(self._leaves[path])
        new = self._visit(layer, layer.get(leaf), self._latest[2])
        if new is not None:
            self._leaves[path] = layer.put(leaf, new, donate=path in self._written)
            self._written.add(path)

    def _loop(self, stage: Layers, env: Environment, at: tuple[int, ...]) -> None:
        loop, count = stage.loop, len(self._batches)
        first = loop.consts + loop.carries
        carries = range(loop.consts, first)
        around = [self._value(slot, env, at) if i in carries or self._held(slot) else None for i, slot in enumerate(loop.ins)]
        for slot in slots(loop.ins, self._planner) - stage.keep:
            del env[slot]
        per_batch = lambda value: list(value) if isinstance(value, list) else [value] * count
        carry = [per_batch(value) for value in around[loop.consts : first]]
        around[loop.consts : first] = [None] * loop.carries
        collected: list[list[Any]] = [[None] * loop.length for _ in stage.stacked]
        for i in _order(loop):
            self._latest = None
            inside: Environment = dict(zip(loop.body_ins[loop.consts : first], carry))
            carry = []
            for number, (slot, value) in enumerate(zip(loop.body_ins, around)):
                if value is not None and slot not in self._planner.places:
                    inside[slot] = _taken(value, jnp.int32(i)) if number >= first else _copied(value)
            self._stages(stage.body, inside, (*at, i))
            carry = [per_batch(self._value(slot, inside, (*at, i))) for slot in loop.body_outs[: loop.carries]]
            for column, (_, result) in zip(collected, stage.stacked):
                column[i] = per_batch(self._value(result, inside, (*at, i)))
        env.update((slot, value) for slot, value in zip(loop.outs, carry) if slot in stage.keep)
        for (slot, _), column in zip(stage.stacked, collected):
            env[slot] = [_stack(values) for values in zip(*column)]

    def _held(self, slot: int | Constant) -> bool:
        """Whether it is no parameter; those the body reads itself."""
        return isinstance(slot, Constant) or slot not in self._planner.places


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _taken(value: Any, i: jax.Array) -> Any:
    return [_at(one, i) for one in value] if isinstance(value, list) else _at(value, i)
