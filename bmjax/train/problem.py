"""What is trained, on what objective, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from bmjax.losses import Schedule, as_term, schedules
from bmjax.train import gradients, precision
from bmjax.types import Aux, Gradient, LossTerm, Model, Params, Rollout, Term, TrainState, View

Frozen: TypeAlias = Any  # {"params": ..., "model_state": ...} of the teacher, or None
Metrics: TypeAlias = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is trained, on what objective, and how; all of it pure functions.

    Attributes:
        model: the student, or the only model.
        terms: {name: (weight, loss term)}; the loss is the weighted sum of the terms' global means. A weight may be a schedule,
            a function of the step.
        tx: optimiser of the model's parameters; pruning transforms are part of it.
        teacher: a frozen model whose params are the step's second argument.
        loss_tx: optimiser of the parameters that terms own (a projector); needed only where some do.
        views: what the forward pass sees of the parameters, applied in order.
        accumulate: microbatches a step.
        gradient: how it is taken and aggregated; see `train.gradients`.
        compute_dtype: of the forward and backward pass, "float32" or "bfloat16"; parameters, optimiser, aggregated gradients,
            batch statistics and losses are float32 in both.
        ema: decay of a moving average of the model's parameters, kept in `extra["ema"]`; None keeps none. Weights that are pruned
            fade from it and do not vanish.
        mean_teacher: the moving average is the teacher (Tarvainen & Valpola 2017).
        microbatch_statistics: terms that relate examples, and batch statistics, may see single microbatches.
        rollout: (model, params, batch, key, step) -> batch, run before the forward passes of student and teacher, on this
            device's rows and outside of the gradient: `distill.on_policy` lets the student write what it learns on. The key is
            the same on every device; what is random must follow it and batch["id"].
        norms: also measure "grad_norm" and "update_norm", L2 over the model's parameters.
    """

    model: Model
    terms: Mapping[str, tuple[float | Schedule, LossTerm]]
    tx: optax.GradientTransformation
    teacher: Model | None = None
    loss_tx: optax.GradientTransformation | None = None
    views: tuple[View, ...] = ()
    accumulate: int = 1
    gradient: Gradient | Callable[..., tuple[Params, Aux]] = gradients.mean()  # noqa: RUF009  # a tuple of functions
    compute_dtype: str = "float32"
    ema: float | None = None
    mean_teacher: bool = False
    microbatch_statistics: bool = False
    rollout: Rollout | None = None
    norms: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError on what cannot work, before anything is traced."""
        if not self.terms:
            raise ValueError("a problem needs at least one loss term")
        if self.accumulate < 1:
            raise ValueError(f"accumulate is {self.accumulate}; expected 1 or more microbatches")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is {self.ema}; expected a decay between 0 and 1, such as 0.999, or None")
        if self.mean_teacher and self.ema is None:
            raise ValueError("a mean teacher is the moving average of the parameters; give its decay as ema")
        if self.mean_teacher and self.teacher is not None:
            raise ValueError("a problem has one teacher: set mean_teacher to False, or leave teacher out")
        precision.check_compute_dtype(self.compute_dtype, ())
        for name, term in self.full_terms.items():
            self._check_term(name, self.terms[name][0], term)

    def _check_term(self, name: str, weight: float | Schedule, term: Term) -> None:
        taken = {"loss": True, "grad_norm": self.norms, "update_norm": self.norms, "ema": self.ema is not None}
        if taken.get(name):
            raise ValueError(f"a loss term cannot be called {name!r}, which is the name of something else; choose another")
        schedules.check(f"the weight of the loss term {name!r}", weight)
        if not term.relates_examples:
            return
        if self.full_gradient.per_example:
            raise ValueError(f"the loss term {name!r} relates examples, so no example has a gradient of its own; use mean()")
        if self.accumulate > 1 and not self.microbatch_statistics:
            raise ValueError(
                f"the loss term {name!r} relates examples: {self.accumulate} microbatches would change its value; "
                "set accumulate to 1, or microbatch_statistics to True if that is meant"
            )

    @property
    def full_terms(self) -> dict[str, Term]:
        """The terms in their full form, bound to the models. Raises ValueError where a term's layers do not fit theirs."""
        return {name: _bound(name, as_term(term), self.model, self.partner) for name, (_, term) in self.terms.items()}

    @property
    def partner(self) -> Model | None:
        """The teacher's network: that of `teacher`, or the model itself where its moving average teaches."""
        return self.model if self.mean_teacher else self.teacher

    @property
    def full_gradient(self) -> Gradient:
        """The gradient in its full form."""
        return gradients.as_gradient(self.gradient)

    @property
    def captures(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the features that the terms need of the student and of the teacher."""
        terms = self.full_terms.values()
        student = {name for term in terms for name in term.student_features}
        teacher = {name for term in terms for name in term.teacher_features}
        return tuple(sorted(student)), tuple(sorted(teacher))

    def scheduled(self, step: jax.Array) -> Metrics:
        """{"kd/temperature": float32 scalar} of all that follows the step: weights of terms, and numbers inside of them."""
        found = {f"{name}/{key}": schedules.at(value, step) for name, key, value in self._schedules()}
        return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}

    def check_schedules(self, steps: int) -> None:
        """Raises ValueError if a schedule is not finite, or a temperature not above 0, at the first or last step of a run."""
        for name, key, value in self._schedules():
            for step in (0, steps - 1):
                schedules.check(f"the {key} of the loss term {name!r}", value, step, positive=key == "temperature")

    def _schedules(self) -> Iterator[tuple[str, str, Schedule]]:
        for name, term in self.full_terms.items():
            weight = self.terms[name][0]
            if callable(weight):
                yield name, "weight", weight
            for key, value in term.schedules.items():
                yield name, "inner_weight" if key == "weight" and callable(weight) else key, value


def _bound(name: str, term: Term, student: Model, teacher: Model | None) -> Term:
    if term.bind is None:
        return term
    try:
        bound: Term = term.bind(student, teacher)
    except ValueError as error:
        raise ValueError(f"the loss term {name!r}: {error}") from None
    return bound


def check_state(problem: Problem, state: TrainState) -> None:
    """Raises ValueError if the state, real or abstract, holds what the problem's gradient would spoil."""
    statistics = bool(jax.tree.leaves(state.model_state))
    remembering = sorted(set(state.extra) & set(problem.terms))
    if problem.full_gradient.per_example and (statistics or remembering):
        what = "the model has batch statistics" if statistics else f"the loss term {remembering[0]!r} has a state"
        raise ValueError(f"{what}, which no single example can renew; use the gradient mean()")
    if problem.accumulate > 1 and statistics and not problem.microbatch_statistics:
        raise ValueError(
            f"the model has batch statistics: {problem.accumulate} microbatches would change them; "
            "set accumulate to 1, or microbatch_statistics to True if that is meant"
        )
    if jax.tree.leaves(state.params["loss"]) and problem.loss_tx is None:
        raise ValueError(
            f"the loss terms {sorted(state.params['loss'])} have parameters of their own; give the problem a loss_tx"
        )
