"""What a workdir's checkpoints do not hold: the network's function, and the views that stand before the forward pass.

A record names a user's functions and does not hold them; with the config file that a run was made from, given again, they are
there, and its hash says whether they are the same.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from bmjax import config as configs
from bmjax import parallel, prune, trees
from bmjax.data import Dataset
from bmjax.jobs import architecture, train
from bmjax.jobs.train import Config
from bmjax.types import Batch, Params

_FILE = "give its config file again, --config=<file.py> with the flags of the training, or evaluate its export"


def check_given(given: Any, folder: pathlib.Path, about: Mapping[str, Any]) -> None:
    """Raises ValueError unless a config, given again, is the one that a workdir or an export was made with.

    Args:
        given: from the config file and the flags of the training.
        folder: the workdir, or the export.
        about: what the folder says of itself; of an export "config" is a fingerprint.
    """
    if isinstance(about.get("config"), str):
        if about["config"] != configs.fingerprint(given):
            raise ValueError(f"{folder} was made with another config than --config gives; give its own file and flags, or none")
    elif difference := configs.difference(configs.read_resolved(folder), given):
        raise ValueError(f"{folder} holds a run {difference}; give the config file and the flags of the training")


def network(given: Any, folder: pathlib.Path, about: Mapping[str, Any], dataset: Dataset, *, teacher: bool) -> Any:
    """The network that was trained, at the sizes that its config says.

    Args:
        given: the config, given again, or None.
        folder, about: the workdir and its record.
        dataset: what it is for.
        teacher: whether it is the teacher's; a chain of generations that names none begins with the student's own network.

    Raises:
        ValueError: nothing says what it is; as `architecture.build`.
    """
    if given is not None:
        tutor = getattr(given, "fixed", None) if teacher else None
        return architecture.build(tutor.model if tutor is not None and tutor.model is not None else given.model, dataset)
    plain = ((about.get("teacher") or {}).get("model") if teacher else None) or about.get("model")
    try:
        return architecture.rebuild({"model": plain}, dataset)
    except ValueError as error:
        raise ValueError(f"the network of {folder} cannot be built: {error}; {_FILE}") from None


def seen(
    given: Any,
    folder: pathlib.Path,
    about: Mapping[str, Any],
    leaves: Mapping[str, Any],
    params: Params,
    model: Any,
    example: Batch,
    placement: tuple[Any, Mesh],
) -> Params:
    """The parameters as the forward pass saw them: through the user's views, and through the masks of straight_through.

    Args:
        given, folder, about: as for `network`.
        leaves: {path: array} of the whole checkpoint.
        params: the run's outcome, on the mesh.
        model, example: the network and a batch for it.
        placement: (the parameters' shardings, their mesh).

    Raises:
        ValueError: there are views and no config that holds them, or the optimiser's state is another than the config's.
    """
    masked = (about.get("prune") or {}).get("method") == "straight_through"
    if not masked and not about.get("views"):
        return params
    views: tuple[Any, ...] = (prune.through_masks,)
    if given is None and about.get("views"):
        raise ValueError(f"{folder} was trained with views, functions that no checkpoint holds; {_FILE}")
    if given is None:
        state: Any = prune.saved(leaves, params)
    else:
        views, state = (*given.views, *given.prune.views), _optimiser(given, folder, leaves, params, model, example)
    shardings, mesh = placement
    state = jax.device_put(state, parallel.like_params(state, params, shardings, mesh))

    def through(params: Params, opt_state: Any, step: jax.Array) -> Params:
        for view in views:
            params = view(params, opt_state, step)
        return params

    return jax.jit(through)(params, state, leaves["step"])


def _optimiser(given: Config, folder: pathlib.Path, leaves: Mapping[str, Any], params: Params, model: Any, example: Batch) -> Any:
    """The optimiser's state of a checkpoint in the structure that the config's optimiser has."""
    state = jax.eval_shape(model.init, jax.random.key(0), example)[1]
    sides = train.sides(given, model, (trees.abstract(params), state), example)
    tx = given.wrap(given.run.optimizer.build(given.run.steps), given.run.steps, sides)
    expected, before = jax.eval_shape(tx.init, params), "opt_state/model/"
    found = {path.removeprefix(before): leaf for path, leaf in leaves.items() if path.startswith(before)}
    if misfit := trees.first_difference(trees.paths(expected), found):
        raise ValueError(f"the optimiser's state of {folder} is not that of its config: {misfit}; evaluate its export instead")
    return trees.map_with_path(lambda path, _: found[path], expected)
