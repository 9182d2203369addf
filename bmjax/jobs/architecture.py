"""Networks from what a config says, and from what a record says of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from bmjax import config as configs
from bmjax import distill, models, trees
from bmjax.data import Dataset
from bmjax.types import Batch, Model, Params


def kinds() -> dict[str, type]:
    """{name: config class} of the architectures that `bmjax.models` has."""
    found = {name: kind for name, kind in vars(models).items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
    return {name: kind for name, kind in found.items() if hasattr(kind, "build")}


def optional_kinds() -> dict[str, Callable[[], Any]]:
    """The same, where there may be none."""
    return {"none": lambda: None, **kinds()}


def build(model: Any, dataset: Dataset, classes: int | None = None) -> Any:
    """The network for a dataset.

    Args:
        model: a config with `build(shape, classes)`, or a function (shape, classes) -> Model: shape is that of one example's
            inputs, classes the number of classes or of tokens.
        dataset: what it is for.
        classes: it was made for, or tokens, where those are not the data's; None takes the data's.

    Raises:
        ValueError: `model` is neither, or makes something that has no `init` and `apply`; the data has more token ids than the
            network; further as its `build`.
    """
    make = getattr(model, "build", model)
    if not callable(make):
        raise ValueError(f"the model is {model!r}; expected a config with build(shape, classes), or a function of the two")
    if classes is not None and dataset.vocabulary:
        dataset = dataclasses.replace(dataset, vocabulary=min(classes, dataset.vocabulary))
    found = make(dataset.shape, classes or dataset.classes)
    if not (hasattr(found, "init") and hasattr(found, "apply")):
        raise ValueError(
            f"the model is made as {type(found).__name__}; expected a Model with init and apply (bmjax.models.adapters)"
        )
    _check_vocabulary(getattr(found, "vocabulary", 0), dataset)
    if dataset.vocabulary and type(model) in kinds().values() and not getattr(found, "vocabulary", 0):
        raise ValueError(
            f"the inputs of {dataset.name} are token ids and {type(model).__name__} takes numbers; take a Decoder or an Encoder"
        )
    return found


def _check_vocabulary(there: int, dataset: Dataset) -> None:
    """Raises ValueError if the network's table has no row for some of the data's ids, or the inputs are no ids."""
    if there and not dataset.vocabulary:
        raise ValueError(f"the model takes token ids and the inputs of {dataset.name} are none; take another model or other data")
    if there and there < dataset.vocabulary:
        raise ValueError(
            f"the model has a vocabulary of {there} ids and {dataset.name} one of {dataset.vocabulary}; give the model's config "
            "at least as many, or take a model for these data"
        )


def check_logits(model: Model, shapes: tuple[Params, Params], batch: Batch, classes: int) -> None:
    """Raises ValueError unless the logits fit the targets: [B, classes], or [B, T, vocabulary]."""
    found = jax.eval_shape(lambda p, s, b: model.apply(p, s, b)[0].logits, *shapes, dict(batch)).shape
    expected = (*np.shape(batch["targets"]), classes)
    if found != expected:
        raise ValueError(
            f"the model gives logits of shape {list(found)}, but the data needs {list(expected)}; take another model"
        )


def record(model: Any, net: Model, params: Params) -> dict[str, Any]:
    """What `rebuild` needs, for JSON: {} if the model's config is none of ours.

    Args:
        model: the config that `build` took; of an ensemble, the one that made each of its networks.
        net: what it made, perhaps resized since.
        params: its parameters, which tell the sizes.
    """
    if isinstance(net, distill.Ensemble):
        members = [record(model, member, params[str(i)]) for i, member in enumerate(net.models)]
        how = {"weights": list(net.weights), "space": net.space, "temperature": net.temperature}
        return {} if net.choose is not None or {} in members else {"ensemble": members, **how}
    if type(model).__name__ not in kinds() or not isinstance(model, kinds()[type(model).__name__]):
        return {}
    leaves = trees.paths(params)
    sizes = {name: int(leaves[path].shape[axis]) for name, (path, axis) in net.axes.items()}
    return {"model": configs.to_dict(model), "sizes": sizes}


def rebuild(recorded: Mapping[str, Any], dataset: Dataset, classes: int | None = None) -> Any:
    """The network of a `record`, for a dataset; `classes` as for `build`.

    Raises:
        ValueError: the record is of a config that is none of ours, or of another version's; as `build`.
    """
    if "ensemble" in recorded:
        how = {name: recorded[name] for name in ("weights", "space", "temperature")}
        return distill.ensemble([rebuild(member, dataset, classes) for member in recorded["ensemble"]], **how)
    plain = recorded.get("model")
    if not isinstance(plain, Mapping) or plain.get("class") not in kinds():
        raise ValueError("it does not say what the model is (a function, or a config class that is not of bmjax.models)")
    net = build(configs.from_dict(plain, kinds()), dataset, classes)
    sizes = recorded.get("sizes")
    return net.resize(sizes) if sizes else net


def with_sizes_of(net: Any, params: Params) -> Any:
    """The network resized to what parameters of the same architecture have."""
    leaves = trees.paths(params)
    return net.resize({name: int(leaves[path].shape[axis]) for name, (path, axis) in net.axes.items() if path in leaves})
