"""A model as three files that run without bmjax: model.jaxexport, params.safetensors and manifest.json."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax import manifest, trees
from bmjax.types import Params

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, PARAMS, STATE = "model.jaxexport", "params.safetensors", "state.safetensors"
TOLERANCE = 1e-5
_DTYPES = {  # names in a safetensors file
    **{f"F{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    "BF16": np.dtype(jnp.bfloat16),
    "BOOL": np.dtype(bool),
}


def export(
    fn: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    directory: str | os.PathLike[str],
    *,
    input_shape: Sequence[int],
    input_dtype: Any,
    classes: int,
    metadata: dict[str, Any],
    state: Params | None = None,
) -> pathlib.Path:
    """Writes a model for any batch size on CPU, CUDA and TPU, loads it back and compares; returns the directory.

    The parameters are an argument of the exported program, keyed by path, so that they are stored once and can be read by others.
    JAX keeps such programs readable for six months: they are for serving, not an archive.

    Args:
        fn: (params, inputs [B, *input_shape]) -> logits [B, ..., classes]; jitted or not, for one device.
        params: nested dict of arrays, on any devices.
        directory: made where it does not exist; files of an earlier export are replaced.
        input_shape: of one example.
        input_dtype: for example "float32"; for whole numbers the inputs are taken to be below `classes` (token ids).
        classes: width of the logits.
        metadata: what JSON can hold, kept in the manifest; "class_names" (one a class) gives predictions their names.
        state: the model's state (batch statistics), which `fn` holds as constants; kept beside the parameters for `load_state`.

    Raises:
        ValueError: logits of another width, class names that do not fit, metadata that JSON cannot hold, parameters of which two
            have the same path, or a loaded program whose logits differ by more than 1e-5 of their scale.
    """
    from safetensors.numpy import save_file

    host = jax.tree.map(np.asarray, jax.device_get(params))
    flat = trees.paths(host)
    program = _program(fn, host, tuple(input_shape), input_dtype, classes)
    data = _description(tuple(input_shape), input_dtype, classes, metadata)

    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / manifest.NAME).unlink(missing_ok=True)  # comes back last: without it an export is not valid
    (directory / PROGRAM).write_bytes(program)
    save_file({path: np.ascontiguousarray(leaf).reshape(leaf.shape) for path, leaf in flat.items()}, directory / PARAMS)
    (directory / STATE).unlink(missing_ok=True)
    if beside := {path: np.array(leaf, order="C") for path, leaf in trees.paths(jax.device_get(state or {})).items()}:
        save_file(beside, directory / STATE)
    _check_loaded(_read(directory), lambda inputs: jax.jit(fn)(host, inputs), tuple(input_shape), input_dtype, classes)
    manifest.write(directory, data)
    return directory


def load(directory: str | os.PathLike[str]) -> Callable[[Any], jax.Array]:
    """The exported model as a function: inputs [B, ...] -> logits [B, ..., classes].

    Raises:
        ValueError: the manifest, or a file listed in it, is missing or altered.
    """
    directory = pathlib.Path(directory)
    manifest.verify(directory)
    return _read(directory)


def load_params(directory: str | os.PathLike[str]) -> Params:
    """The parameters of an exported model as a nested dict of NumPy arrays.

    Raises:
        ValueError: the manifest, or a file listed in it, is missing or altered.
    """
    manifest.verify(directory)
    return _nested(pathlib.Path(directory) / PARAMS)


def map_params(directory: str | os.PathLike[str]) -> Params:
    """As `load_params`, but the arrays stay on the disk until a part of them is read: see `place`.

    Raises:
        ValueError: as `load_params`, or a dtype that NumPy does not have.
    """
    manifest.verify(directory)
    path = pathlib.Path(directory) / PARAMS
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    content = np.memmap(path, np.uint8, "r", offset=8 + size)
    leaves = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path} holds {name} as {entry['dtype']}; expected one of {', '.join(_DTYPES)}")
        first, last = entry["data_offsets"]
        leaves[name] = content[first:last].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return trees.nested(leaves)


def place(params: Params, shardings: Any) -> Params:
    """Arrays on the disk (`map_params`) as arrays on devices, of which each one's part is read by itself.

    Args:
        params: tree of arrays that can be sliced.
        shardings: a sharding for each.
    """

    def onto(array: Any, sharding: Any) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index]))

    return jax.tree.map(onto, params, shardings)


def load_state(directory: str | os.PathLike[str]) -> Params:
    """The model's state of an exported model, like its parameters; {} if it has none.

    Raises:
        ValueError: the manifest, or a file listed in it, is missing or altered.
    """
    manifest.verify(directory)
    path = pathlib.Path(directory) / STATE
    return _nested(path) if path.exists() else {}


def _nested(file: pathlib.Path) -> Params:
    """A safetensors file whose names are paths, as a nested dict."""
    from safetensors.numpy import load_file

    return trees.nested(load_file(file))


def _read(directory: pathlib.Path) -> Callable[[Any], jax.Array]:
    from jax.export import deserialize
    from safetensors.numpy import load_file

    call = jax.jit(deserialize(bytearray((directory / PROGRAM).read_bytes())).call)
    params = jax.device_put(load_file(directory / PARAMS))
    return lambda inputs: call(params, inputs)


def _program(
    fn: Callable[[Params, jax.Array], jax.Array], params: Params, input_shape: tuple[int, ...], input_dtype: Any, classes: int
) -> bytes:
    """The serialised program of (params by path, inputs) -> logits."""
    from jax import export as jax_export

    leaves = trees.paths(params)
    structure = jax.tree.structure(params)
    if len(leaves) != len(jax.tree.leaves(params)):
        raise ValueError("two parameters have the same path, because a name holds a slash; rename one of them")

    def forward(flat: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
        return fn(jax.tree.unflatten(structure, [flat[path] for path in leaves]), inputs)

    symbolic = jax_export.symbolic_shape(", ".join(["batch", *map(str, input_shape)]))
    inputs = jax.ShapeDtypeStruct(symbolic, np.dtype(input_dtype))
    exported = jax_export.export(jax.jit(forward), platforms=PLATFORMS)(trees.abstract(leaves), inputs)
    shape = exported.out_avals[0].shape
    if len(exported.out_avals) != 1 or len(shape) < 2 or shape[0] != symbolic[0] or shape[-1] != classes:
        raise ValueError(
            f"the function to export gives {exported.out_avals}; expected one array of logits [batch, ..., {classes}]"
        )
    if exported.nr_devices != 1:
        raise ValueError(f"the function to export is bound to {exported.nr_devices} devices; give one without shardings")
    return bytes(exported.serialize())


def _description(input_shape: tuple[int, ...], input_dtype: Any, classes: int, metadata: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says beside the hashes."""
    names = metadata.get("class_names")
    if names is not None and len(names) != classes:
        raise ValueError(f"class_names has {len(names)} names, but there are {classes} classes")
    try:
        json.dumps(metadata)
    except TypeError as error:
        raise ValueError(f"metadata holds what JSON cannot: {error}") from None
    return {
        "input": {"shape": list(input_shape), "dtype": np.dtype(input_dtype).name},
        "classes": classes,
        "class_names": None if names is None else [str(name) for name in names],
        "platforms": list(PLATFORMS),
        "jax": jax.__version__,
        "metadata": metadata,
    }


def _check_loaded(
    loaded: Callable[[Any], jax.Array],
    original: Callable[[Any], jax.Array],
    input_shape: tuple[int, ...],
    input_dtype: Any,
    classes: int,
) -> None:
    """Compares both on random batches of two sizes."""
    rng = np.random.default_rng(0)
    for batch in (1, 5):
        shape = (batch, *input_shape)
        whole = np.issubdtype(np.dtype(input_dtype), np.integer)
        inputs = (rng.integers(0, min(classes, 128), shape) if whole else rng.normal(size=shape)).astype(input_dtype)
        expected, found = (np.asarray(fn(inputs), np.float32) for fn in (original, loaded))
        error = float(np.max(np.abs(expected - found))) / max(1.0, float(np.max(np.abs(expected))))
        if not error <= TOLERANCE:
            raise ValueError(
                f"the exported model's logits differ from the original's by {error:.1e} of their scale (batch {batch})"
            )
