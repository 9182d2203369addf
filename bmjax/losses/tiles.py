"""Sweeps over the logits of a head, a tile of tokens and classes at a time: they never exist as a whole.

A head is (hidden [..., D], kernel [D, V], bias [V] or None). Its V classes lie in P partitions of W, one a device where the
kernel is split over its classes: a tile takes `size` classes of each, so that every device reads its own part. The last tile of
a partition that the size does not divide reads classes again; those are not `fresh` and count nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bmjax.parallel import collectives

_LANES = 128  # tiles of more classes than this are a multiple of it


class Head(NamedTuple):
    """A model's last dense layer, not yet multiplied: `Outputs.head`."""

    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array | None = None


class Chunks(NamedTuple):
    """How much of the logits exists at a time.

    Attributes:
        tokens: of them in a tile, about.
        classes: of the vocabulary in a tile, about. A tile takes 4 * tokens * classes bytes, and a few of them exist at a time.
        partitions: in how many equal parts the classes lie on devices; the number of devices over which the kernel is split along
            its classes, and any other number changes the time, not the result. Where it does not divide the classes it is 1.
    """

    tokens: int = 1024
    classes: int = 8192
    partitions: int = 1


class Plan(NamedTuple):
    """The sizes of a sweep; see `plan`.

    Attributes:
        items: tokens that there are.
        rounds: tiles along the tokens.
        partitions, width: P parts of W classes.
        size: classes of each part in a tile.
    """

    items: int
    rounds: int
    partitions: int
    width: int
    size: int

    @property
    def steps(self) -> int:
        """Tiles along the classes."""
        return -(-self.width // self.size)


class Tile(NamedTuple):
    """Where in the vocabulary a tile is.

    Attributes:
        classes: [P, size] int32, which they are.
        fresh: [size] bool; False for classes that an earlier tile had.
    """

    classes: jax.Array
    fresh: jax.Array


def plan(items: int, classes: int, chunks: Chunks) -> Plan:
    """Tiles of about equal size.

    The number of tiles along the tokens divides their number if that costs no more than twice as many tiles: nothing is padded
    then, and tokens that are split over devices stay where they are.

    Raises:
        ValueError: chunks that are not above 0, no tokens or no classes.
    """
    if min(chunks) < 1:
        raise ValueError(f"the logits are to be computed in {chunks}; expected numbers above 0")
    if items < 1 or classes < 1:
        raise ValueError(f"the head is given {items} tokens and {classes} classes; expected 1 or more of both")
    least = -(-items // chunks.tokens)
    rounds = next((k for k in range(least, 2 * least + 1) if items % k == 0), least)
    partitions = chunks.partitions if classes % chunks.partitions == 0 else 1
    width = classes // partitions
    steps = -(-width // -(-chunks.classes // partitions))
    size = -(-width // steps)
    return Plan(items, rounds, partitions, width, min(width, -(-size // _LANES) * _LANES if size > _LANES else size))


def split(plan: Plan, x: jax.Array) -> jax.Array:
    """[items, ...] -> [rounds, n, ...]: round i has tokens i, i + rounds, ..., so that each device finds its own in each."""
    rows = -(-plan.items // plan.rounds)
    x = jnp.pad(x, ((0, rows * plan.rounds - plan.items), *((0, 0),) * (x.ndim - 1)))
    return jnp.swapaxes(x.reshape(rows, plan.rounds, *x.shape[1:]), 0, 1)


def join(plan: Plan, x: jax.Array) -> jax.Array:
    """[rounds, n, ...] -> [items, ...]: the reverse of `split`."""
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(-1, *x.shape[2:])[: plan.items]


def sweep(
    plan: Plan,
    heads: Sequence[Head],
    tile: Callable[..., tuple[jax.Array, ...]],
    sums: tuple[jax.Array, ...],
    given: tuple[Any, ...] = (),
) -> tuple[jax.Array, ...]:
    """What `tile` makes of all tiles in turn.

    Args:
        plan: the sizes.
        heads: whose logits are computed; hidden as `split` returns it.
        tile: (Tile, logits [n, P, size] float32 of each head, sums, *given) -> sums, for the tokens of one round.
        sums: arrays [rounds, n, ...] to begin with.
        given: arrays [rounds, n, ...] that a tile reads, or trees of them.
    """

    def step(sums: tuple[jax.Array, ...], i: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        where, parts = _where(plan, i), [_columns(plan, head, i) for head in heads]

        def tokens(_: None, x: Any) -> tuple[None, tuple[jax.Array, ...]]:
            sums, hidden, given = x
            logits = [_logits(h, part) for h, part in zip(hidden, parts)]
            return None, tile(where, logits, sums, *given)

        return lax.scan(tokens, None, (sums, [head.hidden for head in heads], given))[1], None

    return lax.scan(step, collectives.vary_as(sums, (heads, given)), jnp.arange(plan.steps))[0]


def pull_back(
    plan: Plan,
    heads: Sequence[Head],
    slope: Callable[..., jax.Array],
    cotangent: jax.Array,
    given: tuple[Any, ...] = (),
) -> Head:
    """The gradient of the first head, in its dtypes and shapes, hidden as [items, D].

    A token of cotangent 0 contributes nothing, whatever it holds, NaN included.

    Args:
        plan, heads, given: as for `sweep`.
        slope: (Tile, logits of each head, *given) -> [n, P, size]: a token's value differentiated by the first head's logits.
        cotangent: [rounds, n] of the tokens' values.
    """
    hidden, kernel, bias = heads[0]
    dtype = jnp.result_type(hidden, kernel)
    counted = (cotangent != 0)[..., None]
    others = [head.hidden for head in heads[1:]]

    def step(grads: Any, i: jax.Array) -> tuple[Any, None]:
        where, parts = _where(plan, i), [_columns(plan, head, i) for head in heads]

        def tokens(sums: Any, x: Any) -> tuple[Any, jax.Array]:
            mine, theirs, scale, counts, given = x
            logits = [_logits(h, part) for h, part in zip((mine, *theirs), parts)]
            dz = slope(where, logits, *given) * scale[:, None, None]
            dz = jnp.where(where.fresh & counts[..., None], dz, 0.0)
            narrow = dz.astype(dtype)
            dkernel = _product("nd,npc->dpc", jnp.where(counts, mine, 0), narrow)
            return (sums[0] + dkernel, sums[1] + dz.sum(0)), _product("npc,dpc->npd", narrow, parts[0][0])

        start = collectives.vary_as((jnp.zeros(parts[0][0].shape), jnp.zeros(where.classes.shape)), (heads, cotangent, given))
        (dkernel, dbias), dhidden = lax.scan(tokens, start, (hidden, others, cotangent, counted, given))
        whole = (_added(plan, grads[1], dkernel, i), _added(plan, grads[2], dbias, i))
        return (grads[0] + dhidden, *whole), None

    shape = (*hidden.shape[:-1], plan.partitions, hidden.shape[-1])
    kernels, biases = (kernel.shape[0], plan.partitions, plan.width), (plan.partitions, plan.width)
    zeros = (jnp.zeros(shape), jnp.zeros(kernels, kernel.dtype), jnp.zeros(biases))
    dhidden, dkernel, dbias = lax.scan(step, collectives.vary_as(zeros, (heads, cotangent, given)), jnp.arange(plan.steps))[0]
    return Head(
        join(plan, dhidden.sum(-2)).astype(hidden.dtype),
        dkernel.reshape(kernel.shape),
        None if bias is None else dbias.reshape(-1).astype(bias.dtype),
    )


def grown(
    largest: jax.Array, total: jax.Array, logits: jax.Array, fresh: jax.Array, temperature: float | jax.Array = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Largest logit so far and sum of exp((logit - largest) / T), both [n, P], with a tile more; T a number or [n]."""
    logits = jnp.where(fresh, logits, -jnp.inf)
    top = jnp.maximum(largest, logits.max(-1))
    base = _finite(top)
    before, more = over(largest - base, temperature), over(logits - base[..., None], temperature)
    return top, total * jnp.exp(before) + jnp.exp(more).sum(-1)


def normalize(largest: jax.Array, total: jax.Array, temperature: float | jax.Array = 1.0) -> tuple[jax.Array, jax.Array]:
    """(largest logit, log of the sum of exp((logit - largest) / T)), both [rounds, n], from those of each partition [..., P].

    Kept apart: at logits of 1e4 their sum has lost three decimals.
    """
    top = largest.max(-1)
    return top, jnp.log(jnp.sum(total * jnp.exp(over(largest - _finite(top)[..., None], temperature)), -1))


def log_probabilities(logits: jax.Array, top: jax.Array, log_total: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """[n, P, size] of a tile, from what `normalize` gives, [n].

    Divided after the subtraction: of two logits of 1e4 the quotients are rounded, in each pass as it is compiled, and the
    difference to the largest one is exact.
    """
    return over(logits - top[:, None, None], temperature) - log_total[:, None, None]


def over(x: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """x [items..., ...] / T, a number or one for each item [items...]."""
    axes = jnp.shape(temperature)
    return x / (jnp.reshape(temperature, axes + (1,) * (x.ndim - len(axes))) if axes else temperature)


def nothing(plan: Plan, *fill: float) -> tuple[jax.Array, ...]:
    """An array [rounds, n, P] of each number: what a sweep's sums begin with."""
    rows = -(-plan.items // plan.rounds)
    return tuple(jnp.full((plan.rounds, rows, plan.partitions), value) for value in fill)


def _finite(top: jax.Array) -> jax.Array:
    """0 where all logits so far are -inf: -inf less -inf is NaN."""
    return jnp.where(top == -jnp.inf, 0.0, top)


def _where(plan: Plan, i: jax.Array) -> Tile:
    places = _start(plan, i) + jnp.arange(plan.size)
    return Tile(plan.width * jnp.arange(plan.partitions)[:, None] + places, places >= i * plan.size)


def _start(plan: Plan, i: jax.Array) -> jax.Array:
    return jnp.minimum(i * plan.size, plan.width - plan.size)


def _columns(plan: Plan, head: Head, i: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Kernel [D, P, size] and bias [P, size] of a tile."""

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[:-1], plan.partitions, plan.width)
        return lax.dynamic_slice_in_dim(x, _start(plan, i), plan.size, axis=-1)

    return cut(head.kernel), None if head.bias is None else cut(head.bias)


def _added(plan: Plan, whole: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
    """[..., P, W] with a tile's [..., P, size] added in its place."""
    before = lax.dynamic_slice_in_dim(whole, _start(plan, i), plan.size, axis=-1)
    return lax.dynamic_update_slice_in_dim(whole, before + part.astype(whole.dtype), _start(plan, i), axis=-1)


def _logits(hidden: jax.Array, part: tuple[jax.Array, jax.Array | None]) -> jax.Array:
    z = _product("nd,dpc->npc", hidden, part[0])
    return z if part[1] is None else z + part[1].astype(jnp.float32)


def _product(how: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Summed in float32, whatever is multiplied."""
    if jax.default_backend() == "cpu":  # has no kernel for some products of bfloat16 with a sum in float32
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(how, a, b, preferred_element_type=jnp.float32)
