"""Arrays that are computed where they are used, forward and backward: of a scanned stack one layer at a time.

A masked or dequantised copy of all parameters, made before the forward pass, is as large as the model, and is written and read
once more in every step. `late` marks the function that makes it; `where_used` runs another function so that what a marked one
makes exists for one layer at a time, and is made again in the backward pass.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeAlias, TypeVar
from weakref import WeakValueDictionary

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.tree_util import Partial

from bmjax.trace.bind import bind
from bmjax.trace.flops import bodies

P = ParamSpec("P")
R = TypeVar("R")
Use: TypeAlias = Callable[[JaxprEqn, Sequence[Any]], Sequence[Any] | None]  # (equation, inputs) -> outputs, or None: as ever

_CALLS = {"jit", "pjit", "closed_call", "core_call"}
_SHAPES = {"reshape", "transpose", "squeeze", "broadcast_in_dim", "convert_element_type"}  # that lie between array and product

_marked: WeakValueDictionary[str, Callable[..., jax.Array]] = WeakValueDictionary()  # by the name of their jit
_numbers = itertools.count()


def late(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Marks a function of arrays as one to be computed where its result is used; without `where_used` it is called as it is.

        shown = trace.late(lambda p, mask: jnp.where(mask, p, 0))

    Args:
        fn: along axis 0 elementwise: a slice of the result is what slices of the arguments give.
    """
    name = f"bmjax_late_{next(_numbers)}"
    called = functools.wraps(fn)(lambda *arrays: fn(*arrays))
    called.__name__ = called.__qualname__ = name
    _marked[name] = called
    return jax.jit(called)


def where_used(fn: Callable[P, R], uses: Mapping[str, Use] | None = None) -> Callable[P, R]:
    """The same function, in which what `late` ones return is computed at its use: in a scan's body layer by layer.

        loss = trace.where_used(lambda params: model(st.view(params, opt_state), batch))

    A scan keeps neither those arrays for the backward pass, nor what the operations that they are made by return: it computes
    them again. Values and gradients are the same but for rounding.

    Args:
        fn: takes and returns trees of arrays. Arguments may hold `jax.tree_util.Partial(function, *arrays)` in place of an
            array, with a function as `late` takes it.
        uses: {primitive: (equation, inputs) -> outputs} for primitives that need not have the whole array; inputs may be
            Partials, and None stands for "compute it".
    """

    @functools.wraps(fn)
    def run(*args: P.args, **kw: P.kwargs) -> R:
        leaves, treedef = jax.tree.flatten((args, kw), is_leaf=_is_late)
        like = [jax.eval_shape(now, leaf) if _is_late(leaf) else leaf for leaf in leaves]

        def flat(leaves: list[Any]) -> R:
            args, kw = jax.tree.unflatten(treedef, leaves)
            return fn(*args, **kw)

        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(like)
        found = _run(closed.jaxpr, closed.consts, leaves, uses or {})
        return jax.tree.unflatten(jax.tree.structure(shapes), [now(x) for x in found])

    return run


def now(x: Any) -> Any:
    """The array itself."""
    return x.func(*map(now, x.args)) if _is_late(x) else x


def _is_late(x: Any) -> bool:
    return isinstance(x, Partial)


def _run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], uses: Mapping[str, Use]) -> list[Any]:
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)))
    read = lambda var: var.val if isinstance(var, Literal) else env[var]
    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, _outputs(eqn, [read(var) for var in eqn.invars], uses)))
    return [read(var) for var in jaxpr.outvars]


def _outputs(eqn: JaxprEqn, inputs: list[Any], uses: Mapping[str, Use]) -> Sequence[Any]:
    name = eqn.primitive.name
    marked = _marked.get(eqn.params.get("name", "")) if name in _CALLS else None
    if marked is not None:
        return [Partial(marked, *inputs)]
    if not any(map(_is_late, inputs)):
        return bind(eqn, inputs)
    if name in uses and (found := uses[name](eqn, inputs)) is not None:
        return found
    if name == "convert_element_type":
        return [Partial(_converted(eqn.params["new_dtype"]), *inputs)]
    if name == "scan":
        return _scan(eqn, inputs, uses)
    if name in _CALLS:
        inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
        return _run(inner.jaxpr, inner.consts, inputs, uses)
    if name in ("checkpoint", "remat2"):
        again = lambda *inputs: [now(x) for x in _run(eqn.params["jaxpr"], (), inputs, uses)]
        return jax.checkpoint(again, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])(*inputs)
    return bind(eqn, [now(x) for x in inputs])


def _scan(eqn: JaxprEqn, inputs: list[Any], uses: Mapping[str, Use]) -> list[Any]:
    """The scan with late arrays among what it goes through: each step computes its own layer's."""
    params = eqn.params
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    inner, consts = params["jaxpr"], inputs[:first]
    # What all layers share cannot be gone through.
    xs = [x if all(len(leaf) == params["length"] for leaf in jax.tree.leaves(x)) else now(x) for x in inputs[last:]]
    made = _SHAPES.union(*map(_primitives, filter(_is_late, (*consts, *xs))))

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        found = [now(x) for x in _run(inner.jaxpr, inner.consts, [*consts, *carry, *xs], uses)]
        return found[: last - first], found[last - first :]

    saved = lambda primitive, *_, **__: primitive.name not in made
    body = jax.checkpoint(body, policy=saved, prevent_cse=False)
    how = {"length": params["length"], "reverse": params["reverse"], "unroll": params["unroll"]}
    carry, ys = jax.lax.scan(body, [now(x) for x in inputs[first:last]], xs, **how)
    return [*carry, *ys]


def _primitives(x: Any) -> set[str]:
    """What a late array is made by."""
    found, left = set[str](), [jax.make_jaxpr(now)(x).jaxpr]
    while left:
        for eqn in left.pop().eqns:
            found.add(eqn.primitive.name)
            left += bodies(eqn.params)
    return found - _CALLS


@functools.cache
def _converted(dtype: Any) -> Callable[[jax.Array], jax.Array]:
    return lambda x: x.astype(dtype)
