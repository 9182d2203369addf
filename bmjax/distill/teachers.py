"""Several teachers as one: a `Model` made of models, so that the step needs nothing new."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from bmjax.distill.numerics import check_temperature
from bmjax.losses import Head, cross_entropy
from bmjax.models.checks import check_capture
from bmjax.parallel import collectives
from bmjax.types import Batch, Model, Outputs, Params

Choice = Callable[[list[jax.Array], Batch], jax.Array]  # (logits of each, batch) -> index [...], or weights [..., n]

SPACES = ("probability", "logits")


def confident(logits: list[jax.Array], batch: Batch) -> jax.Array:
    """For each item the teacher whose distribution has the lowest entropy; int32 [...]."""

    def entropy(z: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(z)
        return -jnp.sum(jnp.exp(log_p) * jnp.where(log_p > -jnp.inf, log_p, 0.0), axis=-1)

    return jnp.argmin(jnp.stack([entropy(z) for z in logits]), axis=0)


def right(logits: list[jax.Array], batch: Batch) -> jax.Array:
    """For each item the teacher with the lowest cross-entropy against the targets, where it was mixed against both; int32 [...].

    Raises:
        ValueError: the batch has no targets.
    """
    if "targets" not in batch:
        raise ValueError("the teacher that is right is chosen by the targets, and the batch has none; choose the confident one")

    def nll(z: jax.Array) -> jax.Array:
        values = cross_entropy(z, batch["targets"])
        if "mix" not in batch:
            return values
        mix = batch["mix"].reshape(batch["mix"].shape + (1,) * (values.ndim - batch["mix"].ndim))
        return mix * values + (1 - mix) * cross_entropy(z, batch["targets_b"])

    return jnp.argmin(jnp.stack([nll(z) for z in logits]), axis=0)


CHOICES: dict[str, Choice] = {"confident": confident, "right": right}


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """A `Model` of several; see `ensemble`. Parameters and states are {"0": the first model's, "1": ...}.

    Attributes:
        models: one or more.
        weights: of the average, they sum to 1.
        space: what is averaged.
        choose: weights for each item, in place of `weights`.
        temperature: at which probabilities are averaged.
    """

    models: tuple[Model, ...]
    weights: tuple[float, ...]
    space: str = "probability"
    choose: Choice | None = None
    temperature: float = 1.0

    @property
    def axes(self) -> Mapping[str, tuple[str, int]]:
        """None: the sizes are the models' own."""
        return {}

    @property
    def rules(self) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        """Each model's own partition rules, for its parameters alone; a model without any is held whole."""
        return tuple(
            (_below(str(i), pattern), tuple(axes))
            for i, model in enumerate(self.models)
            for pattern, axes in (getattr(model, "rules", None) or ((".*", ()),))
        )

    @property
    def features(self) -> tuple[str, ...]:
        """The models' own, each below its number: "0/layers/3"."""
        return tuple(f"{i}/{name}" for i, model in enumerate(self.models) for name in getattr(model, "features", ()))

    @property
    def vocabulary(self) -> int:
        """The least of the models' token ids; 0 where inputs are no ids."""
        return min((size for model in self.models if (size := getattr(model, "vocabulary", 0))), default=0)

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Params]:
        """Fresh (params, model_state), each model from its own key."""
        found = [model.init(jax.random.fold_in(key, i), batch) for i, model in enumerate(self.models)]
        return {str(i): params for i, (params, _) in enumerate(found)}, {str(i): state for i, (_, state) in enumerate(found)}

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
        """See `Model.apply`; logits float32. A head where every model gives one and what is averaged are logits, by weights.

        Raises:
            ValueError: logits of different shapes, an unknown feature, or a choice of another shape than the items'.
        """
        logits, heads, features, states = [], [], {}, {}
        for i, model in enumerate(self.models):
            own = tuple(name.partition("/")[2] for name in capture if name.partition("/")[0] == str(i))
            found, states[str(i)] = model.apply(
                params[str(i)], model_state.get(str(i), {}), batch, train=train, rngs=rngs, capture=own
            )
            # Split over their rows alone: an index into classes that a device has only a part of aborts some compilers.
            logits.append(collectives.rows(found.logits.astype(jnp.float32)))
            heads.append(found.head)
            features.update({f"{i}/{name}": value for name, value in found.features.items()})
        if len({z.shape for z in logits}) > 1:
            raise ValueError(f"the teachers' logits are {', '.join(str(list(z.shape)) for z in logits)}; they must agree")
        check_capture(capture, (*features, *self.features))
        return Outputs(self._together(logits, batch), features, self._head(heads)), states

    def resize(self, sizes: Mapping[str, int]) -> Model:
        """Raises ValueError: the models have sizes of their own."""
        raise ValueError("several teachers cannot be resized together; resize each, and take their ensemble")

    def _together(self, logits: list[jax.Array], batch: Batch) -> jax.Array:
        if self.choose is not None:
            return self._mixed(logits, _as_weights(self.choose(logits, batch), logits))
        used = [i for i, weight in enumerate(self.weights) if weight > 0]
        weights = jnp.asarray([self.weights[i] for i in used], jnp.float32)
        return self._mixed([logits[i] for i in used], weights)

    def _head(self, given: Sequence[tuple[jax.Array, jax.Array, jax.Array | None] | None]) -> Head | None:
        """The weighted sum of several heads' logits as one head: hidden states and kernels, one after the other."""
        heads = [Head(*head) for head in given if head is not None]
        if self.space != "logits" or self.choose is not None or len(heads) < len(self.models):
            return None
        used = [(head, weight) for head, weight in zip(heads, self.weights) if weight > 0]
        hidden = [(weight * head.hidden.astype(jnp.float32)).astype(head.hidden.dtype) for head, weight in used]
        biases = [weight * head.bias.astype(jnp.float32) for head, weight in used if head.bias is not None]
        bias = sum(biases[1:], biases[0]) if biases else None
        return Head(jnp.concatenate(hidden, axis=-1), jnp.concatenate([head.kernel for head, _ in used]), bias)

    def _mixed(self, logits: list[jax.Array], weights: jax.Array) -> jax.Array:
        """The average with weights [..., n]."""
        parts = zip(logits, jnp.moveaxis(weights, -1, 0)[..., None])
        if self.space == "logits":
            return sum((jnp.where(w > 0, w * z, 0.0) for z, w in parts), start=jnp.float32(0))
        terms = [jax.nn.log_softmax(z / self.temperature) + jnp.log(w) for z, w in parts]
        return self.temperature * jax.nn.logsumexp(jnp.stack(terms), axis=0)


def ensemble(
    models: Sequence[Model],
    *,
    weights: Sequence[float] | None = None,
    space: str = "probability",
    choose: Choice | str | None = None,
    temperature: float = 1.0,
) -> Ensemble:
    """One teacher made of several: `Problem(..., teacher=ensemble([a, b]))`, with frozen params {"0": a's, "1": b's}.

    In probability space the logits are T log(sum_i w_i softmax(z_i / T)), so that their softmax **at the temperature T** is the
    average of the teachers' softened distributions (Hinton, Vinyals & Dean 2015, section 1: the arithmetic mean); at another
    temperature it is not. Give the temperature of the loss; with 1 the average is that of the plain probabilities, which is what
    accuracy and likelihood of an ensemble mean. In logit space they are sum_i w_i z_i: the geometric mean, at every temperature.

    Args:
        models: of any architecture and width, with the same classes. Each is partitioned by its own rules.
        weights: 0 or more, one for each model, divided by their sum; None weighs all alike.
        space: "probability" or "logits".
        choose: weights of each item's own: a function (list of logits [..., C], batch) -> the index of a model, int [...] or [B],
            or weights [..., n] or [B, n], divided by their sum; "confident" takes the lowest entropy, "right" the lowest
            cross-entropy against the targets. An item whose weights are all 0 has them all alike.
        temperature: see above; of no effect in logit space.

    Raises:
        ValueError: no models, weights that are not as above, both weights and choose, an unknown space or choice, a bad
            temperature.
    """
    check_temperature(temperature)
    if not models:
        raise ValueError("an ensemble was given no teachers; give one or more models")
    if space not in SPACES:
        raise ValueError(f"teachers cannot be averaged in {space!r}; expected one of {', '.join(SPACES)}")
    if isinstance(choose, str) and choose not in CHOICES:
        raise ValueError(f"teachers cannot be chosen by {choose!r}; expected one of {', '.join(CHOICES)}, or a function")
    if weights is not None and choose is not None:
        raise ValueError("weights and choose are two ways to weigh the teachers; give one of them")
    given = [1.0] * len(models) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(models):
        raise ValueError(f"there are {len(given)} weights for {len(models)} teachers; give one for each")
    if not all(0 <= weight < math.inf for weight in given) or sum(given) == 0:
        raise ValueError(f"the teachers' weights are {given}; expected finite numbers of 0 or more, one of them above 0")
    chooser = CHOICES[choose] if isinstance(choose, str) else choose
    return Ensemble(tuple(models), tuple(weight / sum(given) for weight in given), space, chooser, temperature)


def _as_weights(chosen: jax.Array, logits: list[jax.Array]) -> jax.Array:
    """A choice as weights [..., n] that sum to 1. Raises ValueError if it fits neither the items nor the examples."""
    n, items = len(logits), logits[0].shape[:-1]
    if jnp.issubdtype(chosen.dtype, jnp.integer):
        lead, weights = chosen.shape, jax.nn.one_hot(chosen, n)
    else:
        lead, weights = chosen.shape[:-1], chosen
    if lead not in (items, items[:1]) or weights.shape[-1:] != (n,):
        raise ValueError(
            f"the choice of a teacher is {chosen.dtype} {list(chosen.shape)}; expected integers {list(items)} or "
            f"{list(items[:1])}, or weights with an axis of {n} more"
        )
    weights = weights.reshape(*lead, *(1,) * (len(items) - len(lead)), n)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 1 / n)


def _below(name: str, pattern: str) -> str:
    """A rule's regex on a model's own paths, as one on the paths below `name/`: there "the beginning" comes after the name."""
    start = rf"(?<=\A{name}/)"
    anchored = re.sub(r"(\\.|\[\^?\]?[^\]]*\])|\^", lambda m: (m[1] if m[1] != r"\A" else start) if m[1] else start, pattern)
    return rf"\A{name}/.*?(?:{anchored})"
