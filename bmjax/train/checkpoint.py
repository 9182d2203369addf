"""Checkpoints: Orbax underneath, with a manifest of SHA-256 sums as the commit mark.

A step's folder counts from the moment its manifest.json is there. Orbax itself does not see flipped bits, and keeps naming a
damaged step as the latest; here a step is checked before it is read, and the newest intact one is taken, loudly.
"""

from __future__ import annotations

import contextlib
import json
import logging as python_logging
import math
import pathlib
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from bmjax import manifest, trees


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
        state: the tree, bit for bit as saved.
        step: the step it was saved at.
        metadata: what was saved beside it.
    """

    state: Any
    step: int
    metadata: dict[str, Any]


class _Spec(NamedTuple):
    shape: tuple[int, ...]
    dtype: str


class Checkpoints:
    """Saves and restores a training state in a directory; a context manager that waits for the last save on exit.

    Args:
        directory: one folder a step is made in it.
        keep: how many of the newest steps stay; the best one by its metric stays beside them.

    Raises:
        ValueError: keep is smaller than 1.
    """

    def __init__(self, directory: pathlib.Path | str, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; expected at least 1 checkpoint to keep")
        self._directory, self._keep = pathlib.Path(directory).absolute(), keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def save(self, step: int, state: Any, *, metric: float | None = None, metadata: Mapping[str, Any] | None = None) -> None:
        """Copies the state to the host and returns; writing and committing go on in the background.

        Waits for the save before, and raises its error if it had one. A step that is there already is replaced.

        Args:
            step: updates done.
            state: tree of arrays and typed PRNG keys, in any sharding.
            metric: of this state, higher is better; the best step is kept. NaN is no metric.
            metadata: anything that JSON can hold.
        """
        self.wait()
        folder = self._directory / f"{step:08d}"
        leaves = trees.paths(state)
        data = {
            "step": step,
            "metric": metric,
            "metadata": dict(metadata or {}),
            "arrays": {p: _spec(x) for p, x in leaves.items()},
        }
        if jax.process_index() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        arrays = {path: _plain(leaf) for path, leaf in leaves.items() if np.prod(leaf.shape) > 0}  # Orbax refuses empty arrays
        response = _orbax().save_async(folder / "state", arrays, overwrite=True)
        self._pending = self._thread.submit(self._commit, response, folder, data)

    def _commit(self, response: Any, folder: pathlib.Path, data: dict[str, Any]) -> None:
        response.result()
        if jax.process_index() != 0:
            return
        manifest.write(folder, data)
        stays = {*self.steps()[-self._keep :], *self._by_metric()[:1]}
        for other in self._directory.iterdir():  # a process that was killed leaves steps without a manifest
            if other.name.isdecimal() and int(other.name) < data["step"] and int(other.name) not in stays:
                shutil.rmtree(other)

    def wait(self) -> None:
        """Returns when the last save is committed.

        Raises:
            OSError: it could not be written (a full disk, for example).
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, then ends the background thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def steps(self) -> list[int]:
        """The committed steps, ascending."""
        folders = self._directory.glob(f"*/{manifest.NAME}")
        return sorted(int(path.parent.name) for path in folders if path.parent.name.isdecimal())

    def _by_metric(self) -> list[int]:
        """The committed steps that have a metric, best first, newer first among equals."""
        metrics = {}
        for step in self.steps():
            with contextlib.suppress(ValueError, KeyError, TypeError, OSError):  # a damaged manifest: `restore` reports it
                metrics[step] = json.loads((self._directory / f"{step:08d}" / manifest.NAME).read_text())["data"]["metric"]
        return sorted(
            (step for step, metric in metrics.items() if metric is not None and math.isfinite(metric)),
            key=lambda s: (metrics[s], s),
            reverse=True,
        )

    def restore(self, abstract: Any, *, best: bool = False) -> Restored | None:
        """The newest intact state, or the best one; None if nothing was ever committed.

        Args:
            abstract: tree of `jax.ShapeDtypeStruct` with shardings (any mesh), of the saved structure.
            best: by metric instead of by step.

        Raises:
            ValueError: the checkpoint does not fit the abstract tree (names the first leaf), or none is intact.
        """
        self.wait()
        candidates = self._by_metric() if best else self.steps()[::-1]
        damage = ""
        for step in candidates:
            folder = self._directory / f"{step:08d}"
            try:
                data = manifest.verify(folder)
            except ValueError as error:
                damage = damage or str(error)
                logging.error("checkpoint %s is damaged and set aside: %s", folder, error)
                with contextlib.suppress(OSError):  # a read-only folder stays as it is
                    folder.rename(folder.with_suffix(".damaged"))
                continue
            return Restored(_load(folder, abstract, data["arrays"]), step, data["metadata"])
        if damage:
            raise ValueError(f"no intact checkpoint is left in {self._directory}: {damage}")
        return None


def read(directory: pathlib.Path | str, *, step: int | None = None, best: bool = False) -> Restored:
    """A committed checkpoint as {path: NumPy array}, without a state to fit it to; changes nothing on the disk.

    Args:
        directory: as `Checkpoints` takes it.
        step: which one; None is the newest.
        best: the best one by its metric instead.

    Raises:
        ValueError: there is no such checkpoint, or a file of it is missing or altered (names it).
    """
    with Checkpoints(directory) as checkpoints:
        there, ranked = checkpoints.steps(), checkpoints._by_metric()
    if not there:
        raise ValueError(f"{directory} holds no checkpoint; was the run stopped before it saved one?")
    if best and not ranked:
        raise ValueError(f"no checkpoint in {directory} has a metric; name a step: {', '.join(map(str, there))}")
    chosen = ranked[0] if best else there[-1] if step is None else step
    if chosen not in there:
        raise ValueError(f"{directory} holds no checkpoint of step {chosen}; there are {', '.join(map(str, there))}")
    folder = pathlib.Path(directory).absolute() / f"{chosen:08d}"
    data = manifest.verify(folder)
    abstract = {path: jax.ShapeDtypeStruct(tuple(shape), dtype) for path, (shape, dtype) in data["arrays"].items()}
    return Restored(jax.device_get(_load(folder, abstract, data["arrays"])), chosen, data["metadata"])


def _load(folder: pathlib.Path, abstract: Any, saved: Mapping[str, Any]) -> Any:
    """The arrays of a verified folder in the structure and shardings of `abstract`."""
    wanted = trees.paths(abstract)
    if difference := _misfit(wanted, {path: _Spec(tuple(shape), dtype) for path, (shape, dtype) in saved.items()}):
        raise ValueError(f"checkpoint {folder} does not fit the model: {difference}")
    templates = {path: _template(leaf) for path, leaf in wanted.items()}
    try:
        arrays = _orbax().load(folder / "state", {path: x for path, x in templates.items() if np.prod(x.shape) > 0})
    except Exception as error:  # Orbax wraps causes of many kinds in a misleading one
        raise ValueError(f"checkpoint {folder} cannot be read: {_root_cause(error)}") from error
    empty = {path: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding) for path, x in templates.items() if path not in arrays}
    arrays = {**arrays, **empty}
    return trees.map_with_path(lambda path, leaf: _typed(arrays[path], leaf), abstract)


def _misfit(wanted: Mapping[str, Any], found: Mapping[str, _Spec]) -> str:
    """One line about the first leaf that differs, "" if none does; in the tree's own order, so that parameters come early."""
    for path, leaf in wanted.items():
        spec = _spec(leaf)
        if path not in found:
            return f"{path} is missing"
        if found[path].shape != spec.shape:
            return f"{path} has shape {list(found[path].shape)}, expected {list(spec.shape)}"
        if found[path].dtype != spec.dtype:
            return f"{path} is {found[path].dtype}, expected {spec.dtype}"
    return next((f"{path} is not expected" for path in found if path not in wanted), "")


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _spec(leaf: Any) -> _Spec:
    return _Spec(tuple(leaf.shape), str(leaf.dtype))


def _plain(leaf: Any) -> Any:
    """The array to write for a leaf: a typed key's data."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _template(leaf: Any) -> jax.ShapeDtypeStruct:
    """What to ask Orbax for."""
    plain = jax.eval_shape(_plain, leaf)
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)


def _typed(array: jax.Array, leaf: Any) -> jax.Array:
    """The array, as a typed key where `leaf` is one."""
    if not _is_key(leaf):
        return array
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)  # an abstract key tells its kind to a trace only
    return jax.random.wrap_key_data(array, impl=found[0])


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())


def _orbax() -> Any:
    """Orbax, imported at first use and made quiet: it logs dozens of lines a save through absl's logger."""
    from orbax.checkpoint import v1

    logger = python_logging.getLogger("absl")
    if _not_orbax not in logger.filters:
        logger.addFilter(_not_orbax)
    return v1


def _not_orbax(record: python_logging.LogRecord) -> bool:
    return record.levelno >= python_logging.ERROR or "/orbax/" not in record.pathname.replace("\\", "/")
