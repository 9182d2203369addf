"""Meshes from a string, and where a batch lives on one."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")


def parse_mesh(spec: str, devices: int) -> dict[str, int]:
    """Sizes of all axes from "data=2,fsdp=4"; one axis may be -1, which takes the devices that are left.

    Args:
        spec: comma-separated axis=size; axes that are not named have size 1.
        devices: number of devices, all of which must be used.

    Raises:
        ValueError: an unknown or repeated axis, a size that is no positive number, or a product that is not `devices`.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes:
            problem = "appears twice" if axis in sizes else f"is not one of {', '.join(AXES)}"
            raise ValueError(f"mesh {spec!r}: the axis {axis!r} {problem}; write for example 'data=2,fsdp=4'")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise ValueError(f"mesh {spec!r}: {part!r} has no whole number; write for example '{axis}=2'") from None
        if sizes[axis] < 1 and sizes[axis] != -1:
            raise ValueError(f"mesh {spec!r}: {axis} is {sizes[axis]}; expected a positive number, or -1 for all that are left")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh {spec!r}: only one axis can be -1")
    used = math.prod(size for size in sizes.values() if size != -1)
    if free and devices % used == 0:
        sizes[free[0]] = devices // used
        used = devices
    if used != devices:
        problem = f"{used} does not divide the {devices} devices" if free else f"it takes {used} devices, but there are {devices}"
        raise ValueError(
            f"mesh {spec!r}: {problem}; change the mesh, or the number of devices (JAX_NUM_CPU_DEVICES simulates them)"
        )
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(spec: str = "data=-1", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over all devices (or those given).

    Raises:
        ValueError: as `parse_mesh`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = parse_mesh(spec, len(devices))
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def is_partitioned(mesh: Mesh) -> bool:
    """True if parameters may be split: fsdp or tensor is above 1."""
    return mesh.shape["fsdp"] * mesh.shape["tensor"] > 1


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of something that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch(batch: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises ValueError unless a batch of `batch` examples splits evenly over the mesh and the microbatches."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch < 1 or batch % (shards * accumulate):
        parts = f"{shards} devices" + (f" x {accumulate} microbatches" if accumulate > 1 else "")
        raise ValueError(f"a batch of {batch} does not divide over {parts}; take a multiple of {shards * accumulate}")


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays onto the mesh, each device its own rows.

    Raises:
        ValueError: the rows do not divide over the devices.
    """
    check_batch(len(next(iter(batch.values()))), mesh)
    return jax.device_put(dict(batch), batch_sharding(mesh))


def feed(batches: Iterable[Any], mesh: Mesh, ahead: int = 2) -> Iterator[Any]:
    """Batches as a step takes them best.

    On an accelerator they are put on the mesh `ahead` steps before they are needed, while it works on earlier ones. On a CPU
    they stay host arrays: there is nothing to copy ahead of, and the jitted call, which knows where its arguments go, takes
    only those that it reads, each in half the time of `device_put`. Only what all batches share is put, once.

    Args:
        batches: dicts of host arrays.
        mesh: where they go.
        ahead: batches in flight to an accelerator.
    """
    if jax.default_backend() == "cpu" and jax.process_count() == 1:
        shared: dict[str, tuple[Any, jax.Array]] = {}
        for batch in batches:
            for name, value in batch.items():
                if isinstance(value, np.ndarray) and not value.flags.writeable:
                    if name not in shared or shared[name][0] is not value:
                        shared[name] = value, jax.device_put(value, batch_sharding(mesh))
                    batch = {**batch, name: shared[name][1]}
            yield batch
        return
    waiting: collections.deque[Any] = collections.deque()
    for batch in batches:
        waiting.append(put_batch(batch, mesh))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting
