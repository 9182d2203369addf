"""Whether an argument is of the kind that is expected, said in one line before anything is traced."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MADE_BY = {
    "criterion": "magnitude(), random(), saliency(), movement(), fisher(), taylor() or given(scores)",
    "pattern": "unstructured(), n_m(2, 4), block(4, 4), channel() or groups(...)",
    "allocation": "uniform(), global_threshold(), by_layer(...), erdos_renyi(), owl() or from_sensitivity(...)",
    "schedule": "constant(), one_shot(step), cubic(begin, end), linear(begin, end) or iterative(begin, end, rounds)",
    "optimiser": "optax.adamw(1e-3), optax.chain(...) or another optax transform",
    "method": "wanda(), sparsegpt() or smallest()",
}


def shown(value: Any) -> str:
    """A value in a message: numbers and strings as they are written, of anything else the kind."""
    if value is None or isinstance(value, (str, numbers.Number)):
        return repr(value)
    return f"a {type(value).__name__}"


def expect(what: str, value: Any, kind: type) -> None:
    """Raises ValueError unless the value is of the kind.

    Args:
        what: a key of `MADE_BY`, which names the functions that make the kind.
        value: as given.
        kind: a class.
    """
    if isinstance(value, kind):
        return
    name = getattr(value, "__name__", "<lambda>")
    if callable(value) and not isinstance(value, type) and name != "<lambda>":
        raise ValueError(f"the {what} is the function {name} itself; call it: {name}()")
    raise ValueError(f"the {what} is {shown(value)}; expected what one of these gives: {MADE_BY[what]}")


def number(what: str, value: Any) -> None:
    """Raises ValueError unless the value is a number, or a concrete array of one."""
    if isinstance(value, bool):
        raise ValueError(f"{what} is {value}; expected a number")
    single = isinstance(value, (np.ndarray, jax.Array)) and not isinstance(value, jax.core.Tracer) and value.ndim == 0
    if not single and not isinstance(value, (numbers.Real, np.number)):
        raise ValueError(f"{what} is {shown(value)}; expected a number")


def whole(what: str, value: Any) -> None:
    """Raises ValueError unless the value is an int."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{what} is {shown(value)}; expected an int")


def floats(leaves: Mapping[str, Any], paths: Iterable[str]) -> None:
    """Raises ValueError for a parameter that is to be pruned and holds no real floating-point numbers."""
    for path in paths:
        if path in leaves and not jnp.issubdtype(leaves[path].dtype, jnp.floating):
            raise ValueError(
                f"{path} is to be pruned and is {leaves[path].dtype}; expected float32 or another float: leave it out"
            )
