"""Contrastive representation distillation: which of many embeddings is the teacher's of the same example (Tian et al. 2020).

`crd` is the loss on arrays; `losses.on_features(crd, ...)` contrasts the examples of a batch with each other, `crd_term` with
embeddings of the whole data set, which it remembers in a bank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.distill.numerics import check_temperature
from bmjax.distill.shapes import unit
from bmjax.losses import Schedule, schedules
from bmjax.losses.features import checked
from bmjax.losses.makers import cleaned
from bmjax.types import Batch, Context, Mean, Outputs, Params, Term

Pair = tuple[jax.Array, jax.Array]


def crd(
    s: jax.Array,
    t: jax.Array,
    weights: jax.Array | None = None,
    embedding: Params | None = None,
    temperature: float = 0.07,
    examples: int | None = None,
) -> jax.Array:
    """Mean over examples of -log h(s_i, t_i) - sum_j log(1 - h(s_i, t_j)) - sum_j log(1 - h(s_j, t_i)) - log h(s_i, t_i), j != i.

    h(s, t) = e^(s't / T) / (e^(s't / T) + N / M) for unit vectors, N negatives for each anchor and M examples in all: noise
    contrastive estimation, once with the student as the anchor and once with the teacher (Tian et al. 2020, section 3.1). The
    usual weight is 0.8. It crosses the batch, and is not 0 at s = t.

    Args:
        s, t: embeddings or features [B, ..., C] float; positions are averaged.
        weights: [B], 0 or more; an example of weight 0 is no negative either. None for all alike.
        embedding: {"student", "teacher"}: {"kernel" [C, d], "bias" [d]}, from `crd_embedding`; None where both have one width.
        temperature: above 0.
        examples: M; None for those of the batch, N + 1.

    Returns:
        float32 scalar.

    Raises:
        ValueError: a temperature that is not above 0, another number of examples, or widths that differ without an embedding.
    """
    check_temperature(temperature)
    if len(s) != len(t):
        raise ValueError(f"crd: the student has {len(s)} examples and the teacher {len(t)}; they must agree")
    weights = jnp.ones(len(s)) if weights is None else weights
    s, t = cleaned((s, t), weights)
    s, t = embedded(s, t, embedding)
    others = (weights > 0)[None] & ~jnp.eye(len(s), dtype=bool)
    values = contrasted((s, t), (s, t), others, temperature, examples or jnp.sum(weights > 0))
    return Mean.of(values, weights).value()


def contrasted(pair: Pair, negatives: Pair, others: jax.Array, temperature: float, examples: int | jax.Array) -> jax.Array:
    """[B]: the loss of each example, as in `crd`.

    Args:
        pair: unit embeddings of the student and of the teacher [B, d].
        negatives: unit embeddings that each network gives others, [N, d].
        others: [B, N] bool: which of them are another example than the anchor.
        temperature, examples: as in `crd`.
    """
    count = jnp.sum(others, axis=1).astype(jnp.float32)
    # h is a sigmoid, and its logarithms stay finite for any dot product.
    shift = jnp.log(jnp.maximum(count, 1.0) / jnp.maximum(examples, 1))
    products = lambda a, b: jnp.matmul(a, b.T, precision="highest") / temperature
    (s, t), (s_others, t_others) = pair, negatives
    both = jnp.where(count > 0, -2 * jax.nn.log_sigmoid(jnp.sum(s * t, axis=1) / temperature - shift), 0.0)
    for scores in (products(s, t_others), products(t, s_others)):
        both -= jnp.sum(jnp.where(others, jax.nn.log_sigmoid(shift[:, None] - scores), 0.0), axis=1)
    return both


def embedded(s: jax.Array, t: jax.Array, embedding: Params | None) -> Pair:
    """Unit vectors [B, d] of both features, averaged over positions and mapped. Raises ValueError if they do not fit."""
    flat = [x.astype(jnp.float32).reshape(len(x), -1, x.shape[-1]).mean(axis=1) for x in (s, t)]
    if embedding is not None:
        flat = [x @ embedding[whose]["kernel"] + embedding[whose]["bias"] for x, whose in zip(flat, ("student", "teacher"))]
    if flat[0].shape != flat[1].shape:
        raise ValueError(
            f"crd: the student's embeddings are {list(flat[0].shape)} and the teacher's {list(flat[1].shape)}; give "
            "losses.on_features trained={'embedding': distill.crd_embedding()}"
        )
    return unit(flat[0], -1), unit(flat[1], -1)


def crd_embedding(width: int = 128) -> Callable[[jax.Array, Any, Any], Params]:
    """What `losses.on_features(crd, layers, trained={"embedding": crd_embedding()})` trains: a linear map of each network.

    Args:
        width: of the embeddings, above 0.

    Returns:
        (key, student feature, teacher feature) -> {"student", "teacher"}: {"kernel" [C, width], "bias" [width]}.

    Raises:
        ValueError: a width below 1.
    """
    if width < 1:
        raise ValueError(f"crd: embeddings of width {width}; expected 1 or more")

    def begin(key: jax.Array, s: Any, t: Any) -> Params:
        keys, init = jax.random.split(key), jax.nn.initializers.lecun_normal()
        make = lambda key, x: {"kernel": init(key, (x.shape[-1], width)), "bias": jnp.zeros(width)}
        return {"student": make(keys[0], s), "teacher": make(keys[1], t)}

    return begin


def crd_term(
    student_feature: str = "final",
    teacher_feature: str = "final",
    *,
    examples: int | np.ndarray,
    negatives: int = 1024,
    width: int = 128,
    temperature: float = 0.07,
    momentum: float = 0.5,
    weight: float | Schedule = 1.0,
) -> Term:
    """The term of `crd` against a memory bank of both networks' embeddings of every example.

    The bank is the term's state, {"student", "teacher"}: float32 [M, width], in the train state: saved, and the same on
    every device. Each step draws `negatives` of its rows, one draw for the whole batch, and then mixes the batch's embeddings
    into their own rows, m old + (1 - m) new, normalised. Rows start as random unit vectors. The embeddings' maps are the term's
    parameters: they train in the same step, and are in no export.

    Args:
        student_feature, teacher_feature: names as in `Model.features`, [B, ..., C]; positions of weight are averaged.
        examples: the ids of those to train on, such as dataset.train.id, M in all; or M, where batch["id"] counts them from 0.
            An example of another id has the loss NaN; one of weight 0 is not remembered.
        negatives: N, drawn with replacement; an anchor leaves its own rows out. The paper has 16384, for 50,000 examples.
        width, temperature: of the embeddings, and of `crd`.
        momentum: m, in [0, 1).
        weight: multiplies the loss; an optax schedule follows the step.

    Raises:
        ValueError: a number out of its range, ids that are no integers; at init: no teacher; when traced: no batch["id"].
    """
    check_temperature(temperature)
    for feature in (student_feature, teacher_feature):
        if not isinstance(feature, str):
            raise ValueError(f"crd: a feature is {feature!r}; give the names of one of the student's and one of the teacher's")
    known = np.arange(examples) if isinstance(examples, int | np.integer) else np.unique(np.asarray(examples))
    if not np.issubdtype(known.dtype, np.integer):
        raise ValueError(f"crd: examples is {known.dtype}; expected the integer ids of the examples, or their number")
    if len(known) and not -(2**31) <= known[0] <= known[-1] < 2**31:
        raise ValueError(f"crd: the ids of the examples are {known[0]} to {known[-1]}; expected int32")
    if len(known) < 2 or negatives < 1:
        raise ValueError(f"crd: {negatives} negatives of {len(known)} examples; expected 1 or more, of 2 or more")
    if not 0 <= momentum < 1:
        raise ValueError(f"crd: the bank's momentum is {momentum}; expected a number in [0, 1)")
    schedules.check("the weight of crd", weight)
    begin = crd_embedding(width)

    def init(key: jax.Array, student: Outputs, teacher: Outputs | None) -> tuple[Params, Any]:
        if teacher is None:
            raise ValueError("the term crd needs a teacher; give the step one, or leave crd out")
        map_key, *keys = jax.random.split(key, 3)
        bank = {name: unit(jax.random.normal(key, (len(known), width)), -1) for name, key in zip(("student", "teacher"), keys)}
        return begin(map_key, student.features[student_feature], teacher.features[teacher_feature]), bank

    def apply(ctx: Context, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Mean, Any]:
        if "id" not in batch:
            raise ValueError("crd needs batch['id']: one int per example, its row in the bank")
        rows, weights = _rows(known, batch["id"]), batch["weights"]
        mine, theirs = cleaned((student.features[student_feature], teacher.features[teacher_feature]), weights)
        pair = embedded(_over_positions(mine, weights), _over_positions(theirs, weights), ctx.params)
        drawn = jax.random.randint(ctx.key, (negatives,), 0, len(known))
        others = jax.lax.stop_gradient((ctx.state["student"][drawn], ctx.state["teacher"][drawn]))
        values = contrasted(pair, others, drawn[None] != rows[:, None], temperature, len(known))
        values = jnp.where(rows < len(known), values, jnp.nan)
        values = jnp.broadcast_to(values.reshape(values.shape + (1,) * (weights.ndim - 1)), weights.shape)
        there = weights.reshape(len(weights), -1).sum(axis=1) > 0
        *fresh, rows, there = ctx.all_gather((*jax.lax.stop_gradient(pair), rows, there))
        bank = {name: _remember(ctx.state[name], new, rows, there, momentum) for name, new in zip(("student", "teacher"), fresh)}
        return Mean.of(schedules.at(weight, ctx.step) * values, weights), bank

    follows = {"weight": weight} if callable(weight) else {}
    return checked(Term(init, apply, (student_feature,), (teacher_feature,), relates_examples=True, schedules=follows))


def _over_positions(x: jax.Array, weights: jax.Array) -> jax.Array:
    """A feature [B, T, C] with weights [B, T] as its mean [B, C] over the positions that count; others as they are."""
    if weights.ndim == 1 or x.shape[: weights.ndim] != weights.shape:
        return x
    counts = weights.reshape(weights.shape + (1,) * (x.ndim - weights.ndim))
    axes = tuple(range(1, weights.ndim))
    return jnp.sum(counts * jnp.where(counts > 0, x, 0), axes) / jnp.maximum(jnp.sum(counts, axes), 1e-12)


def _rows(known: np.ndarray, ids: jax.Array) -> jax.Array:
    """Where ids [B] stand among the known ones, which are sorted [M]; M for others."""
    at = jnp.searchsorted(jnp.asarray(known, jnp.int32), ids)
    return jnp.where(jnp.asarray(known, jnp.int32).at[at].get(mode="clip") == ids, at, len(known))


def _remember(bank: jax.Array, new: jax.Array, rows: jax.Array, there: jax.Array, momentum: float) -> jax.Array:
    """The bank [M, d] with new embeddings [B, d] mixed into its rows; of an example that is there twice, the last."""
    kept = there & (rows < len(bank))
    twice = (rows[:, None] == rows[None]) & kept[None] & jnp.triu(jnp.ones((len(rows), len(rows)), bool), 1)
    rows = jnp.where(kept & ~twice.any(axis=1), rows, len(bank))
    old = bank.at[rows].get(mode="clip")
    return bank.at[rows].set(unit(momentum * old + (1 - momentum) * new, -1), mode="drop")
