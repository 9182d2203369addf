"""The shared words. Everything else in bmjax is functions over these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Params: TypeAlias = Any  # nested dict of jax.Array, whatever module library made it
Batch: TypeAlias = Mapping[str, Any]  # "inputs", "targets", "weights", "id" and any extra keys; the first axis is the example


class Mean(NamedTuple):
    """A weighted mean that has not been divided yet, so that shards and ragged batches add up exactly.

    Attributes:
        total: scalar, sum over items of weight * value.
        count: scalar, sum of the weights. It carries no gradient.
    """

    total: jax.Array
    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, on purpose

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array) -> Mean:
        """The Mean of per-item values; the value of an item of weight 0 cannot poison it, and has the gradient 0.

        What the value was made of may still be NaN there, and so its slope, which 0 does not undo: the makers of terms, such as
        `losses.on_logits`, replace that first.

        Args:
            values: [...] float.
            weights: 0 or more; the shape of `values` or its leading axes: a weight [B] holds for all positions of [B, T].

        Raises:
            ValueError: the shapes do not go together.
        """
        if values.shape[: weights.ndim] != weights.shape:
            raise ValueError(
                f"Mean.of was given values {list(values.shape)} and weights {list(weights.shape)}; the weights' axes must be "
                "the first ones of the values: one value for each item, not their mean"
            )
        weights = weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim)).astype(jnp.float32)
        weights = jax.lax.stop_gradient(jnp.broadcast_to(weights, values.shape))
        return cls(jnp.sum(weights * jnp.where(weights > 0, values, 0.0)), jnp.sum(weights))

    def value(self) -> jax.Array:
        """`total / count`, and 0 where nothing was counted."""
        return jnp.where(self.count > 0, self.total / jnp.where(self.count > 0, self.count, 1), 0.0)


class Outputs(NamedTuple):
    """What a model's forward pass returns.

    Attributes:
        logits: [..., classes].
        features: {name: [B, ...]}; only what was asked for, one entry a layer ("layers/3/mlp") under scan too.
        head: (hidden [..., width], kernel [width, classes], bias [classes] or None), for losses fused with the last layer.
    """

    logits: jax.Array
    features: dict[str, jax.Array]
    head: tuple[jax.Array, jax.Array, jax.Array | None] | None = None


class TrainState(NamedTuple):
    """All that the step donates and a checkpoint saves.

    Attributes:
        step: int32 scalar, updates done so far; also the position in the data.
        params: {"model": tree, "loss": {term name: tree}}.
        model_state: batch statistics and the like; {} for most models.
        opt_state: the optimiser's state; pruning masks live here.
        extra: {term name: its state} (a memory bank), and "ema": the moving average of the model's parameters.
        rng: uint32 data of a PRNG key (a typed key costs each call 15 us); never advanced, steps fold their number in.
    """

    step: jax.Array
    params: dict[str, Params]
    model_state: Params
    opt_state: Any
    extra: dict[str, Any]
    rng: jax.Array


class Model(Protocol):
    """A network as pure functions. `bmjax.models` makes them; an adapter wraps anything else."""

    @property
    def axes(self) -> Mapping[str, tuple[str, int]]:
        """{size name: (parameter path, axis)}: the axes that `resize` can change, each named by one member."""
        ...

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Params]:
        """Returns (params, model_state)."""
        ...

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
        """Returns (outputs, new model_state). `capture` names the features to return."""
        ...

    def resize(self, sizes: Mapping[str, int]) -> Model:
        """The same architecture with other sizes; keys are those of `axes`."""
        ...


class Context(NamedTuple):
    """What a loss term may see beside the models' outputs.

    Attributes:
        params: the term's own trained parameters, from its `init`.
        state: the term's own state, from its `init`.
        step: int32 scalar.
        key: PRNG key of this step and term.
        psum: sum over all shards of the batch; the identity where the compiler does it.
        all_gather: concatenates all shards of the batch along axis 0; the identity where the compiler does it. The result is
            the same on every device, as a term's new state must be.
    """

    params: Params
    state: Any
    step: jax.Array
    key: jax.Array
    psum: Callable[[Any], Any]
    all_gather: Callable[[Any], Any]


class Term(NamedTuple):
    """A loss term in its full form. A plain `(student, teacher, batch) -> Mean` is accepted wherever a Term is.

    Attributes:
        init: (key, student Outputs, teacher Outputs or None) -> (params, state); it sees abstract shapes.
        apply: (ctx, student, teacher, batch) -> Mean or (Mean, new state).
        student_features, teacher_features: names that the forward passes must capture for it.
        relates_examples: True if an item's value depends on the other examples; then microbatches are refused unless meant.
        bind: (student Model, teacher Model or None) -> Term: the term to take in this one's place where the two models are known,
            for a term whose layers follow from theirs; None where there is nothing to find out.
        schedules: {argument: step -> number} that the term follows, so that their ends can be checked and their values logged.
    """

    init: Callable[..., tuple[Params, Any]]
    apply: Callable[..., Any]
    student_features: tuple[str, ...] = ()
    teacher_features: tuple[str, ...] = ()
    relates_examples: bool = False
    bind: Callable[[Any, Any], Any] | None = None
    schedules: Mapping[str, Callable[[Any], Any]] = {}  # nobody writes to it


# (model, params, batch, key, step) -> the batch that is trained on, such as one of the model's own samples
Rollout: TypeAlias = Callable[[Any, Params, Batch, jax.Array, jax.Array], Batch]
View: TypeAlias = Callable[[Params, Any, jax.Array], Params]  # (params, opt_state, step) -> what the forward pass sees
LossTerm: TypeAlias = Term | Callable[..., Mean]


class Memory(NamedTuple):
    """What a forward pass reads and renews; microbatches hand it on.

    Attributes:
        model_state: batch statistics and the like.
        terms: {term name: its state}, of the terms that have one.
    """

    model_state: Params
    terms: dict[str, Any]


class Aux(NamedTuple):
    """What a forward pass leaves beside its loss.

    Attributes:
        means: {term name: Mean} over the examples that it saw.
        memory: renewed.
    """

    means: dict[str, Mean]
    memory: Memory


LossFn: TypeAlias = Callable[[Params, Batch, Memory], tuple[Mean, Aux]]


class GradientContext(NamedTuple):
    """What a gradient may use beside the loss.

    Attributes:
        step: int32 scalar.
        key: PRNG key of this step, the same on every device.
        microbatches: in how many parts the batch is to be worked off.
        memory: for the first call of the loss function; each call returns it renewed.
        psum, all_gather: as in `Context`.
    """

    step: jax.Array
    key: jax.Array
    microbatches: int
    memory: Memory
    psum: Callable[[Any], Any]
    all_gather: Callable[[Any], Any]


class Gradient(NamedTuple):
    """How the gradient is taken and aggregated. A plain function is accepted wherever a Gradient is.

    Attributes:
        apply: (loss_fn, params, batch, ctx) -> (grads, aux). `loss_fn(params, batch, memory)` is the whole objective over a part
            of the batch as a `Mean`: the gradient of the step is that of the sum of totals over the sum of counts, over all
            microbatches and devices. `batch` holds this device's rows. The grads are float32 and the same on every device, and
            so is `aux.means`, summed; `aux.memory` is the last.
        per_example: True if it looks at examples one by one: refused with terms that relate them, and with batch statistics.
    """

    apply: Callable[[LossFn, Params, Batch, GradientContext], tuple[Params, Aux]]
    per_example: bool = False


class Member(NamedTuple):
    """One axis of one parameter, or of one array of the model's state, in a group.

    Attributes:
        path: parameter path, as in `trees.paths`.
        axis: axis of the whole array (a scanned axis counts).
        index: int [size, block]; row i lists the positions on `axis` that belong to element i of the group.
    """

    path: str
    axis: int
    index: np.ndarray  # type: ignore[assignment]  # shadows tuple.index, on purpose


class Group(NamedTuple):
    """Axes that shrink together: removing element i removes row i of every member's index from its axis.

    Attributes:
        name: the model's own name for it ("heads"), or the first member's "path:axis".
        size: number of elements.
        stack: number of scanned layers that may each choose their own elements (at equal counts); 0 if all share one choice.
            Then every member's axis 0 is the scanned axis, a keep-mask is [stack, size], and without a stack it is [size].
        members: what to cut.
        note: "" if masking and removing give the same outputs; else one line that says why they differ
            ("LayerNorm statistics change").
        state: what to cut of the model's state (batch statistics belong to channels). A mask leaves it as it is.
    """

    name: str
    size: int
    stack: int
    members: tuple[Member, ...]
    note: str = ""
    state: tuple[Member, ...] = ()
