"""What sliding a window does to axes: convolutions and pooling.

Channels shrink; the axes along which a window slides never do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bmjax.trace.replay import Replay
from bmjax.trace.rules import UNKNOWN, same
from bmjax.trace.terms import Atom, Axes, Misfit, freeze, fresh, split, unify
from bmjax.trace.walk import Equation, Rule, Tracer

_SLIDES = "a window slides over it"


def _conv(tracer: Tracer, equation: Equation) -> list[Axes]:
    """Input channels meet the kernel's inputs, which are those of one feature group; the output's are the kernel's outputs.

    With g groups, the inputs are g blocks and so are the outputs: a whole group may go, and so may one place in all of them.
    Depthwise convolution is the case of blocks of 1.
    """
    if equation.params["batch_group_count"] != 1:
        return UNKNOWN.flow(tracer, equation)
    numbers, groups = equation.params["dimension_numbers"], equation.params["feature_group_count"]
    (inputs, kernel), (_, kernel_shape) = equation.ins, equation.in_shapes
    features, fed, made = inputs[numbers.lhs_spec[1]], kernel[numbers.rhs_spec[1]], kernel[numbers.rhs_spec[0]]
    for term in (*(inputs[i] for i in numbers.lhs_spec[2:]), *(kernel[i] for i in numbers.rhs_spec[2:])):
        freeze(term, _SLIDES)
    try:
        blocks, block = split(features, kernel_shape[numbers.rhs_spec[1]])
        unify(block, fed)
        unify(blocks, split(made, kernel_shape[numbers.rhs_spec[0]] // groups)[0])
    except Misfit as misfit:
        tracer.give_up(str(misfit), features, fed, made)
    out = fresh(equation.out_shapes[0], _SLIDES)
    out[numbers.out_spec[0]] = inputs[numbers.lhs_spec[0]]
    out[numbers.out_spec[1]] = made
    return [out]


def _replay_conv(replay: Replay, equation: Equation, inputs: Sequence[Any]) -> Sequence[Any]:
    numbers = equation.params["dimension_numbers"]
    features, fed = inputs[0].shape[numbers.lhs_spec[1]], inputs[1].shape[numbers.rhs_spec[1]]
    return replay.bind(equation, inputs, feature_group_count=features // fed)


def _pool(tracer: Tracer, equation: Equation) -> list[Axes]:
    """An axis on which the window is one position long and rests passes."""
    (axes, *_), (in_shape, *_), (shape,), params = equation.ins, equation.in_shapes, equation.out_shapes, equation.params
    out = []
    for i, term in enumerate(axes):
        rests = params["window_dimensions"][i] == params["window_strides"][i] == params["base_dilation"][i] == 1
        if rests and in_shape[i] == shape[i]:
            out.append(term)
        else:
            freeze(term, _SLIDES)
            out.append(Atom(shape[i], _SLIDES))
    return [out]


WINDOWS: dict[str, Rule] = {
    "conv_general_dilated": Rule(_conv, _replay_conv),
    "reduce_window_sum": Rule(_pool, same),
    "reduce_window_max": Rule(_pool, same),
    "reduce_window_min": Rule(_pool, same),
}
