"""One equation of a jaxpr, run on other inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Bound(Protocol):
    """An equation, or what is known of one: a primitive and its parameters."""

    primitive: Any
    params: Any


def bind(eqn: Bound, inputs: Sequence[Any], **changes: Any) -> Sequence[Any]:
    """The equation's outputs, with some of its parameters changed."""
    found = eqn.primitive.get_bind_params({**eqn.params, **changes})
    functions, params = found if isinstance(found, tuple) else ((), found)  # a tuple before jax 0.10
    outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return outputs if eqn.primitive.multiple_results else [outputs]
