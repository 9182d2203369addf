"""What the benchmarks' trainings share: data, the optimiser of a language model, its score, and parameters that are kept."""

import argparse
import functools
import pathlib
from typing import Any


def images(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(dataset, mesh) by the flags. Raises ValueError where source, sizes, batch and devices do not fit each other."""
    return _loaded(arguments, size=arguments.pixels, limit=arguments.images, test=arguments.test, valid=0.01)


def texts(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(dataset of bytes, mesh) by the flags. Raises ValueError as `images`, and where the source does not give bytes."""
    dataset, mesh = _loaded(arguments, length=arguments.length)
    if dataset.kind != "tokens" or dataset.classes != 256:
        raise ValueError(f"--source is {arguments.source!r}; expected text:<file or folder>, which gives rows of bytes")
    return dataset, mesh


def _loaded(arguments: argparse.Namespace, **how: Any) -> tuple[Any, Any]:
    from bmjax import data, parallel

    mesh = parallel.make_mesh(arguments.mesh)
    parallel.check_batch(arguments.batch, mesh)
    return data.load(data.Data(source=arguments.source, batch=arguments.batch, **how)), mesh


def adamw(learning_rate: float) -> Any:
    """The optimiser's config of a language model: warm-up, cosine decay to a tenth, clipped."""
    from bmjax.train.optimizer import Optimizer

    how: dict[str, Any] = {"b2": 0.95, "weight_decay": 0.1, "warmup": 0.1, "end": 0.1, "clip": 1.0}
    return Optimizer(name="adamw", learning_rate=learning_rate, **how)


def bits(arguments: argparse.Namespace, dataset: Any, mesh: Any, model: Any, params: Any) -> float:
    """Bits per byte on --test-rows rows spread over the test split."""
    from bmjax import data, parallel
    from bmjax.train import run as runs

    batches = data.eval_batches(dataset.test, arguments.batch)
    count = min(-(-arguments.test_rows // arguments.batch), len(batches)) or len(batches)
    spread = (parallel.put_batch(batches[i * len(batches) // count], mesh) for i in range(count))
    logits = functools.partial(runs.predictor(model), params, {})
    return float(runs.score(dataset, dataset.test, spread, logits).summary["bits_per_token"])  # tokens are bytes


def keep(path: pathlib.Path, params: Any) -> None:
    """Writes parameters to an .npz file, whole or not at all."""
    import jax
    import numpy as np

    from bmjax import trees

    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **trees.paths(jax.device_get(params)))
    partial.replace(path)


def kept(path: pathlib.Path, model: Any, mesh: Any) -> Any:
    """The parameters in a file of `keep`, on the devices."""
    import jax
    import numpy as np

    from bmjax import parallel, trees
    from bmjax.train import run as runs

    with np.load(path) as file:
        params = trees.nested(dict(file))
    return jax.device_put(params, parallel.partition(params, runs.rules_of(model), mesh))
