"""How the gradient of a step is taken and aggregated: the mean over the batch, or each example's, clipped.

A new one is a function `(loss_fn, params, batch, ctx) -> (grads, aux)`, see `types.Gradient`. `accumulate` and
`aggregate` are the two halves that most of them share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bmjax.parallel import collectives
from bmjax.types import Aux, Batch, Gradient, GradientContext, LossFn, Mean, Memory, Params

_TINY = 1e-12


def as_gradient(gradient: Gradient | Callable[..., tuple[Params, Aux]]) -> Gradient:
    """The full form of a gradient; a plain function sees the batch as a whole."""
    return gradient if isinstance(gradient, Gradient) else Gradient(gradient)


def mean() -> Gradient:
    """The gradient of the objective over the global batch: the default."""

    def apply(loss_fn: LossFn, params: Params, batch: Batch, ctx: GradientContext) -> tuple[Params, Aux]:
        def one(micro: Batch, memory: Memory) -> tuple[Params, Any, Memory]:
            def total(params: Params) -> tuple[jax.Array, tuple[jax.Array, Aux]]:
                loss, aux = loss_fn(params, micro, memory)
                return loss.total, (loss.count, aux)

            grads, (count, aux) = jax.grad(total, has_aux=True)(params)
            return grads, (count, aux.means), aux.memory

        grads, (count, means), memory = accumulate(one, params, batch, ctx.memory, ctx.microbatches)
        return aggregate(grads, count, Aux(means, memory), ctx)

    return Gradient(apply)


def clipped_per_example(norm: float) -> Gradient:
    """Each example's gradient, scaled down to at most `norm` (L2 over all parameters), then averaged (Abadi et al. 2016,
    algorithm 1, without the noise).

    An example's gradient is that of its own loss, the mean over its positions; the average weighs examples as the loss does, so
    a norm that clips nothing gives `mean()`. All loss terms must weigh the examples alike. Each example of a microbatch has a
    whole gradient in memory: `accumulate` bounds that, and changes no number.

    Args:
        norm: above 0.

    Raises:
        ValueError: norm is not above 0 or not finite.
    """
    if not 0 < norm < math.inf:
        raise ValueError(f"gradients are clipped to the norm {norm}; expected a finite number above 0")

    def apply(loss_fn: LossFn, params: Params, batch: Batch, ctx: GradientContext) -> tuple[Params, Aux]:
        def clipped(example: Batch) -> tuple[Params, Any]:
            def value(params: Params) -> tuple[jax.Array, tuple[jax.Array, Aux]]:
                loss, aux = loss_fn(params, jax.tree.map(lambda x: x[None], example), ctx.memory)
                return loss.value(), (loss.count, aux)

            grads, (count, aux) = jax.grad(value, has_aux=True)(params)
            scale = count * jnp.minimum(1.0, norm / jnp.maximum(optax.global_norm(grads), _TINY))
            # An example that does not count may hold anything, NaN included.
            return jax.tree.map(lambda g: jnp.where(count > 0, scale * g, 0), grads), (count, aux.means)

        def one(micro: Batch, memory: Memory) -> tuple[Params, Any, Memory]:
            parts = jax.vmap(clipped)(dict(micro))
            return *jax.tree.map(lambda x: x.sum(0), parts), memory

        grads, (count, means), memory = accumulate(one, params, batch, ctx.memory, ctx.microbatches)
        return aggregate(grads, count, Aux(means, memory), ctx)

    return Gradient(apply, per_example=True)


def accumulate(
    one: Callable[[Batch, Memory], tuple[Params, Any, Memory]], like: Params, batch: Batch, memory: Memory, microbatches: int
) -> tuple[Params, Any, Memory]:
    """Runs `one` on each microbatch in turn and adds up what it returns.

    Args:
        one: (microbatch, memory) -> (a tree like the parameters, a tree of scalars, memory for the next).
        like: a tree of the first one's shapes.
        batch: this device's rows.
        memory: for the first microbatch.
        microbatches: how many; they divide the rows.

    Returns:
        (float32 sums of the trees, sums of the scalars, last memory).
    """
    if microbatches == 1:
        tree, scalars, memory = one(batch, memory)
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree), scalars, memory
    n = microbatches
    # Row r of microbatch i is row r * n + i of the batch: each shard keeps its rows, so nothing moves between devices.
    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1), dict(batch))

    def body(carry: tuple[Params, Memory], micro: Batch) -> tuple[tuple[Params, Memory], Any]:
        sums, memory = carry
        tree, scalars, memory = one(micro, memory)
        return (jax.tree.map(jnp.add, sums, tree), memory), scalars

    zeros = collectives.vary(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like))
    (sums, memory), scalars = jax.lax.scan(body, (zeros, memory), split)
    return sums, jax.tree.map(lambda x: x.sum(0), scalars), memory


def aggregate(grads: Params, count: jax.Array, aux: Aux, ctx: GradientContext) -> tuple[Params, Aux]:
    """Sums over the devices in float32, all of them in one collective, then the division: a mean of means would be wrong.

    Args:
        grads: this device's gradient of the sum of totals.
        count: this device's sum of counts.
        aux: its means are summed, too.
        ctx: the gradient's.
    """
    grads, count, means = ctx.psum((jax.tree.map(lambda g: g.astype(jnp.float32), grads), count, aux.means))
    scale = 1.0 / jnp.maximum(count, _TINY)
    means = {name: Mean(*mean) for name, mean in means.items()}
    return jax.tree.map(lambda g: scale * g, grads), Aux(means, aux.memory)
