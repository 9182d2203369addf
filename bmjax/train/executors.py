"""Who runs the gradient on a mesh. All of them give the same numbers.

- replicated: on a mesh of `data` only. `jax.shard_map` over `data`, sums by hand.
- partitioned: on any mesh. The compiler splits everything, as the arrays are placed.
- pmap: on request, on a mesh of `data` only, in one process. `jax.pmap` of the same body.
- hybrid: on request, on a mesh of `data` and one or both of `fsdp` and `tensor`. `jax.shard_map` over `data` with sums by hand;
  the compiler does the rest.

In bfloat16 the executors that split by hand sum gradients in float32 over `data`; where the compiler splits, it sums partial
products in the dtype that they have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh, PartitionSpec

from bmjax import parallel
from bmjax.parallel import collectives
from bmjax.train.jaxprs import looked_up
from bmjax.train.problem import Frozen
from bmjax.types import Batch, Params, TrainState

Body: TypeAlias = Callable[[TrainState, Frozen, Batch], Any]  # (gradients, ...), all of it the same on every device
Executor: TypeAlias = Callable[[Body], Body]

NAMES = ("auto", "replicated", "partitioned", "pmap", "hybrid")
_WHOLE = PartitionSpec()


def choose(name: str, mesh: Mesh) -> Executor:
    """The executor called `name`; "auto" is replicated where only `data` is above 1, else partitioned.

    Raises:
        ValueError: no such executor, or it does not fit the mesh.
    """
    if name not in NAMES:
        raise ValueError(f"there is no executor {name!r}; there are {', '.join(NAMES)}")
    split, data = parallel.is_partitioned(mesh), mesh.shape["data"]
    if name == "auto":
        name = "replicated" if data > 1 and not split else "partitioned"
    sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    if name in ("replicated", "pmap") and split:
        raise ValueError(f"the executor {name} keeps parameters whole, and the mesh is {sizes}; take partitioned or hybrid")
    if name == "hybrid" and (data == 1 or not split):
        raise ValueError(
            f"the executor hybrid needs data above 1 and fsdp or tensor above 1, and the mesh is {sizes}; "
            f"take {'partitioned' if data == 1 else 'replicated'}"
        )
    if name == "pmap" and jax.process_count() > 1:
        raise ValueError(f"the executor pmap runs in one process, and there are {jax.process_count()}; take replicated")
    return {"replicated": _replicated, "partitioned": _partitioned, "pmap": _pmap, "hybrid": _hybrid}[name](mesh)


def _told(body: Body, axis: str | None, inner: str | None = None, split: tuple[int, int] = (1, 1)) -> Body:
    """The body, traced where `collectives` know how the batch is split."""

    def run(state: TrainState, frozen: Frozen, batch: Batch) -> Any:
        with collectives.over(axis, inner, split):
            return body(state, frozen, batch)

    return run


def _replicated(mesh: Mesh) -> Executor:
    specs = (_WHOLE, _WHOLE, PartitionSpec("data"))
    return lambda body: jax.shard_map(_told(body, "data"), mesh=mesh, in_specs=specs, out_specs=_WHOLE)


def _partitioned(mesh: Mesh) -> Executor:
    split = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    return lambda body: _told(body, None, None, split)


def _pmap(mesh: Mesh) -> Executor:
    devices = list(mesh.devices.flat)

    def spread(body: Body) -> Body:
        mapped = jax.pmap(_told(body, "data"), "data", in_axes=(None, None, 0), out_axes=None, devices=devices)

        def run(state: TrainState, frozen: Frozen, batch: Batch) -> Any:
            # pmap does not track which values differ between devices; the checks that need it run here, and compute nothing.
            jax.eval_shape(_replicated(mesh)(body), state, frozen, dict(batch))
            n = len(devices)
            return mapped(state, frozen, jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), dict(batch)))

        return run

    return spread


def _hybrid(mesh: Mesh) -> Executor:
    specs = (_WHOLE, _WHOLE, PartitionSpec("data"))

    def spread(body: Body) -> Body:
        def run(state: TrainState, frozen: Frozen, batch: Batch) -> Any:
            # Beside a manual axis the compiler aborts on looking rows up in a table that it has split, and on adding gradients to
            # them: such tables are whole inside.
            tables = looked_up(lambda params: body(state._replace(params=params), frozen, batch), state.params)

            def whole(params: Params) -> Params:
                return jax.tree.map(lambda p, table: jax.lax.with_sharding_constraint(p, _WHOLE) if table else p, params, tables)

            def gathered(state: TrainState, frozen: Frozen, batch: Batch) -> Any:
                grads, *rest = body(state._replace(params=whole(state.params)), frozen, batch)
                return whole(grads), *rest

            told = _told(gathered, "data", "fsdp", (mesh.shape["fsdp"], mesh.shape["tensor"]))
            mapped = jax.shard_map(told, mesh=mesh, in_specs=specs, out_specs=_WHOLE, axis_names={"data"})
            return mapped(state, frozen, dict(batch))

        return run

    return spread
