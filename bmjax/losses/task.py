"""Task losses on arrays, and the terms that make `Mean`s of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bmjax.config import field, within
from bmjax.losses.fused import head_cross_entropy
from bmjax.losses.heads import head_of, here
from bmjax.losses.tiles import Chunks
from bmjax.types import Batch, LossTerm, Mean, Outputs, Term


def cross_entropy(logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy per item.

    Args:
        logits: [..., C] float.
        targets: [...] int in [0, C).
        label_smoothing: in [0, 1); the target distribution is (1 - s) onehot + s / C (Szegedy et al. 2016, section 7).

    Returns:
        [...] float32.
    """
    logits = logits.astype(jnp.float32)
    # optax's, to the letter: with `[..., 0]` for its `take` XLA's CPU compiler fuses worse, 5% of a small language model's step.
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if label_smoothing == 0:  # 0 times a class that is masked with -inf would be NaN
        return nll
    return (1 - label_smoothing) * nll + label_smoothing * (jax.nn.logsumexp(logits, axis=-1) - logits.mean(-1))


def cross_entropy_term(
    label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None, chunks: Chunks | None = None
) -> LossTerm:
    """The task loss: cross-entropy of the student's logits against the targets.

    Where the batch was mixed (mixup, CutMix), an example counts with its weight times "mix" for "targets" and with the rest of it
    for "targets_b": the cross-entropy against the soft target.

    Args:
        label_smoothing: as in `cross_entropy`.
        class_weights: one per class; the mean is then over weight * class weight of the target, as in scikit-learn.
        chunks: computed from the student's head, a tile of the logits at a time; how much of them exists on a device. None takes
            the logits.

    Raises:
        ValueError: label_smoothing outside [0, 1), a class weight that is negative or not finite, or none above 0; at the first
            use, with chunks: a model that gives no head.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected a number in [0, 1)")
    for weight in class_weights or ():
        if not 0 <= weight < math.inf:
            raise ValueError(f"class_weights holds {weight}; expected finite numbers of 0 or more")
    if class_weights is not None and not any(class_weights):
        raise ValueError("class_weights are all 0, so nothing would be trained; give some class a weight above 0")

    def term(student: Outputs, teacher: Outputs | None, batch: Batch) -> Mean:
        def mean(targets: jax.Array, weights: jax.Array) -> Mean:
            if class_weights is not None:
                weights = weights * jnp.asarray(class_weights, jnp.float32)[targets]
            if chunks is None:
                return Mean.of(cross_entropy(student.logits, targets, label_smoothing), weights)
            head = head_of("cross_entropy", "student", student)
            return Mean.of(head_cross_entropy(head, targets, label_smoothing, here(chunks)), weights)

        if class_weights is not None and len(class_weights) != student.logits.shape[-1]:
            raise ValueError(f"{len(class_weights)} class_weights for {student.logits.shape[-1]} classes; give one per class")
        if "mix" not in batch:
            return mean(batch["targets"], batch["weights"])
        one = mean(batch["targets"], batch["weights"] * batch["mix"])
        other = mean(batch["targets_b"], batch["weights"] * (1 - batch["mix"]))
        return Mean(one.total + other.total, one.count + other.count)

    return term


def as_term(term: LossTerm) -> Term:
    """The full form of a loss term; a plain `(student, teacher, batch) -> Mean` gets no parameters and no state."""
    if isinstance(term, Term):
        return term
    fn: Callable[..., Any] = term
    return Term(lambda key, student, teacher: ({}, {}), lambda ctx, student, teacher, batch: fn(student, teacher, batch))


@dataclasses.dataclass
class Task:
    """Config of the task loss."""

    label_smoothing: float = field(0.0, "mass that is spread over all classes", check=within(0, 1, open_high=True))
    class_weights: tuple[float, ...] | None = field(None, "one weight per class; none weighs all alike")
    chunked: bool = field(
        False,
        "fused with the model's last layer: logits of a large vocabulary never exist as a whole; a chunked distillation loss has "
        "it so too",
    )

    def term(self, chunked: bool = False) -> LossTerm:
        """The cross-entropy term; fused with the last layer if the config says so, or `chunked` does."""
        return cross_entropy_term(self.label_smoothing, self.class_weights, Chunks() if self.chunked or chunked else None)
