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
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.tree_util import Partial

from bmjax.trace.bind import bind
from bmjax.trace.flops import bodies
from bmjax.trace.walk import shape

P = ParamSpec("P")
R = TypeVar("R")
Use: TypeAlias = Callable[[JaxprEqn, Sequence[Any]], Sequence[Any] | None]  # (equation, inputs) -> outputs, or None: as ever

_CALLS = {"jit", "pjit", "closed_call", "core_call"}
_CHECKPOINTS = {"checkpoint", "remat2"}
_SHAPES = {"reshape", "transpose", "squeeze", "broadcast_in_dim"}  # that lie between an array and the product
_ARRAY = object()

_marked: WeakValueDictionary[str, Callable[..., jax.Array]] = WeakValueDictionary()  # by the name of their jit
_numbers = itertools.count()


def late(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Marks a function of arrays as one to be computed where its result is used; without `where_used` it is called as it is.

        shown = trace.late(lambda p, mask: jnp.where(mask, p, 0))

    Args:
        fn: along axis 0 elementwise: a slice of the result is what slices of the arguments give, of those that have as many axes
            as the result.
    """
    name = f"bmjax_late_{next(_numbers)}"
    called = functools.wraps(fn)(lambda *arrays: fn(*arrays))
    called.__name__ = called.__qualname__ = name
    _marked[name] = called
    return jax.jit(called)


def where_used(fn: Callable[P, R], uses: Mapping[str, Use] | None = None) -> Callable[P, R]:
    """The same function, in which what `late` ones return is computed at its use: in a scan's body layer by layer.

        loss = trace.where_used(lambda params: model(st.view(params, opt_state), batch))

    A scan keeps none of those arrays for the backward pass: it computes them again. What the function itself rematerialises stays
    as it is. Values and first derivatives are the same but for rounding. (Of a function with a rule of its own, `jax.custom_jvp`,
    JAX takes second derivatives otherwise inside a scan than outside.)

    Args:
        fn: any traceable function. Arguments may hold `jax.tree_util.Partial(function, *arrays)` in place of an array, with a
            function as `late` takes it; what is neither that nor an array is passed on as it is.
        uses: {primitive: (equation, inputs) -> outputs} for primitives that need not have the whole array; inputs may be
            Partials, and None stands for "compute it".
    """

    @functools.wraps(fn)
    def run(*args: P.args, **kw: P.kwargs) -> R:
        leaves, treedef = jax.tree.flatten((args, kw), is_leaf=_is_late)
        traced = [i for i, leaf in enumerate(leaves) if _is_late(leaf) or isinstance(leaf, (jax.Array, np.ndarray, np.generic))]
        given = [leaves[i] for i in traced]
        made: list[Any] = []  # what is returned: its structure, and each leaf that is no array

        def flat(arrays: list[Any]) -> list[Any]:
            args, kw = jax.tree.unflatten(treedef, _replaced(leaves, traced, arrays))
            found, structure = jax.tree.flatten(fn(*args, **kw))
            arrays = [leaf for leaf in found if isinstance(leaf, jax.Array)]
            made[:] = [structure, [_ARRAY if isinstance(leaf, jax.Array) else leaf for leaf in found]]
            return arrays

        like = [jax.eval_shape(now, leaf) if _is_late(leaf) else leaf for leaf in given]
        closed = jax.make_jaxpr(flat)(like)
        found = iter(_run(closed.jaxpr, closed.consts, given, uses or {}))
        structure, returned = made
        return jax.tree.unflatten(structure, [now(next(found)) if leaf is _ARRAY else leaf for leaf in returned])

    return run


def _replaced(leaves: list[Any], places: list[int], new: list[Any]) -> list[Any]:
    found = list(leaves)
    for place, leaf in zip(places, new):
        found[place] = leaf
    return found


def now(x: Any) -> Any:
    """The array itself."""
    return x.func(*map(now, x.args)) if _is_late(x) else x


def _is_late(x: Any) -> bool:
    return isinstance(x, Partial)


def _run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], uses: Mapping[str, Use], inside: bool = False) -> list[Any]:
    """The jaxpr's outputs; `inside` of a scan, which would keep for its backward pass what an equation is given."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)))
    read = lambda var: var.val if isinstance(var, Literal) else env[var]
    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, _outputs(eqn, [read(var) for var in eqn.invars], uses, inside)))
    return [read(var) for var in jaxpr.outvars]


def _outputs(eqn: JaxprEqn, inputs: list[Any], uses: Mapping[str, Use], inside: bool) -> Sequence[Any]:
    name = eqn.primitive.name
    marked = _marked.get(eqn.params.get("name", "")) if name in _CALLS else None
    if marked is not None:
        return [Partial(marked, *inputs)]
    late = any(map(_is_late, inputs))
    if name in _CALLS and (late or _makes_late(eqn)):
        inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
        return _run(inner.jaxpr, inner.consts, inputs, uses, inside)
    if name in _CHECKPOINTS and (late or _makes_late(eqn)):
        again = lambda *inputs: [now(x) for x in _run(eqn.params["jaxpr"], (), inputs, uses, inside)]
        return jax.checkpoint(again, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])(*inputs)
    if not late:
        return bind(eqn, inputs)
    if name in uses and (found := uses[name](eqn, inputs)) is not None:
        return found
    if name == "scan":
        return _scan(eqn, inputs, uses)
    if name == "convert_element_type":
        return [Partial(_converted(eqn.params["new_dtype"]), *inputs)]
    if inside and name in _SHAPES:
        return [Partial(lambda *arrays: bind(eqn, arrays)[0], *inputs)]
    run = lambda *inputs: bind(eqn, [now(x) for x in inputs])
    return jax.checkpoint(run, prevent_cse=False)(*inputs) if inside else run(*inputs)


def _makes_late(eqn: JaxprEqn) -> bool:
    """Whether a marked function is called in an equation's own jaxpr, or in those that it calls."""
    left = list(bodies(eqn.params))
    while left:
        for inner in left.pop().eqns:
            if inner.primitive.name in _CALLS and inner.params.get("name", "") in _marked:
                return True
            if inner.primitive.name in _CALLS | _CHECKPOINTS:
                left += bodies(inner.params)
    return False


def _scan(eqn: JaxprEqn, inputs: list[Any], uses: Mapping[str, Use]) -> list[Any]:
    """The scan with late arrays among what it goes through: each step computes its own layer's."""
    params = eqn.params
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    inner, consts = params["jaxpr"], inputs[:first]

    def stacked(x: Any, ndim: int) -> bool:
        """Whether all that it is made of has the layers' axis; what they share cannot be gone through."""
        return all(jnp.ndim(leaf) == ndim and len(leaf) == params["length"] for leaf in jax.tree.leaves(x))

    xs = [x if stacked(x, len(shape(var))) else now(x) for x, var in zip(inputs[last:], eqn.invars[last:])]

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        found = [now(x) for x in _run(inner.jaxpr, inner.consts, [*consts, *carry, *xs], uses, inside=True)]
        return found[: last - first], found[last - first :]

    how = {"length": params["length"], "reverse": params["reverse"], "unroll": params["unroll"]}
    carry, ys = jax.lax.scan(body, [now(x) for x in inputs[first:last]], xs, **how)
    return [*carry, *ys]


@functools.cache
def _converted(dtype: Any) -> Callable[[jax.Array], jax.Array]:
    return lambda x: x.astype(dtype)
