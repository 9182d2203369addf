"""A `Model` around plain functions, with the checks that keep its promises; `adapters` has the three ways to make one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp

from bmjax import trees
from bmjax.models.checks import check_capture, check_sizes
from bmjax.parallel import collectives
from bmjax.types import Batch, Model, Outputs, Params

RulesLike: TypeAlias = Sequence[tuple[str, tuple[str | None, ...]]]
Resize: TypeAlias = Callable[[Mapping[str, int]], Model]

_SCANNED = "what a scan computes inside is lost unless the scan returns it"
_ONE_PROGRAM = "take the executor partitioned, where the compiler sees the whole batch"


class Pass(NamedTuple):
    """What a forward pass is asked for; `key` is None unless random numbers are wanted."""

    train: bool
    key: jax.Array | None
    capture: tuple[str, ...]


class Result(NamedTuple):
    """What it gives; `features` holds at least what was asked for and found."""

    logits: Any
    features: Mapping[str, Any]
    state: Params


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """A `Model` around functions; made by `plain`, `nnx` and `linen`.

    Attributes:
        start: (key, inputs) -> (params, model_state), nested dicts.
        forward: (params, model_state, inputs, what is asked for) -> result.
        random: it draws random numbers in training.
        axes, rules: as `Model.axes`, and partition rules that cover all parameters.
        features: names that `apply` can capture, where they are known before it runs.
        resizer: sizes -> Model, or None.
    """

    start: Callable[[jax.Array, jax.Array], tuple[Params, Params]]
    forward: Callable[[Params, Params, jax.Array, Pass], Result]
    random: bool
    axes: Mapping[str, tuple[str, int]]
    rules: RulesLike
    features: tuple[str, ...]
    resizer: Resize | None

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Params]:
        """Fresh (params, model_state) for inputs shaped like the batch's.

        Raises:
            ValueError: the model has no parameters, or no names for them.
        """
        params, model_state = self.start(key, jnp.asarray(batch["inputs"]))
        if not jax.tree.leaves(params):
            raise ValueError("the model has no parameters; its init must return a tree of arrays with names")
        return params, model_state

    def apply(
        self,
        params: Params,
        model_state: Params,
        batch: Batch,
        *,
        train: bool = False,
        rngs: Mapping[str, jax.Array] | None = None,
        capture: tuple[str, ...] = (),
    ) -> tuple[Outputs, Params]:
        """See `Model.apply`; the model itself sees batch["inputs"].

        Raises:
            ValueError: logits or features that are not [B, ...], an unknown feature, no key or no ids where the model draws
                random numbers, or a state that is made of one device's rows.
        """
        if self.features:
            check_capture(capture, self.features)
        inputs = jnp.asarray(batch["inputs"])
        asked = Pass(train, _key(rngs) if train and self.random else None, tuple(capture))
        if asked.key is None:
            result = self.forward(params, model_state, inputs, asked)
        else:
            result = self._randomly(params, model_state, batch, asked)
        _check_arrays(result, inputs.shape[0], asked.capture)
        outputs = Outputs(result.logits, {name: result.features[name] for name in asked.capture})
        return outputs, _checked_state(result.state) if train else model_state

    def resize(self, sizes: Mapping[str, int]) -> Model:
        """The same architecture with other sizes.

        Raises:
            ValueError: the adapter was given no `resize`, a size that `axes` does not name, or one below 1.
        """
        if self.resizer is None:
            raise ValueError(
                "this model cannot be built in other sizes: give the adapter resize=, or take adapters.replay, the traced "
                "program at the sizes that are left"
            )
        check_sizes(sizes, self.axes)
        return self.resizer(sizes)

    def _randomly(self, params: Params, model_state: Params, batch: Batch, asked: Pass) -> Result:
        """The forward pass with random numbers that do not depend on how the batch is split."""
        inputs, key = jnp.asarray(batch["inputs"]), cast(jax.Array, asked.key)
        if jax.tree.leaves(model_state):  # it speaks of the whole batch, which examples alone cannot give
            if collectives.differs(inputs):
                raise ValueError(f"a model with a state and random numbers would draw the same on every device: {_ONE_PROGRAM}")
            return self.forward(params, model_state, inputs, asked)
        if "id" not in batch:
            raise ValueError("dropout needs batch['id']: one int per example")

        def example(row: jax.Array, number: jax.Array) -> Result:
            alone = asked._replace(key=jax.random.fold_in(key, number))
            result = self.forward(params, model_state, row[None], alone)
            _check_arrays(result, 1, asked.capture)
            return Result(result.logits[0], {name: result.features[name][0] for name in asked.capture}, {})

        return jax.vmap(example)(inputs, jnp.asarray(batch["id"]))


def _key(rngs: Mapping[str, jax.Array] | None) -> jax.Array:
    if not rngs or "dropout" not in rngs:
        raise ValueError("this model draws random numbers in training; give apply rngs={'dropout': key}, as the step does")
    return rngs["dropout"]


def _check_arrays(result: Result, batch: Any, capture: tuple[str, ...]) -> None:
    """Raises ValueError unless logits are [B, ..., classes] and every captured feature is there and [B, ...]."""
    shape: Any = getattr(result.logits, "shape", None)
    if shape is None or len(shape) < 2 or shape[0] != batch:
        found = f"an array {list(shape)}" if shape is not None else type(result.logits).__name__
        raise ValueError(f"the model returned {found} for a batch of {batch}; expected logits [{batch}, ..., classes]")
    for name in capture:
        if name not in result.features:
            there = ", ".join(result.features) or "none"
            raise ValueError(f"there is no feature {name!r}; there are {there} ({_SCANNED})")
        shape = getattr(result.features[name], "shape", ())
        if not shape or shape[0] != batch:
            raise ValueError(f"the feature {name!r} is {list(shape)}; expected the batch of {batch} on the first axis")


def _checked_state(new: Params) -> Params:
    """The new state. Raises ValueError if devices would have different ones; the step's own check knows no way out for us."""
    for path, leaf in trees.paths(new).items():
        if collectives.differs(leaf):
            raise ValueError(f"the model's state {path} (batch statistics?) is made of one device's rows only: {_ONE_PROGRAM}")
    return new
