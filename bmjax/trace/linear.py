"""The linear layers of any JAX function, found in its jaxpr: products and convolutions of activations with a parameter.

A parameter is followed through whatever only moves, slices or casts it, into calls and into the steps of a scan over stacked
layers. What it meets decides: exactly one product with something that depends on the batch makes it a layer's kernel.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from bmjax import trees
from bmjax.trace.inputs import Rows, Window, factors, spans
from bmjax.trace.layout import Place, Reshape, Step, Transpose, layout_of, memory, read, write
from bmjax.trace.rules import RULES, UNKNOWN
from bmjax.trace.terms import Axes, Term, fresh
from bmjax.trace.walk import Equation, Frame, Tracer, shape
from bmjax.trace.windows import WINDOWS
from bmjax.types import Params


@dataclasses.dataclass(frozen=True)
class Linear:
    """One linear layer: its kernel is all of a parameter, or one layer's part of a stacked one, or a fixed slice.

    Attributes:
        path: of the parameter.
        at: the step of each scan around, outermost first; () outside scans.
        inputs, outputs: sizes of its kernel as a matrix [in, out]; a convolution's inputs are its taps, channels innermost.
        place: where in the parameter that matrix is.
        taps: how many axes a convolution slides along; 0 of any other product.
    """

    path: str
    at: tuple[int, ...]
    inputs: int
    outputs: int
    place: Place
    taps: int = 0

    @property
    def name(self) -> str:
        """The path, and the layer of a stacked parameter in brackets."""
        return self.path + "".join(f"[{i}]" for i in self.at)

    def get(self, leaf: jax.Array) -> jax.Array:
        """[in, out]: its part of the parameter, or of an array like it, in the array's dtype."""
        return read(self.place, leaf, self.at)

    def put(self, leaf: jax.Array, matrix: jax.Array, *, donate: bool = False) -> jax.Array:
        """The array with `matrix` [in, out] in its place, partitioned as before; `donate` lets it take the array's buffer."""
        return write(self.place, leaf, self.at, matrix, donate=donate)


@dataclasses.dataclass(frozen=True)
class Product:
    """Where a step is a linear layer: which input is the kernel, in which place, and how the other becomes rows."""

    kernel: int
    place: Place
    rows: Rows


@dataclasses.dataclass(frozen=True)
class Constant:
    """A value that is known beforehand."""

    value: Any


@dataclasses.dataclass(eq=False)
class Run:
    """A primitive to be bound. Inputs and outputs are slots, numbers that stand for values.

    Attributes:
        product: set if it is a linear layer.
        batched: whether its results depend on the batch.
    """

    primitive: Any
    params: dict[str, Any]
    ins: list[int | Constant]
    outs: list[int]
    batched: bool
    product: Product | None = None
    why_not: str = ""


@dataclasses.dataclass(eq=False)
class Loop:
    """A scan that is taken apart: its body is run step by step. Its carry is taken to depend on the batch.

    Attributes:
        ins, outs: slots around it, as a scan's: consts, carry and stacked; carry and stacked.
        body_ins, body, body_outs: slots that the body begins with, its steps, where its results are.
    """

    length: int
    reverse: bool
    consts: int
    carries: int
    ins: list[int | Constant]
    outs: list[int]
    body_ins: list[int]
    body: list[Run | Loop]
    body_outs: list[int | Constant]


class Planner:
    """Turns a walked jaxpr into a flat list of steps, with scans over stacked layers taken apart.

    Attributes:
        places: {slot: the part of a parameter that it is}; such values are read when they are needed and never kept.
        consts: {slot: a value that was baked into the function}.
        batched: slots that depend on the batch.
    """

    def __init__(self, batch_axes: Sequence[Term]):
        self.places: dict[int, Place] = {}
        self.consts: dict[int, Any] = {}
        self.batched: set[int] = set()
        self._numbers = itertools.count()
        self._batch_axes = batch_axes

    def slot(self, place: Place | None = None, *, batched: bool = False) -> int:
        """A new one."""
        number = next(self._numbers)
        if place is not None:
            self.places[number] = place
        if batched:
            self.batched.add(number)
        return number

    def frame(self, frame: Frame, ins: Sequence[int | Constant], depth: int) -> tuple[list[Run | Loop], list[int | Constant]]:
        """The steps of a jaxpr, calls inlined, and where its results are."""
        env: dict[Any, int | Constant] = dict(zip(frame.jaxpr.invars, ins))
        for var, value in zip(frame.jaxpr.constvars, frame.consts):
            env[var] = number = self.slot()
            self.consts[number] = value

        def find(var: Any) -> int | Constant:
            return Constant(var.val) if isinstance(var, Literal) else env[var]

        steps: list[Run | Loop] = []
        for equation in frame.equations:
            found = [find(var) for var in equation.eqn.invars]
            more, outs = self._equation(equation, found, depth)
            steps += more
            env.update(zip(equation.eqn.outvars, outs))
        return steps, [find(var) for var in frame.jaxpr.outvars]

    def _equation(
        self, equation: Equation, ins: list[int | Constant], depth: int
    ) -> tuple[list[Run | Loop], Sequence[int | Constant]]:
        name = equation.eqn.primitive.name
        if moved := self._moved(equation, ins):
            return [], moved
        if name == "scan":
            loop = self._loop(equation, ins, depth)
            if loop is not None:
                return [loop], loop.outs
        elif equation.bodies:
            return self.frame(equation.bodies[0], ins, depth)
        batched = any(self._is(self.batched, value) for value in ins)
        outs = [self.slot(batched=batched) for _ in equation.eqn.outvars]
        run = Run(equation.eqn.primitive, equation.params, ins, outs, batched)
        if name in ("dot_general", "conv_general_dilated"):
            run.product, run.why_not = self._product(equation, ins)
        return [run], outs

    def _is(self, among: Collection[int], value: int | Constant) -> bool:
        return not isinstance(value, Constant) and value in among

    def _moved(self, equation: Equation, ins: list[int | Constant]) -> list[int] | None:
        """Slots of what is a parameter still, after this."""
        if len(ins) != 1 or isinstance(ins[0], Constant) or ins[0] not in self.places:
            return None
        outs = [var.aval for var in equation.eqn.outvars]
        steps = layout_of(equation.eqn.primitive.name, equation.params, equation.in_shapes[0], outs)
        return None if steps is None else [self.slot(self.places[ins[0]].then(step)) for step in steps]

    def _loop(self, equation: Equation, ins: list[int | Constant], depth: int) -> Loop | None:
        """A scan over stacked kernels taken apart; None for any other."""
        params, (frame,) = equation.params, equation.bodies
        consts, carries, length = params["num_consts"], params["num_carry"], params["length"]

        def inside(i: int, value: int | Constant) -> int:
            place = None if isinstance(value, Constant) else self.places.get(value)
            if consts <= i < consts + carries:
                return self.slot(batched=True)
            if place is not None and i >= consts:
                place = place.then(Step(depth, length))
            return self.slot(place, batched=self._is(self.batched, value))

        body_ins = [inside(i, value) for i, value in enumerate(ins)]
        body, body_outs = self.frame(frame, body_ins, depth + 1)
        stepped = lambda product: any(isinstance(layout, Step) and layout.depth == depth for layout in product.place.chain)
        if not any(run.product and stepped(run.product) for run in runs(body)):
            return None
        outs = [self.slot(batched=True) for _ in equation.eqn.outvars]
        return Loop(length, params["reverse"], consts, carries, ins, outs, body_ins, body, body_outs)

    def _product(self, equation: Equation, ins: list[int | Constant]) -> tuple[Product | None, str]:
        """The linear layer that a product is, or why it is none."""
        kernels = [i for i, value in enumerate(ins) if self._is(self.places, value)]
        others = [i for i, value in enumerate(ins) if self._is(self.batched, value)]
        if len(kernels) != 1 or len(others) != 1:
            return None, "what it is multiplied with does not depend on the batch"
        (kernel,), (other,) = kernels, others
        make = _convolution if equation.eqn.primitive.name == "conv_general_dilated" else _dense
        made = make(equation, kernel, other)
        if isinstance(made, str):
            return None, made
        (order, inputs), rows, terms = made
        outputs = math.prod(equation.in_shapes[kernel]) // max(inputs, 1)
        slot = ins[kernel]
        assert not isinstance(slot, Constant)
        place = self.places[slot].uncast.then(Transpose(order), Reshape((inputs, outputs)))
        rows = dataclasses.replace(rows, spans=spans(terms, self._batch_axes))
        return Product(kernel, place, rows), ""


def _dense(equation: Equation, kernel: int, other: int) -> Any:
    """((order of the kernel's axes, inputs), rows, factors of the rows), or why not."""
    contracted, batch = equation.params["dimension_numbers"]
    if batch[0]:
        return "the product has batch axes: it is a kernel for each"
    shapes, sides = equation.in_shapes, [tuple(map(int, axes)) for axes in contracted]
    rest = [tuple(i for i in range(len(side)) if i not in axes) for side, axes in zip(shapes, sides)]
    inputs = math.prod(shapes[kernel][i] for i in sides[kernel])
    # Innermost last, in the kernel's own order, so that neighbours in memory are neighbours among the inputs.
    pairs = sorted(zip(sides[kernel], sides[other]))
    order = (*(i for i, _ in pairs), *rest[kernel])
    terms = [part for i in rest[other] for part in factors(equation.ins[other][i])]
    rows = Rows((*rest[other], *(i for _, i in pairs)), inputs, None, tuple(term.size for term in terms))
    return (order, inputs), rows, terms


def _convolution(equation: Equation, kernel: int, other: int) -> Any:
    params = equation.params
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return "the convolution has groups"
    if kernel != 1:
        return "it is what a kernel slides over"
    numbers = params["dimension_numbers"]
    out, channels, *spatial = numbers.rhs_spec
    sizes = equation.in_shapes[1]
    inputs = math.prod(sizes) // sizes[out]
    window = Window(
        tuple(sizes[i] for i in spatial),
        tuple(map(int, params["window_strides"])),
        tuple((int(low), int(high)) for low, high in params["padding"]),
        tuple(map(int, params["lhs_dilation"])),
        tuple(map(int, params["rhs_dilation"])),
    )
    positions = fresh(equation.out_shapes[0][i] for i in numbers.out_spec[2:])
    terms = [part for term in (equation.ins[0][numbers.lhs_spec[0]], *positions) for part in factors(term)]
    rows = Rows(tuple(numbers.lhs_spec), inputs, window, tuple(term.size for term in terms))
    return ((*spatial, channels, out), inputs), rows, terms


def runs(steps: Sequence[Run | Loop]) -> Iterator[Run]:
    """All primitives, those of bodies too."""
    for step in steps:
        if isinstance(step, Run):
            yield step
        else:
            yield from runs(step.body)


def live(steps: Sequence[Run | Loop], wanted: set[int]) -> list[Run | Loop]:
    """The steps that something in `wanted` needs. Adds to `wanted` what they need themselves."""
    found: list[Run | Loop] = []
    for step in reversed(steps):
        if wanted.isdisjoint(step.outs):
            continue
        if isinstance(step, Loop):
            wanted.update(slot for slot in step.body_outs if not isinstance(slot, Constant))
            step.body = live(step.body, wanted)
        wanted.update(slot for slot in step.ins if not isinstance(slot, Constant))
        found.append(step)
    return found[::-1]


def _uses(
    steps: Sequence[Run | Loop], places: Mapping[int, Place], around: tuple[int, ...] = ()
) -> Iterator[tuple[str, Run, str]]:
    """(path, the primitive that a parameter meets, why that is no linear layer)."""
    for step in steps:
        if isinstance(step, Loop):
            # A carry that begins as a parameter is one no longer.
            for value in step.ins[step.consts : step.consts + step.carries]:
                if not isinstance(value, Constant) and value in places:
                    yield places[value].path, Run(None, {}, [], [], False), "it is the carry of a scan"
            yield from _uses(step.body, places, (*around, len(around)))
            continue
        for i, value in enumerate(step.ins):
            if isinstance(value, Constant) or value not in places:
                continue
            place, product = places[value], step.product
            if product is None or product.kernel != i:
                yield place.path, step, step.why_not or f"it is used by {step.primitive.name}"
            elif {layout.depth for layout in place.chain if isinstance(layout, Step)} != set(around):
                yield place.path, step, "it is used at every step of a scan"
            else:
                yield place.path, step, ""


def _overlap(places: Sequence[Place], whole: tuple[int, ...]) -> bool:
    """Whether two places of one parameter share a number, or may."""
    dummy = np.empty(whole, np.int8)  # never touched, so never there
    parts = []
    for place in places:
        steps = {layout.depth: layout.length for layout in place.chain if isinstance(layout, Step)}
        for at in itertools.product(*(range(steps[depth]) for depth in sorted(steps))):
            parts.append(memory(place, dummy, at))
    if any(part is None for part in parts):
        return True
    return any(np.shares_memory(one, other) for one, other in itertools.combinations(parts, 2))  # type: ignore[arg-type]


def judge(planner: Planner, steps: Sequence[Run | Loop], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """{path: why it is no linear layer's kernel}, "" where it is; only of parameters that the function uses."""
    uses: dict[str, list[tuple[Run, str]]] = {}
    for path, run, why in _uses(steps, planner.places):
        uses.setdefault(path, []).append((run, why))
    reasons = {}
    for path, found in uses.items():
        others = [why for _, why in found if why]
        linear = [run.product for run, why in found if not why and run.product]
        if others and linear:
            reasons[path] = f"it is tied: {others[0]}, and by a product"
        elif others:
            reasons[path] = others[0]
        elif len(linear) > 1 and _overlap([product.place for product in linear], shapes[path]):
            reasons[path] = f"{len(linear)} products use it"
        else:
            reasons[path] = ""
    return reasons


def plan(fn: Callable[..., Any], params: Params, batch: Any) -> tuple[Planner, list[Run | Loop], dict[str, str], list[int]]:
    """(the planner, the steps, {path: why it is no kernel, or ""}, slots of the batch's arrays) of `fn(params, batch)`."""
    closed = jax.make_jaxpr(fn)(params, batch)
    in_axes: list[Axes] = [fresh(shape(var)) for var in closed.jaxpr.invars]
    leaves, given = trees.paths(params), trees.paths(batch)
    batch_axes: Axes = []
    if isinstance(batch, Mapping) and "weights" in batch and "inputs" in given:
        batch_axes = in_axes[len(leaves) + list(given).index("inputs")][: np.ndim(batch["weights"])]
    frame = Tracer(RULES | WINDOWS, UNKNOWN).walk(closed.jaxpr, closed.consts, in_axes)
    planner = Planner(batch_axes)
    param_slots = [planner.slot(Place(path)) for path in leaves]
    batch_slots = [planner.slot(batched=True) for _ in given]
    steps, outs = planner.frame(frame, [*param_slots, *batch_slots], 0)
    steps = live(steps, {slot for slot in outs if not isinstance(slot, Constant)})
    reasons = judge(planner, steps, {path: tuple(leaf.shape) for path, leaf in leaves.items()})
    return planner, steps, reasons, batch_slots
