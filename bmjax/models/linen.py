"""A Flax Linen module as a `Model`: pure functions, features by name, sizes that can change."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmjax.models.checks import check_capture, check_sizes
from bmjax.types import Batch, Outputs, Params


class Network(Protocol):
    """What a module offers beside `__call__(batch, train, capture) -> Outputs`."""

    @property
    def axes(self) -> Mapping[str, tuple[str, int]]:
        """See `Model.axes`."""
        ...

    @property
    def rules(self) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        """Partition rules for its parameters."""
        ...

    @property
    def features(self) -> tuple[str, ...]:
        """All names that can be captured."""
        ...

    def resized(self, sizes: Mapping[str, int]) -> Network:
        """The same module with other sizes."""
        ...


@dataclasses.dataclass(frozen=True)
class LinenModel:
    """A `Model` around a Linen module that is a `Network`."""

    module: Any

    @property
    def axes(self) -> Mapping[str, tuple[str, int]]:
        """See `Model.axes`."""
        return cast(Network, self.module).axes

    @property
    def rules(self) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        """Partition rules that cover all parameters."""
        return cast(Network, self.module).rules

    @property
    def features(self) -> tuple[str, ...]:
        """All feature names that `apply` can capture."""
        return cast(Network, self.module).features

    @property
    def vocabulary(self) -> int:
        """How many token ids there are, all below it; 0 where inputs are no ids."""
        return getattr(self.module, "vocabulary", 0)

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Params]:
        """Fresh (params, model_state) for inputs shaped like the batch's."""
        variables = dict(self.module.init({"params": key}, jax.tree.map(jnp.asarray, dict(batch))))
        return variables.pop("params"), variables

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
        """See `Model.apply`.

        Raises:
            ValueError: a captured name is not one of `features`.
        """
        check_capture(capture, self.features)
        variables = {"params": params, **model_state}
        changes = list(model_state) if train else []  # batch statistics
        found = self.module.apply(variables, batch, train=train, capture=tuple(capture), rngs=rngs, mutable=changes or False)
        return found if changes else (found, model_state)

    def resize(self, sizes: Mapping[str, int]) -> LinenModel:
        """The same architecture with other sizes.

        Raises:
            ValueError: a size that `axes` does not name, or one below 1.
        """
        check_sizes(sizes, self.axes)
        return dataclasses.replace(self, module=cast(Network, self.module).resized(sizes))


class Dropout(nn.Module):
    """Dropout whose mask depends on the key and the example's id, not on the device or the place in the batch."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, ids: jax.Array | None, train: bool) -> jax.Array:
        """x [B, ...], ids [B] int; identity unless training."""
        if not train or self.rate == 0:
            return x
        if ids is None:
            raise ValueError("dropout needs batch['id']: one int per example")
        key = self.make_rng("dropout")
        keep = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), 1 - self.rate, x.shape[1:]))(ids)
        return jnp.where(keep, x / (1 - self.rate), 0)


def classified(
    module: nn.Module, x: jax.Array, classes: int, features: Mapping[str, jax.Array], capture: tuple[str, ...], bias: bool = True
) -> Outputs:
    """The outputs of a network that ends in a dense layer "head": logits [..., classes] from `x` [..., width].

    Args:
        module: whose compact method this is called in.
        x: what the head sees.
        classes: its outputs.
        features: all that can be captured.
        capture: the names that were asked for.
        bias: whether the head has one.
    """
    logits = nn.Dense(classes, use_bias=bias, name="head")(x)
    head: Any = module.get_variable("params", "head")
    return Outputs(logits, {name: features[name] for name in capture}, (x, head["kernel"], head.get("bias")))
