"""On-policy distillation: the student learns on what it writes itself (Agarwal et al. 2024, GKD).

A rollout is `(model, params, batch, key, step) -> batch`, the `rollout` of a `train.Problem`: it runs inside the step, before the
forward passes, so that student and teacher see the same tokens, and no gradient flows through it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bmjax import losses, models
from bmjax.config import above, at_least, field, within
from bmjax.losses import Schedule, as_term
from bmjax.types import Batch, Context, LossTerm, Outputs, Params, Rollout, Term

SAMPLED = "sampled"  # [B] bool in a batch: the rows that the student wrote


def on_policy(
    prompt: int,
    fraction: float | Schedule = 1.0,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: int | None = None,
    vocabulary: int = 0,
) -> Rollout:
    """The rollout that puts the student's samples in the place of some rows (Agarwal et al. 2024, algorithm 1).

    Each row is, by a coin of its own, either the data's, untouched, or the student's: then its first `prompt` tokens stay, the
    rest is sampled with the cached generation of `models.rollout`, and only sampled tokens count, up to the first stop and with
    it. What a row becomes follows the step and its "id", and not the device. The loss is then any on logits, as
    `losses.on_logits(distill.jsd, beta=0.5)`; one against labels belongs in `off_policy`. A fraction of the constant 0 samples
    nothing and leaves the step as it is without a rollout; any other one samples all rows and uses a part.

    Args:
        prompt: tokens of each row to continue; a batch may have fewer, by its "prompt_lengths".
        fraction: expected fraction of rows that are sampled, lambda of the paper; an optax schedule follows the step.
        temperature: of sampling; 0 takes the likeliest token.
        top_k, top_p, stop, vocabulary: as in `models.generate`.

    Returns:
        (model, params, batch, key, step) -> the batch with other "inputs", "targets" and "weights" [B, T], and "sampled" [B].

    Raises:
        ValueError: a fraction outside [0, 1] (a schedule's at step 0); when traced: no batch["id"], or as `models.rollout`.
    """
    losses.schedules.check("the rollout's fraction", fraction)
    first = float(fraction(jnp.int32(0))) if callable(fraction) else fraction
    if not 0 <= first <= 1:
        raise ValueError(f"the rollout's fraction is {first:g}; expected a number in [0, 1]")

    def rollout(model: Any, params: Params, batch: Batch, key: jax.Array, step: jax.Array) -> Batch:
        if not callable(fraction) and fraction == 0:
            return batch
        if "id" not in batch:
            raise ValueError("a rollout needs batch['id']: one int per example, which its samples follow")
        if jnp.ndim(batch["targets"]) != 2:
            shape = list(jnp.shape(batch["inputs"]))
            raise ValueError(f"a rollout continues tokens [B, T]; the inputs are {shape}: take a language model, or fraction 0")
        sample_key, coin_key = jax.random.split(key)
        how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "stop": stop, "vocabulary": vocabulary}
        own = models.rollout(model, params, batch, sample_key, prompt=prompt, **how)
        coins = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(coin_key, i)))(batch["id"])
        sampled = coins < losses.schedules.at(fraction, step)
        weights = jnp.ones(len(sampled)) if batch.get("weights") is None else batch["weights"]
        shape = batch["targets"].shape
        given = {**batch, "weights": jnp.broadcast_to(weights.reshape(weights.shape + (1,) * (2 - weights.ndim)), shape)}
        mixed = {name: jnp.where(sampled[:, None], own[name], given[name]) for name in ("inputs", "targets", "weights")}
        return {**batch, **mixed, SAMPLED: sampled}

    return rollout


def off_policy(term: LossTerm) -> Term:
    """A term that sees the data's rows alone: labels say nothing of tokens that the student has sampled.

    Args:
        term: such as `losses.cross_entropy_term()`; it weighs items by batch["weights"].
    """
    full = as_term(term)

    def apply(ctx: Context, student: Outputs, teacher: Outputs | None, batch: Batch) -> Any:
        if SAMPLED in batch:
            batch = {**batch, "weights": jnp.where(batch[SAMPLED][:, None], 0.0, batch["weights"])}
        return full.apply(ctx, student, teacher, batch)

    later = full.bind
    bind = None if later is None else lambda student, teacher: off_policy(later(student, teacher))
    return full._replace(apply=apply, bind=bind)


@dataclasses.dataclass
class Rollouts:
    """Config of on-policy distillation, for language models."""

    fraction: float = field(0.0, "share of rows that the student samples itself before each step; 0: none", check=within(0, 1))
    fraction_end: float | None = field(None, "fraction at the last step, linearly; none keeps it", check=within(0, 1))
    prompt: int = field(16, "tokens of a row that are given; the rest is sampled", check=above(0))
    temperature: float = field(1.0, "of sampling; 0 takes the likeliest token", check=at_least(0))
    top_k: int = field(0, "sample among so many likeliest tokens; 0 for all", check=at_least(0))
    top_p: float = field(
        1.0, "sample among the fewest tokens of this probability together", check=(lambda p: 0 < p <= 1, "in (0, 1]")
    )
    stop: int | None = field(None, "token that ends a row; what follows does not count", check=at_least(0))

    @property
    def on(self) -> bool:
        """Whether anything is sampled."""
        return self.fraction > 0 or (self.fraction_end or 0) > 0

    def build(self, steps: int, vocabulary: int = 0) -> Rollout | None:
        """The rollout for a run of `steps` updates, or None; `vocabulary` as for `on_policy`."""
        if not self.on:
            return None
        end = self.fraction_end
        fraction = self.fraction if end is None else losses.ramp(self.fraction, end, steps)
        settings: dict[str, Any] = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "stop": self.stop}
        return on_policy(self.prompt, fraction, vocabulary=vocabulary, **settings)
