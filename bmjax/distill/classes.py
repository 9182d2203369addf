"""A network seen with another number of classes, where one of two vocabularies only has padding at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bmjax.types import Batch, Model, Outputs, Params


@dataclasses.dataclass(frozen=True)
class OfClasses:
    """A `Model` whose logits, and head, have `classes` classes: the model's own first ones, and -inf for those it has not.

    All else is the model's.
    """

    model: Model
    classes: int

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by copy and pickle before there is a model
            raise AttributeError(name)
        return getattr(self.model, name)

    @property
    def axes(self) -> Mapping[str, tuple[str, int]]:
        """The model's."""
        return self.model.axes

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Params]:
        """The model's."""
        return self.model.init(key, batch)

    def apply(self, params: Params, model_state: Params, batch: Batch, **how: Any) -> tuple[Outputs, Params]:
        """See `Model.apply`."""
        found, state = self.model.apply(params, model_state, batch, **how)
        head = found.head
        if head is not None:
            hidden, kernel, bias = head
            missing = max(self.classes - kernel.shape[1], 0)
            if missing and bias is None:
                bias = jnp.zeros(kernel.shape[1], jnp.float32)
            kernel = jnp.pad(kernel[:, : self.classes], ((0, 0), (0, missing)))
            head = hidden, kernel, None if bias is None else self._fitted(bias)
        return found._replace(logits=self._fitted(found.logits), head=head), state

    def resize(self, sizes: Mapping[str, int]) -> Model:
        """The model with other sizes, seen with as many classes."""
        return OfClasses(self.model.resize(sizes), self.classes)

    def _fitted(self, logits: jax.Array) -> jax.Array:
        """[..., own] as [..., classes]."""
        logits = logits[..., : self.classes]
        missing = ((0, 0),) * (logits.ndim - 1) + ((0, self.classes - logits.shape[-1]),)
        return jnp.pad(logits, missing, constant_values=-jnp.inf)
