"""What each primitive does to the axes of its values: one small function for each kind, one table.

A rule says how terms flow through a primitive and, where its static parameters hold sizes, how it runs at other sizes: the two
stand side by side. A primitive without a rule freezes all that it touches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from bmjax.trace.replay import Replay
from bmjax.trace.terms import NOTHING, Atom, Axes, Misfit, Prod, Sum, Term, cut, freeze, fresh, note, resolve, split
from bmjax.trace.walk import Equation, Rule, Shape, Tracer

Outputs = Sequence[Any]

NORM = "statistics over this axis change (norm)"
EXTREME = "an extreme over this axis also sees zeros (softmax, max)"
ELEMENTWISE = """
    abs acos acosh add and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy copy_p cos cosh div eq
    erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg
    nextafter not or pow reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh
    xor
""".split()  # noqa: SIM905  # a list literal would take a line for each

RULES: dict[str, Rule] = {}


def same(replay: Replay, equation: Equation, inputs: Sequence[Any]) -> Outputs:
    """Runs the primitive with the parameters as traced."""
    return replay.bind(equation, inputs)


def rule(*names: str, replay: Callable[[Replay, Equation, Sequence[Any]], Outputs] = same) -> Callable[..., Any]:
    """Enters a flow, and how it runs at other sizes, for some primitives into the table."""

    def enter(flow: Callable[[Tracer, Equation], list[Axes]]) -> Callable[[Tracer, Equation], list[Axes]]:
        RULES.update({name: Rule(flow, replay) for name in names})
        return flow

    return enter


def _freeze_all(why: str, *values: Axes) -> None:
    for axes in values:
        for term in axes:
            freeze(term, why)


# Elementwise


@rule(*ELEMENTWISE)
def _elementwise(tracer: Tracer, equation: Equation) -> list[Axes]:
    """Equal axes are one; a scalar and an axis of 1 broadcast."""
    (shape,) = equation.out_shapes
    out = fresh(shape)
    for axes, in_shape in zip(equation.ins, equation.in_shapes):
        for i, term in enumerate(axes):
            if in_shape[i] == shape[i]:
                tracer.unify(out[i], term)
    return [out]


@rule("optimization_barrier")
def _unchanged(tracer: Tracer, equation: Equation) -> list[Axes]:
    return equation.ins


# A constraint was made for the traced sizes, which the smaller ones need not divide.
rule("sharding_constraint", replay=lambda replay, equation, inputs: inputs)(_unchanged)


# Contractions and reductions


@rule("dot_general")
def _dot(tracer: Tracer, equation: Equation) -> list[Axes]:
    (left_contract, right_contract), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = equation.ins
    for i, j in zip((*left_contract, *left_batch), (*right_contract, *right_batch)):
        tracer.unify(left[i], right[j])
    free_left = [term for i, term in enumerate(left) if i not in (*left_contract, *left_batch)]
    free_right = [term for i, term in enumerate(right) if i not in (*right_contract, *right_batch)]
    return [[left[i] for i in left_batch] + free_left + free_right]


def _reduce(why: str) -> Callable[[Tracer, Equation], list[Axes]]:
    def flow(tracer: Tracer, equation: Equation) -> list[Axes]:
        """A reduction is noted: a mean over fewer elements is another mean, and a maximum sees the zeros of a mask."""
        (axes,) = equation.ins
        for i in equation.params["axes"]:
            note(axes[i], why)
        return [[term for i, term in enumerate(axes) if i not in equation.params["axes"]]]

    return flow


rule("reduce_sum", "reduce_prod")(_reduce(NORM))
rule("reduce_max", "reduce_min", "reduce_and", "reduce_or")(_reduce(EXTREME))


@rule("argmax", "argmin")
def _arg_reduce(tracer: Tracer, equation: Equation) -> list[Axes]:
    (axes,) = equation.ins
    for i in equation.params["axes"]:
        freeze(axes[i], "its positions are used as numbers")
    return [[term for i, term in enumerate(axes) if i not in equation.params["axes"]]]


# Shapes


@rule(
    "broadcast_in_dim",
    replay=lambda replay, equation, inputs: replay.bind(equation, inputs, shape=replay.shape(equation.outs[0])),
)
def _broadcast(tracer: Tracer, equation: Equation) -> list[Axes]:
    (shape,), (in_shape, *_), axes = equation.out_shapes, equation.in_shapes, equation.ins[0]
    out = fresh(shape)
    for i, j in enumerate(equation.params["broadcast_dimensions"]):
        if in_shape[i] == shape[j]:
            out[j] = axes[i]
    return [out]


def _replay_tile(replay: Replay, equation: Equation, inputs: Sequence[Any]) -> Outputs:
    left = replay.shape(equation.outs[0])
    return replay.bind(equation, inputs, reps=tuple(size // max(old, 1) for size, old in zip(left, inputs[0].shape)))


@rule("tile", replay=_replay_tile)
def _tile(tracer: Tracer, equation: Equation) -> list[Axes]:
    """Repetition is a new outer axis merged with the old one."""
    return [[resolve(Prod((Atom(reps), term))) for reps, term in zip(equation.params["reps"], equation.ins[0])]]


@rule("iota", replay=lambda replay, equation, inputs: replay.bind(equation, inputs, shape=replay.shape(equation.outs[0])))
def _iota(tracer: Tracer, equation: Equation) -> list[Axes]:
    out = fresh(equation.out_shapes[0])
    freeze(out[equation.params["dimension"]], "its positions are used as numbers")
    return [out]


@rule("transpose")
def _transpose(tracer: Tracer, equation: Equation) -> list[Axes]:
    return [[equation.ins[0][i] for i in equation.params["permutation"]]]


@rule("squeeze")
def _squeeze(tracer: Tracer, equation: Equation) -> list[Axes]:
    (axes,) = equation.ins
    gone = {i % len(axes) for i in equation.params["dimensions"]}
    return [[term for i, term in enumerate(axes) if i not in gone]]


@rule("reshape", replay=lambda replay, equation, inputs: replay.bind(equation, inputs, new_sizes=replay.shape(equation.outs[0])))
def _reshape(tracer: Tracer, equation: Equation) -> list[Axes]:
    """Runs of axes with equal products correspond: they are merged and then split from the inside out."""
    (shape,), (in_shape, *_), axes = equation.out_shapes, equation.in_shapes, equation.ins[0]
    if 0 in shape:
        return _unknown(tracer, equation)
    out: Axes = []
    for taken, made in _runs(in_shape, shape):
        merged, sizes = Prod(axes[i] for i in taken), [shape[j] for j in made]
        rest: Term = merged
        inner: Axes = []
        try:
            for size in reversed(sizes):
                rest, factor = split(rest, size)
                inner.insert(0, factor)
        except Misfit as misfit:
            tracer.give_up(str(misfit), merged)
            inner = fresh(sizes, str(misfit))
        out += inner
    return [out]


def _runs(old: Shape, new: Shape) -> list[tuple[range, range]]:
    """The smallest runs of axes of two shapes whose products agree, in order."""
    runs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        start, first = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (left := math.prod(old[start:i])) != (right := math.prod(new[first:j])):
            if left < right:
                i += 1
            else:
                j += 1
        runs.append((range(start, i), range(first, j)))
    return runs


@rule("concatenate")
def _concatenate(tracer: Tracer, equation: Equation) -> list[Axes]:
    along = equation.params["dimension"]
    first, *others = equation.ins
    for axes in others:
        for i, term in enumerate(axes):
            if i != along:
                tracer.unify(first[i], term)
    return [[resolve(Sum(axes[i] for axes in equation.ins)) if i == along else term for i, term in enumerate(first)]]


# Parts of axes


def _window(tracer: Tracer, term: Term, start: int, stop: int) -> Term:
    """The part [start, stop) of an axis."""
    try:
        return cut(cut(term, start)[1], stop - start)[0]
    except Misfit as misfit:
        tracer.give_up(str(misfit), term)
        return Atom(stop - start, str(misfit))


def _replay_slice(replay: Replay, equation: Equation, inputs: Sequence[Any]) -> Outputs:
    starts, limits = (
        tuple(replay.before(term, position) for term, position in zip(equation.ins[0], equation.params[name]))
        for name in ("start_indices", "limit_indices")
    )
    return replay.bind(equation, inputs, start_indices=starts, limit_indices=limits)


@rule("slice", replay=_replay_slice)
def _slice(tracer: Tracer, equation: Equation) -> list[Axes]:
    (axes,), params = equation.ins, equation.params
    out = []
    for i, (term, start, stop) in enumerate(zip(axes, params["start_indices"], params["limit_indices"])):
        if params["strides"] is None or params["strides"][i] == 1:
            out.append(_window(tracer, term, start, stop))
        else:
            tracer.give_up("a strided slice", term)
            out.append(Atom(equation.out_shapes[0][i], "a strided slice"))
    return [out]


def _replay_split(replay: Replay, equation: Equation, inputs: Sequence[Any]) -> Outputs:
    return replay.bind(equation, inputs, sizes=tuple(replay.shape(out)[equation.params["axis"]] for out in equation.outs))


@rule("split", replay=_replay_split)
def _split(tracer: Tracer, equation: Equation) -> list[Axes]:
    (axes,), along = equation.ins, equation.params["axis"]
    outs, start = [], 0
    for size in map(int, equation.params["sizes"]):
        part = _window(tracer, axes[along], start, start + size)
        outs.append([part if i == along else term for i, term in enumerate(axes)])
        start += size
    return outs


@rule("pad")
def _pad(tracer: Tracer, equation: Equation) -> list[Axes]:
    out = []
    for term, config, size in zip(equation.ins[0], equation.params["padding_config"], equation.out_shapes[0]):
        if any(config):
            freeze(term, "it is padded")
        out.append(Atom(size, "it is padded") if any(config) else term)
    return [out]


def _replay_gather(replay: Replay, equation: Equation, inputs: Sequence[Any]) -> Outputs:
    whole = zip(replay.shape(equation.ins[0]), equation.in_shapes[0], equation.params["slice_sizes"])
    return replay.bind(equation, inputs, slice_sizes=tuple(left if size == full else size for left, full, size in whole))


@rule("gather", replay=_replay_gather)
def _gather(tracer: Tracer, equation: Equation) -> list[Axes]:
    """Looked-up axes are frozen, axes taken whole pass, and the batch axes are those of the indices."""
    numbers, sizes, why = equation.params["dimension_numbers"], equation.params["slice_sizes"], "it is looked up by index"
    if numbers.operand_batching_dims:
        return _unknown(tracer, equation)
    (operand, indices), (shape,) = equation.ins, equation.out_shapes
    out = fresh(shape)
    for i, term in zip([i for i in range(len(shape)) if i not in numbers.offset_dims], indices[:-1]):
        out[i] = term
    offsets = iter(numbers.offset_dims)
    for i, term in enumerate(operand):
        whole = sizes[i] == equation.in_shapes[0][i] and i not in numbers.start_index_map
        if not whole:
            freeze(term, why)
        if i not in numbers.collapsed_slice_dims:
            place = next(offsets)
            out[place] = term if whole else Atom(shape[place], why)
    return [out]


@rule("rev")
def _rev(tracer: Tracer, equation: Equation) -> list[Axes]:
    """Position i becomes the last but i: what is left would not lie where it did."""
    (axes,) = equation.ins
    for i in equation.params["dimensions"]:
        freeze(axes[i], "it is reversed")
    return [axes]


@rule("dynamic_slice", replay=_replay_gather)
def _dynamic_slice(tracer: Tracer, equation: Equation) -> list[Axes]:
    """An axis taken whole passes; one that is cut at a computed place is frozen."""
    operand, why = equation.ins[0], "it is sliced at a computed place"
    out = []
    for term, size, part in zip(operand, equation.in_shapes[0], equation.params["slice_sizes"]):
        if part != size:
            freeze(term, why)
        out.append(term if part == size else Atom(part, why))
    return [out]


# Inner jaxprs


def _open(jaxpr: ClosedJaxpr | Jaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


def _call(key: str) -> Callable[[Tracer, Equation], list[Axes]]:
    def flow(tracer: Tracer, equation: Equation) -> list[Axes]:
        """A call is inlined, walked anew each time: two calls of one function may have other sizes left."""
        body = tracer.walk(*_open(equation.params[key]), equation.ins, tracer.where)
        equation.bodies.append(body)
        return body.outs

    return flow


def _inline(replay: Replay, equation: Equation, inputs: Sequence[Any]) -> Outputs:
    return replay.run(equation.bodies[0], inputs)


rule("jit", "pjit", "remat2", "remat", "checkpoint", replay=_inline)(_call("jaxpr"))
rule("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", replay=_inline)(_call("call_jaxpr"))


def _replay_scan(replay: Replay, equation: Equation, inputs: Sequence[Any]) -> Outputs:
    (body,), params = equation.bodies, equation.params
    consts, carries = params["num_consts"], params["num_carry"]
    length = replay.shape([body.layers or NOTHING])[0]

    def step(carry: tuple[Any, ...], xs: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        outputs = replay.run(body, (*inputs[:consts], *carry, *xs))
        return tuple(outputs[:carries]), tuple(outputs[carries:])

    init, xs = tuple(inputs[consts : consts + carries]), tuple(inputs[consts + carries :])
    unroll = min(params["unroll"], length)
    carry, ys = jax.lax.scan(step, init, xs, length=length, reverse=params["reverse"], unroll=unroll)
    return [*carry, *ys]


@rule("scan", replay=_replay_scan)
def _scan(tracer: Tracer, equation: Equation) -> list[Axes]:
    """The body is walked once; the scanned axis is one whole atom, and the carry's sizes come out as they went in."""
    params = equation.params
    start = params["num_consts"] + params["num_carry"]
    init, xs = equation.ins[params["num_consts"] : start], equation.ins[start:]
    layers = Atom(params["length"], "" if xs else "nothing is scanned over", whole=True)
    for axes in xs:
        tracer.unify(layers, axes[0])
    body = tracer.walk(*_open(params["jaxpr"]), [*equation.ins[:start], *(axes[1:] for axes in xs)], tracer.where, layers)
    equation.bodies.append(body)
    carries, ys = body.outs[: params["num_carry"]], body.outs[params["num_carry"] :]
    for before, after in zip(init, carries):
        for x, y in zip(before, after):
            tracer.unify(x, y)
    return [*init, *([layers, *axes] for axes in ys)]


# The rest


def _unknown(tracer: Tracer, equation: Equation) -> list[Axes]:
    why = f"no rule for the primitive {equation.eqn.primitive.name}"
    tracer.report[f"{tracer.where}: {why}; all that it touches is frozen"] = None
    _freeze_all(why, *equation.ins)
    return [fresh(shape, why) for shape in equation.out_shapes]


UNKNOWN = Rule(_unknown, same)
