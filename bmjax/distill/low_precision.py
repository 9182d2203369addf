"""A frozen network in fewer bits: bfloat16, or kernels as int8 with a float32 scale for each output channel.

The int8 network runs the model's own jaxpr, in which a kernel becomes floating where it is used and not before: of a scanned
stack one layer at a time, of a table the rows that are looked up. So no floating copy of all parameters is made. It holds for any
model, convolutions too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jax.tree_util import Partial

from bmjax import trace, trees
from bmjax.types import Batch, Model, Outputs, Params

PRECISIONS = ("bfloat16", "int8")


class Int8(NamedTuple):
    """An array as values * scale.

    Attributes:
        values: int8, of the array's shape.
        scale: float, of the same rank; 1 long along the axis that the layer contracts.
    """

    values: jax.Array
    scale: jax.Array

    @classmethod
    def of(cls, x: jax.Array, axis: int) -> Int8:
        """Rounded to 255 steps, symmetric about 0: scale = max |x| / 127 over the axis."""
        scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True).astype(jnp.float32) / 127
        scale = jnp.where(scale > 0, scale, 1.0)
        return cls(jnp.round(x / scale).astype(jnp.int8), scale)

    def dense(self) -> jax.Array:
        """The array, in the scale's dtype."""
        return _product(*self)


@dataclasses.dataclass(frozen=True)
class LowPrecision:
    """A `Model` that takes what `convert` makes of another's parameters; see `low_precision`."""

    model: Model
    dtype: str

    @property
    def axes(self) -> Mapping[str, tuple[str, int]]:
        """The model's."""
        return self.model.axes

    @property
    def rules(self) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        """The model's; what one says of a kernel holds for its int8 values, and for their scale where it is as long."""
        given = getattr(self.model, "rules", None) or ((".*", ()),)
        return tuple((re.sub(r"(\\.)|\$", lambda m: m[1] or r"(?=(?:/values|/scale)?\Z)", at), tuple(axes)) for at, axes in given)

    @property
    def features(self) -> tuple[str, ...]:
        """The model's."""
        return getattr(self.model, "features", ())

    @property
    def vocabulary(self) -> int:
        """The model's; 0 where inputs are no token ids."""
        return getattr(self.model, "vocabulary", 0)

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Params]:
        """Fresh (params, model_state), converted."""
        params, model_state = self.model.init(key, batch)
        return self.convert(params, batch), model_state

    def convert(self, params: Params, batch: Batch) -> Params:
        """The model's parameters in fewer bits; may be traced, so that each device converts its own part.

        bfloat16: every floating leaf, a half of the bytes. int8: every kernel, by the axis that its layer contracts, and every
        array called "embedding", row by row: a quarter of the bytes and the scales; all else stays as it is.

        Args:
            params: of the model, floating.
            batch: arrays or ShapeDtypeStructs of one batch.
        """
        if self.dtype == "bfloat16":
            return _cast(params, jnp.bfloat16)
        axes = _contracted(self.model, params, batch)
        return trees.map_with_path(lambda path, leaf: Int8.of(leaf, axes[path]) if path in axes else leaf, params)

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
        """See `Model.apply`; logits and features float32. In bfloat16 the whole forward pass is.

        Raises:
            ValueError: parameters that were not converted.
        """
        leaves, treedef = jax.tree.flatten(params, is_leaf=_is_int8)
        floats = [leaf.dtype for leaf in leaves if not _is_int8(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)]
        if any(map(_is_int8, leaves)) != (self.dtype == "int8") or (self.dtype == "bfloat16" and jnp.float32 in floats):
            raise ValueError(f"these parameters are not {self.dtype}; give those that convert(params, batch) makes")

        def forward(leaves: list[Any], model_state: Params, batch: Batch, rngs: Any) -> Any:
            given = jax.tree.unflatten(treedef, leaves)
            return self.model.apply(given, model_state, batch, train=train, rngs=rngs, capture=capture)

        if self.dtype == "bfloat16":
            outputs, model_state = forward(leaves, model_state, {**batch, "inputs": _cast(batch["inputs"], jnp.bfloat16)}, rngs)
        else:
            run = trace.where_used(forward, {"gather": _look_up})
            outputs, model_state = run([_late(leaf) for leaf in leaves], model_state, dict(batch), rngs)
        logits, features = _cast((outputs.logits, outputs.features), jnp.float32)
        return outputs._replace(logits=logits, features=features), model_state

    def resize(self, sizes: Mapping[str, int]) -> LowPrecision:
        """The same of the model resized; convert its parameters again."""
        return dataclasses.replace(self, model=self.model.resize(sizes))


def low_precision(model: Model, dtype: str) -> LowPrecision:
    """The model in fewer bits, as a frozen teacher.

        small = distill.low_precision(big, "int8")
        frozen = {"params": small.convert(params, batch), "model_state": model_state}
        problem = Problem(student, terms, tx, teacher=small)

    On a CPU, XLA computes bfloat16 products in float32 and makes copies of all kernels for it; int8 saves memory there too.

    Args:
        model: any.
        dtype: "bfloat16" or "int8".

    Raises:
        ValueError: another dtype.
    """
    if dtype not in PRECISIONS:
        raise ValueError(f"a teacher's precision is {dtype!r}; expected one of {', '.join(PRECISIONS)}, or the model as it is")
    return LowPrecision(model, dtype)


def size(params: Params) -> int:
    """Number of parameters; scales are none."""
    return trees.size([leaf.values if _is_int8(leaf) else leaf for leaf in jax.tree.leaves(params, is_leaf=_is_int8)])


def _is_int8(x: Any) -> bool:
    return isinstance(x, Int8)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _contracted(model: Model, params: Params, batch: Batch) -> dict[str, int]:
    """{path: the axis that one scale is for}, of kernels and of tables."""
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(batch))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    _, abstract = jax.eval_shape(model.init, jax.random.key(0), batch)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    kernels = trace.contracting(lambda p, b: model.apply(p, state, b)[0].logits, params, batch)
    tables = {path: -1 for path in trees.paths(params) if path.split("/")[-1] == "embedding"}
    return {**kernels, **tables}


def _late(x: Any) -> Any:
    return Partial(_product, *x) if _is_int8(x) else x


def _product(values: jax.Array, scale: jax.Array) -> jax.Array:
    return values.astype(scale.dtype) * scale


def _look_up(eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any] | None:
    """Rows of a table and their scales, if the scales are for whole rows."""
    table, indices = inputs
    sizes = eqn.params["slice_sizes"]
    if not (isinstance(table, Partial) and table.func is _product):
        return None
    values, scale = table.args
    if any(width == 1 and size != full for size, full, width in zip(sizes, values.shape, scale.shape)):
        return None
    # What lies outside of the table is filled in by the scale: int8 has no NaN.
    rows = trace.bind(eqn, [values, indices], fill_value=0)[0]
    whole = tuple(min(size, n) for size, n in zip(sizes, scale.shape))
    return [_product(rows, trace.bind(eqn, [scale, indices], slice_sizes=whole)[0])]
