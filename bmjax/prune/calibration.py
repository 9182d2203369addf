"""Pruning without training, on calibration data: layer by layer, each seeing what the layers before it make.

    found = prune.layerwise(model, params, batches, prune.sparsegpt(), n=2, m=4)

A method is one function from a kernel and what enters it to a kernel and a mask. The layers come from the function's jaxpr.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bmjax import trees
from bmjax.prune import kinds, patterns, reconstruction, threshold
from bmjax.prune.allocation import Allocation
from bmjax.prune.criteria import Criterion
from bmjax.prune.outliers import by_outliers, owl_sparsities
from bmjax.prune.reconstruction import Target
from bmjax.trace import Inputs, Linear, Linears, linears
from bmjax.types import Model, Params


class Method(NamedTuple):
    """How one layer is pruned.

    Attributes:
        apply: (kernel [in, out] float32, what enters it, target) -> (kernel, mask, a note or "").
        check: raises ValueError for settings that do not go with a target.
        name: for messages.
        inputs: what enters a layer, when a call does not say: "pruned", what the pruned layers before it make, or "dense", what
            the network made before anything was pruned.
    """

    apply: Callable[[jax.Array, Inputs, Target], tuple[jax.Array, jax.Array, str]]
    check: Callable[[Target], None] = lambda target: None
    name: str = "this method"
    inputs: str = "pruned"


class LayerRow(NamedTuple):
    """One linear layer that was pruned.

    Attributes:
        path: of the parameter.
        layer: which of a stacked parameter, one number for each scan around it; () outside scans.
        size: number of weights.
        sparsity: fraction of them that was dropped.
        error: |X (W - W')|^2 / |X W|^2 on the calibration data, X being what enters the layer by the call's `inputs`.
        note: what was out of the ordinary, or "".
    """

    path: str
    layer: tuple[int, ...]
    size: int
    sparsity: float
    error: float
    note: str


class Calibrated(NamedTuple):
    """What `layerwise` returns.

    Attributes:
        params: pruned weights are exactly 0.
        masks: tree like the parameters: bool arrays where weights are pruned, a scalar True elsewhere.
        rows: a report of each layer, in the order of the forward pass.
        left: {path: why}, of the parameters that were to be pruned and are no linear layer's kernel.
        note: "there are 16 examples, fewer than the 128 asked for", or "".
    """

    params: Params
    masks: Params
    rows: tuple[LayerRow, ...]
    left: dict[str, str]
    note: str = ""


def wanda() -> Method:
    """The inputs with the smallest |W| ||x||, output by output; weights stay as they are. See `wanda_mask`.

    By the inputs of the dense network: where nothing makes up for what is lost, an input that the pruned layers before have
    weakened would count less and be weakened again.
    """

    def apply(kernel: jax.Array, inputs: Inputs, target: Target) -> tuple[jax.Array, jax.Array, str]:
        mask = reconstruction.by_scores(kernel, inputs.square_mean(), target)
        return jnp.where(mask, kernel, 0.0), mask, ""

    return Method(apply, name="wanda", inputs="dense")


def sparsegpt(block: int = 128, damp: float = 0.01) -> Method:
    """Pruned and made up for in the weights that are left, by the layer's Hessian. See `sparsegpt_update`."""

    def apply(kernel: jax.Array, inputs: Inputs, target: Target) -> tuple[jax.Array, jax.Array, str]:
        kernel, gram = _outputs_apart(kernel, inputs.gram())
        new, mask, used = reconstruction.solve(kernel, gram, target, block, damp)
        # The damping is rounded to float32 once, so only a retry is a larger one.
        return new, mask, f"damping raised to {float(used):.2g}" if float(used) > 1.01 * damp else ""

    return Method(apply, lambda target: reconstruction.check_settings(target, block, damp), "sparsegpt")


def smallest() -> Method:
    """The smallest weights of each layer: the baseline that sees no data."""

    def apply(kernel: jax.Array, inputs: Inputs, target: Target) -> tuple[jax.Array, jax.Array, str]:
        scores = jnp.abs(kernel)
        if target.n is not None and target.m is not None:
            mask = threshold.nm_mask(scores, target.n, target.m, axis=0)
        else:
            (mask,) = threshold.largest([scores], kernel.size - target.dropped(kernel.size))
        return jnp.where(mask, kernel, 0.0), mask, ""

    return Method(apply, name="smallest")


def layerwise(
    model: Model | Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    method: Method,
    *,
    sparsity: float | None = None,
    n: int | None = None,
    m: int | None = None,
    where: str | None = None,
    allocation: Allocation | None = None,
    samples: int | None = 128,
    state: Params = None,
    inputs: str | None = None,
) -> Calibrated:
    """Prunes the linear layers of a model on calibration data, one after the other; no training, no gradients.

    The layers are found in the jaxpr, scans over layers and convolutions included. For every batch only what the rest of the
    network needs is kept, and the second moments of one layer's input at a time. With batches and parameters on a mesh the
    compiler sums moments over devices. Positions of weight 0 in the batch do not count. Batch statistics in `state` are not
    made anew.

    Args:
        model: a `Model`, or any function (params, batch) -> outputs.
        params: of the model; they are left as they are. Any tree of arrays, on any mesh.
        batches: of equal shapes; for a `Model` mappings with "inputs" [B, ...].
        method: `wanda()`, `sparsegpt()`, `smallest()`, or one of your own.
        sparsity: fraction of each layer to drop, in [0, 1).
        n, m: instead of a sparsity: of each m neighbouring inputs of an output n stay.
        where: regex of the parameters to prune; without one the rule is `patterns.left_out`, as for `sparsify`.
        allocation: `owl()`, by blocks of layers; or `uniform()`, as without one.
        samples: examples to use; batches are read until there are as many. If there are fewer, `note` of what is returned says
            so. None for all.
        state: the model's state, such as batch statistics.
        inputs: "pruned" or "dense", what a layer sees, as for `Method`; the method's own if None.

    Raises:
        ValueError: before any layer is pruned: no data, without examples or all of weight 0, or batches of several shapes; an
            argument of another kind; both or neither of a sparsity and n:m, or one out of range; weights that are NaN or no
            floats; no linear layer among the chosen parameters; m does not divide a layer's inputs. Later: what enters a layer
            is not finite.
    """
    target = Target(sparsity, n, m)
    _check(target, method, allocation, samples)
    inputs = method.inputs if inputs is None else inputs
    if inputs not in ("pruned", "dense"):
        raise ValueError(f"inputs is {inputs!r}; expected 'pruned' or 'dense', the network whose activations enter each layer")
    paths = patterns.chosen(params, where)
    leaves = trees.paths(params)
    kinds.floats(leaves, paths)
    for path in paths:
        threshold.refuse_nan(f"weights of {path}", leaves[path])
    data, note = _read(batches, samples)
    fn = model if callable(model) else lambda params, batch: model.apply(params, state or {}, batch)[0].logits
    found = linears(fn, params, data[0], paths)
    pruned = {layer.path for layer in found.layers}
    left = {path: found.left.get(path, "the function does not use it") for path in paths if path not in pruned}
    if not found.layers:
        raise ValueError(f"there is no linear layer to prune: {'; '.join(f'{path}: {why}' for path, why in left.items())}")
    for layer in found.layers:
        target.check_inputs(layer.inputs, layer.name)
    targets = [target] * len(found.layers)
    if allocation is not None and allocation.outliers is not None:
        targets = by_outliers(found, params, data, target, allocation.outliers)
    return _prune(found, params, data, method, iter(targets), inputs)._replace(left=left, note=note)


def _check(target: Target, method: Method, allocation: Allocation | None, samples: int | None) -> None:
    target.check()
    if isinstance(method, Criterion):
        raise ValueError(
            f"{method.name} is a criterion of training, so take prune.sparsify; layerwise takes {kinds.MADE_BY['method']}"
        )
    kinds.expect("method", method, Method)
    method.check(target)
    if allocation is not None:
        kinds.expect("allocation", allocation, Allocation)
    if samples is not None:
        kinds.whole("the number of samples", samples)
    if samples is not None and samples < 1:
        raise ValueError(f"samples={samples} is given; expected 1 or more examples, or None for all")
    if allocation is None or allocation.name == "uniform":
        return
    if allocation.outliers is None:
        raise ValueError(f"the allocation {allocation.name} is given; calibration takes owl(), uniform() or none")
    if target.sparsity is None:
        raise ValueError(f"owl spreads a sparsity, and {target.n}:{target.m} is the same everywhere; leave one of them out")
    owl_sparsities([0.0], [1], target.sparsity, allocation.outliers.spread)


def _read(batches: Iterable[Any], samples: int | None) -> tuple[list[Any], str]:
    """The batches to use, and a note if they are short of examples."""
    if (
        isinstance(batches, (Mapping, str))
        or hasattr(batches, "shape")
        or not (isinstance(batches, Iterable) or hasattr(batches, "__getitem__"))
    ):
        raise ValueError(f"the calibration data is {kinds.shown(batches)}; expected several batches: give a list of them")
    found: list[Any] = []
    examples = 0
    for batch in batches:
        if samples is not None and examples >= samples:
            break
        examples += _examples(batch, len(found))
        found.append(batch)
    if not found:
        raise ValueError("there is no calibration data: the batches are empty; give some, 128 examples in the papers")
    weights = [batch["weights"] for batch in found if isinstance(batch, Mapping) and "weights" in batch]
    if len(weights) == len(found) and not any(bool(jnp.any(jnp.asarray(weight) > 0)) for weight in weights):
        raise ValueError("the weights of all calibration batches are 0, so no position counts; give some weights above 0")
    short = samples is not None and examples < samples
    return found, f"there are {examples} examples, fewer than the {samples} asked for" if short else ""


def _examples(batch: Any, number: int) -> int:
    """How many there are. Raises ValueError if there are none, or it is no batch."""
    first = batch["inputs"] if isinstance(batch, Mapping) and "inputs" in batch else next(iter(jax.tree.leaves(batch)), None)
    if first is None or not hasattr(first, "shape"):
        raise ValueError(f"calibration batch {number} is {kinds.shown(batch)} without arrays; expected arrays of examples")
    if not first.shape or 0 in first.shape:
        raise ValueError(
            f"calibration batch {number} has shape {list(first.shape)}; expected 1 or more examples along the first axis"
        )
    return int(first.shape[0])


def _prune(found: Linears, params: Params, data: list[Any], method: Method, targets: Iterator[Target], seen: str) -> Calibrated:
    leaves = trees.paths(params)
    masks = {layer.path: _all_true(leaves[layer.path]) for layer in found.layers}
    aside: dict[str, jax.Array] = {}  # pruned, while the pass goes on with the dense kernels
    rows: list[LayerRow] = []

    def visit(layer: Linear, kernel: jax.Array, inputs: Inputs) -> jax.Array | None:
        new, mask, note = method.apply(kernel.astype(jnp.float32), inputs, next(targets))
        new = new.astype(kernel.dtype)
        error = inputs.relative_error(kernel, new)
        if not np.isfinite(error):
            raise ValueError(f"pruning {layer.name} by {method.name} gives numbers that are not finite: is what enters it?")
        masks[layer.path] = layer.put(masks[layer.path], mask, donate=True)
        dropped = 1.0 - int(jnp.count_nonzero(mask)) / mask.size
        rows.append(LayerRow(layer.path, layer.at, mask.size, dropped, error, note))
        if seen == "pruned":
            return new
        before = aside.get(layer.path, jnp.asarray(leaves[layer.path]))
        aside[layer.path] = layer.put(before, new, donate=layer.path in aside)
        return None

    new = trees.replace(found.stream(params, data, visit), aside)
    tree = trees.map_with_path(lambda path, leaf: masks.get(path, jnp.asarray(True)), params)
    return Calibrated(new, tree, tuple(rows), {})


def _all_true(leaf: Any) -> jax.Array:
    sharding = leaf.sharding if isinstance(getattr(leaf, "sharding", None), NamedSharding) else None
    return jnp.ones(leaf.shape, bool, device=sharding)


def _outputs_apart(kernel: jax.Array, gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """On a mesh: outputs over all devices, since each is worked off by itself, and the moments on every one of them."""
    sharding = kernel.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return kernel, gram
    mesh = sharding.mesh
    spread = PartitionSpec(None, mesh.axis_names) if kernel.shape[1] % mesh.size == 0 else PartitionSpec()
    place = jax.jit(lambda *arrays: arrays, out_shardings=(NamedSharding(mesh, spread), NamedSharding(mesh, PartitionSpec())))
    return place(kernel, gram)
