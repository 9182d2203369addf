"""Predicts with an exported model on new input. It needs jax, numpy, safetensors and absl only: no bmjax, no flax.

python -m experiments.predict --model=runs/digits/export --input=new.npz --output=predictions.csv
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from absl import flags

FLAGS = flags.FlagValues()  # our own, so that --help lists nothing else
flags.DEFINE_string("model", None, "Folder of an exported model, with its manifest.json; required.", flag_values=FLAGS)
flags.DEFINE_string("input", None, "File of inputs, .npy or .npz, the first axis is the example; required.", flag_values=FLAGS)
flags.DEFINE_string("key", "inputs", "Name of the inputs' array in an .npz file.", flag_values=FLAGS)
flags.DEFINE_string(
    "output",
    None,
    "File to write, .csv (classes) or .npz (classes and logits); without it a few rows are printed.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("batch", 256, "Examples in one call of the model.", lower_bound=1, flag_values=FLAGS)

ROWS_SHOWN = 5


def predict(model: Callable[[np.ndarray], Any], inputs: np.ndarray, batch: int) -> np.ndarray:
    """Logits [n, ..., classes] as float32 of inputs [n, ...]."""
    starts = range(0, len(inputs), batch)
    return np.concatenate([np.asarray(model(inputs[start : start + batch]), np.float32) for start in starts])


def verified_manifest(directory: pathlib.Path) -> dict[str, Any]:
    """The manifest's data, after every file's length and SHA-256 were found as listed.

    Raises:
        ValueError: the folder or its manifest is missing, or a file is missing or altered.
    """
    if not directory.is_dir():
        raise ValueError(f"--model={directory} is not a folder; give the one that an export wrote")
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        data, files = manifest["data"], manifest["files"]
        data["input"]["shape"], data["input"]["dtype"], data["classes"], files["model.jaxexport"], files["params.safetensors"]
    except FileNotFoundError:
        inner = directory / "export"
        where = f"--model={inner}" if (inner / "manifest.json").is_file() else "the folder that an export wrote"
        raise ValueError(f"{directory} has no manifest.json; give {where}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{directory / 'manifest.json'} is damaged, or not of an exported model; export again") from None
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path} is missing, but the manifest lists it; export again")
        content = path.read_bytes()
        if len(content) != expected["bytes"] or hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise ValueError(f"{path} was altered: its length or SHA-256 is not the manifest's; export again")
    return data


def load_model(directory: pathlib.Path) -> Callable[[np.ndarray], Any]:
    """The exported program with its parameters: inputs [B, ...] -> logits [B, ..., classes]."""
    import jax
    from jax import export
    from safetensors.numpy import load_file

    call = jax.jit(export.deserialize(bytearray((directory / "model.jaxexport").read_bytes())).call)
    params = jax.device_put(load_file(directory / "params.safetensors"))
    return lambda inputs: call(params, inputs)


def output_shape(model: Callable[[np.ndarray], Any], inputs: np.ndarray) -> tuple[int, ...]:
    """Shape of all predictions, [n, ...], without a compile."""
    import jax

    return tuple(jax.eval_shape(model, inputs).shape[:-1])


def read_input(path: pathlib.Path, key: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(inputs, targets or None) of an .npy or .npz file.

    Raises:
        ValueError: the file is missing, is neither, or has no array of that name.
    """
    if not path.is_file():
        raise ValueError(f"--input={path} is not a file")
    try:
        content = np.load(path, allow_pickle=False)
        arrays = {"": content} if isinstance(content, np.ndarray) else dict(content)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error):
        raise ValueError(f"{path} is not a readable .npy or .npz file of numbers") from None
    if "" in arrays:
        return arrays[""], None
    if key not in arrays:
        raise ValueError(f"{path} has no array {key!r}; there are {', '.join(sorted(arrays)) or 'none'}: choose with --key")
    return arrays[key], arrays.get("targets")


def check_inputs(inputs: np.ndarray, shape: list[int], dtype: str, vocabulary: int = 0) -> np.ndarray:
    """The inputs in the model's dtype.

    Raises:
        ValueError: another shape or kind of number, no example, NaN or infinity, whole numbers that the dtype cannot hold, or
            token ids outside the vocabulary (0 if they are none).
    """
    expected = f"the model takes [n, {', '.join(map(str, shape))}] {dtype}"
    if list(inputs.shape[1:]) != shape or inputs.ndim == 0:
        raise ValueError(f"the inputs have shape {list(inputs.shape)}, but {expected}")
    whole = dtype.startswith(("int", "uint"))
    if inputs.dtype.kind not in ("iu" if whole else "f"):
        raise ValueError(f"the inputs are {inputs.dtype}, but {expected}; scale and convert them as in training")
    if len(inputs) == 0:
        raise ValueError(f"the input is empty: shape {list(inputs.shape)}")
    if whole:
        limits = np.iinfo(dtype)
        if inputs.min() < limits.min or inputs.max() > limits.max:
            raise ValueError(f"the inputs lie between {inputs.min()} and {inputs.max()}, beyond what {dtype} holds")
        if vocabulary and (inputs.min() < 0 or inputs.max() >= vocabulary):
            raise ValueError(
                f"the inputs hold ids from {inputs.min()} to {inputs.max()}, but the model's vocabulary is 0 to "
                f"{vocabulary - 1}; encode the text as in training"
            )
        return inputs.astype(dtype)
    with np.errstate(over="ignore"):
        inputs = inputs.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1))
    if len(bad):
        raise ValueError(f"the inputs hold NaN or infinity, first in example {bad[0]} ({len(bad)} of {len(inputs)} examples)")
    return inputs if dtype == "float32" else inputs.astype(np.dtype(_float_type(dtype)))


def _float_type(dtype: str) -> Any:
    import jax.numpy as jnp  # knows bfloat16, which numpy alone does not

    return jnp.dtype(dtype)


def check_targets(targets: np.ndarray, shape: tuple[int, ...], classes: int, source: pathlib.Path) -> None:
    """Raises ValueError if targets are no class of each prediction, whose shape is given."""
    if targets.shape != shape:
        raise ValueError(f"the targets in {source} have shape {list(targets.shape)}, expected {list(shape)}")
    if targets.dtype.kind not in "iu" or targets.min() < 0 or targets.max() >= classes:
        found = f"{targets.min()} to {targets.max()}" if targets.dtype.kind in "iuf" else str(targets.dtype)
        raise ValueError(f"the targets in {source} are {found}; expected whole numbers, classes from 0 to {classes - 1}")


def report(predictions: np.ndarray, confidence: np.ndarray, targets: np.ndarray | None, names: list[str]) -> list[str]:
    """The lines to print: how often each class was predicted, and the accuracy where targets are known."""
    counts = np.bincount(predictions.reshape(-1), minlength=len(names))
    width = max(map(len, names))
    lines = [f"{predictions.size:,} predictions, mean confidence {confidence.mean():.3f}"]
    lines += [f"  {name:>{width}}  {count:>8,}  {count / predictions.size:6.1%}" for name, count in zip(names, counts) if count]
    if targets is not None:
        right = int(np.sum(targets == predictions))
        lines.append(f"accuracy {right / predictions.size:.4f} ({right:,} of {predictions.size:,})")
    return lines


def write(path: pathlib.Path, predictions: np.ndarray, confidence: np.ndarray, logits: np.ndarray, names: list[str]) -> None:
    """Writes a .csv with one row an example, or an .npz with predictions, confidence and logits."""
    if path.suffix == ".npz":
        np.savez(path, predictions=predictions, confidence=confidence, logits=logits)
        return
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["example", "class", "name", "confidence"])
        for i, (k, p) in enumerate(zip(predictions, confidence)):
            writer.writerow([i, int(k), names[k], f"{p:.6f}"])


def run() -> None:
    """Everything after the flags were parsed.

    Raises:
        ValueError: anything about the files that the user can put right.
    """
    directory, source = pathlib.Path(FLAGS.model), pathlib.Path(FLAGS.input)
    target = pathlib.Path(FLAGS.output) if FLAGS.output else None
    if target is not None and (target.suffix not in (".csv", ".npz") or not target.parent.is_dir()):
        raise ValueError(f"--output={target} must end in .csv or .npz and lie in a folder that exists")
    data = verified_manifest(directory)
    inputs, targets = read_input(source, FLAGS.key)
    vocabulary = (data.get("metadata") or {}).get("vocabulary", 0)
    inputs = check_inputs(inputs, data["input"]["shape"], data["input"]["dtype"], vocabulary)
    model = load_model(directory)
    shape = output_shape(model, inputs)
    if targets is not None:
        check_targets(targets, shape, data["classes"], source)
    if target is not None and target.suffix == ".csv" and len(shape) > 1:
        raise ValueError(f"each example has {math.prod(shape[1:])} predictions, which a .csv cannot hold; write an .npz")
    logits = predict(model, inputs, FLAGS.batch)
    predictions = logits.argmax(axis=-1)
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    confidence = 1 / shifted.sum(axis=-1)
    names = data.get("class_names") or [str(i) for i in range(data["classes"])]
    for line in report(predictions, confidence, targets, names):
        print(line)
    if target is None:
        for i in range(min(ROWS_SHOWN, len(predictions))):
            shown = names[predictions[i]] if predictions.ndim == 1 else predictions[i].tolist()
            print(f"example {i}: {shown}")
        print(f"{len(predictions):,} examples; --output=<file.csv or .npz> keeps them all")
    else:
        write(target, predictions, confidence, logits, names)
        print(f"written to {target}")


def usage() -> str:
    """The help text: every flag with type, default and one line."""
    lines = [(__doc__ or "").strip(), "", "Flags:"]
    for name in sorted(FLAGS):
        flag = FLAGS[name]
        default = "none" if flag.default is None else flag.default
        lines += [f"  --{name}  ({flag.flag_type()}, default: {default})", f"      {flag.help}"]
    return "\n".join(lines)


def fail(message: str) -> NoReturn:
    """One line to stderr and exit code 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def main(argv: list[str]) -> None:
    """Parses the flags and predicts; exit code 2 and one line where the user can put something right."""
    if {"--help", "-h", "-help"} & set(argv):
        print(usage())
        return
    try:
        stray = FLAGS(argv)[1:]
    except flags.Error as error:
        fail(f"{error}; --help lists the flags")
    if stray:
        fail(f"unexpected argument {stray[0]!r}; every setting is a flag, for example --model=<folder>")
    missing = [f"--{name}" for name in ("model", "input") if not FLAGS[name].value]
    if missing:
        fail(f"{' and '.join(missing)} must be given: python -m experiments.predict --model=<folder> --input=<file.npz>")
    try:
        run()
    except (ValueError, OSError) as error:
        fail(str(error))


if __name__ == "__main__":
    main(sys.argv)
