"""A model with gates as a `Model`, and the loss term that closes them: L0 regularisation inside the train step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bmjax.prune.gates import Gates
from bmjax.prune.patterns import Sparsity
from bmjax.types import Batch, Context, Mean, Model, Outputs, Params, Term

FEATURE = "l0"
_PART = "gates"
_NO_ID = 2**32 - 1  # dropout folds examples' ids, which are int32 and not below 0, into the same key


@dataclasses.dataclass(frozen=True, eq=False)
class Gated:
    """A `Model` whose parameters are the model's own and, under "gates", the log alphas; made by `gated`.

    The model's paths stay what they are, for rules, regexes and `axes`; the log alphas of a group "stage_0/inner" are at
    "gates/stage_0.inner". Training draws gates from the step's key, the same on every device and in every microbatch;
    evaluation takes those without noise.

    Attributes:
        model: without gates.
        gates: of its groups.
        count_parameters: the feature "l0" counts parameters, not elements.
    """

    model: Model
    gates: Gates
    count_parameters: bool

    @property
    def axes(self) -> Mapping[str, tuple[str, int]]:
        """The model's."""
        return self.model.axes

    @property
    def rules(self) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        """The model's; gates stay whole."""
        return ((f"^{_PART}/", ()), *getattr(self.model, "rules", ((".*", ()),)))

    @property
    def features(self) -> tuple[str, ...]:
        """The model's, and "l0" [B]: the expected number of what stays, once for each example."""
        return (*getattr(self.model, "features", ()), FEATURE)

    @property
    def vocabulary(self) -> int:
        """The model's; 0 where inputs are no token ids."""
        return getattr(self.model, "vocabulary", 0)

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Params]:
        """Fresh (params, model_state).

        Raises:
            ValueError: the model has parameters called "gates" itself.
        """
        params, model_state = self.model.init(key, batch)
        return self.begin(params), model_state

    def begin(self, params: Params) -> Params:
        """The parameters of a trained model with fresh gates, to start from.

        Raises:
            ValueError: they hold "gates" already.
        """
        if _PART in params:
            raise ValueError(f"the model has parameters called {_PART!r}, where the gates go; rename them")
        return {**params, _PART: {_key(name): value for name, value in self.gates.init().items()}}

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
        """See `Model.apply`.

        Raises:
            ValueError: no key in training, parameters without gates, or as the model.
        """
        plain, log_alpha = self._split(params)
        if train and not (rngs and "dropout" in rngs):
            raise ValueError("gates draw random numbers in training; give apply rngs={'dropout': key}, as the step does")
        if train and rngs:
            z = self.gates.sample(log_alpha, jax.random.fold_in(rngs["dropout"], _NO_ID))
        else:
            z = self.gates.expected(log_alpha)
        outputs, model_state = self.model.apply(
            self.gates.apply(plain, z),
            model_state,
            batch,
            train=train,
            rngs=rngs,
            capture=tuple(name for name in capture if name != FEATURE),
        )
        if FEATURE not in capture:
            return outputs, model_state
        stay = self.gates.l0(log_alpha, plain if self.count_parameters else None)
        l0 = jnp.broadcast_to(stay, outputs.logits.shape[:1])
        return outputs._replace(features={**outputs.features, FEATURE: l0}), model_state

    def resize(self, sizes: Mapping[str, int]) -> Model:
        """Raises ValueError: gates belong to elements, and sizes do not say which ones go."""
        raise ValueError("a model with gates cannot be resized; take params, keeps = finished(params), then resize `model`")

    def finished(self, params: Params, sparsity: Sparsity | None = None) -> tuple[Params, dict[str, jax.Array]]:
        """(parameters of the model without gates, what stays of its groups), for `shrink.compact`.

        The gates of evaluation are multiplied into the parameters. Without a sparsity the compact model then gives the outputs
        that the gated one evaluates to.

        Args:
            params: with gates.
            sparsity: as for `Gates.keeps`.

        Raises:
            ValueError: parameters without gates, or as `Gates.keeps`.
        """
        plain, log_alpha = self._split(params)
        return self.gates.apply(plain, self.gates.expected(log_alpha)), self.gates.keeps(log_alpha, sparsity)

    def _split(self, params: Params) -> tuple[Params, dict[str, jax.Array]]:
        """(the model's parameters, {group name: log alphas})."""
        found = params.get(_PART, {})
        if missing := [group.name for group in self.gates.groups if _key(group.name) not in found]:
            raise ValueError(
                f"the parameters hold no gates of the group {missing[0]!r}; begin(params) of the gated model adds them"
            )
        plain = {name: part for name, part in params.items() if name != _PART}
        return plain, {group.name: found[_key(group.name)] for group in self.gates.groups}


def gated(model: Model, gates: Gates, *, count_parameters: bool = False) -> Gated:
    """The model with gates, to be trained in the step with `l0_term` among its terms.

        net = prune.gated(model, gates)
        problem = Problem(net, {"ce": (1.0, task), "l0": (1e-3, prune.l0_term())}, tx)

    Args:
        model: any, with its parameters in a dict.
        gates: on groups of it.
        count_parameters: each element counts as the number of its parameters in the penalty, not as 1.

    Raises:
        ValueError: the model has a feature "l0" itself.
    """
    if FEATURE in getattr(model, "features", ()):
        raise ValueError(f"the model has a feature called {FEATURE!r}, which is the name of the gates' penalty; rename it")
    return Gated(model, gates, count_parameters)


def l0_term() -> Term:
    """The expected number of elements, or parameters, that stay: the penalty of a `gated` student.

    It is one number for the whole batch, and counts with each item as the task loss does, so its mean is that number.
    """

    def apply(ctx: Context, student: Outputs, teacher: Any, batch: Batch) -> Mean:
        values, weights = student.features[FEATURE], batch["weights"]
        return Mean.of(jnp.broadcast_to(values.reshape(-1, *[1] * (weights.ndim - 1)), weights.shape), weights)

    return Term(lambda key, student, teacher: ({}, {}), apply, student_features=(FEATURE,))


def _key(name: str) -> str:
    """Of a group's log alphas among the parameters, where "/" separates the parts of a path."""
    return name.replace("/", ".")
