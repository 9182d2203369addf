"""The largest scores by counting: no sort, no gather, one small all-reduce a pass when the scores are partitioned.

A search over thresholds asks "how many are at least t?" for two values of t a pass, until few scores are left between two
thresholds. These are packed into words, a thirty-second of the scores, in which the search ends: at exactly the wanted number,
or where no threshold gives it. Equal scores are told apart by their position: the same search then runs over positions. So
the result is exact, and the same on any number of devices.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bmjax.prune import counting
from bmjax.prune.search import Bracket, Counter, Goal, begin, search, unfinished
from bmjax.prune.words import Words, as_float, at_least, equal, from_float, minus, running, smaller, total, where, words

_MANY = 2**20  # scores from which a search in a sample first pays for its compilation


class Ranked(NamedTuple):
    """What `rank` returns.

    Attributes:
        masks: a bool array for each array of scores.
        cuts: uint32 [problems], the threshold of each problem in the order of `counting`; the next call may start from it.
    """

    masks: list[jax.Array]
    cuts: jax.Array


def _spans(layered: Sequence[jax.Array], across: bool) -> list[slice]:
    """Which problems each array [layers, ...] holds."""
    ends = [0, *itertools.accumulate(len(array) for array in layered)]
    return [slice(0, 1) if across else slice(a, b) for a, b in itertools.pairwise(ends)]


def _counter(layered: Sequence[jax.Array], across: bool, worth: Sequence[int] | None = None) -> Counter:
    """Counts in arrays [layers, ..., C], of each layer or of everything together; each key counts as often as it is worth."""
    worth = worth or [1] * len(layered)
    spans = _spans(layered, across)

    def count(at: jax.Array) -> Words:
        # The barrier keeps the compiler from computing keys once, before the loop, in memory: that is slower.
        arrays, at = lax.optimization_barrier((list(layered), at))
        found = [counting.at_least(array, at[span]) * jnp.uint32(times) for array, span, times in zip(arrays, spans, worth)]
        counts = words(jnp.concatenate(found))
        return total(counts) if across else counts

    return count


def _everything(sizes: Words) -> Bracket:
    lo, none = jnp.zeros(sizes.high.shape, jnp.uint32), jnp.zeros_like(sizes.high)
    return Bracket(lo, jnp.full_like(lo, counting.END), sizes, Words(none, none))


def _guess(layered: Sequence[jax.Array], k: Words, sizes: Words, across: bool) -> jax.Array:
    """Two thresholds around the k-th largest score, found in a sample: uint32 [problems, 2]."""
    samples, worth = zip(*(counting.sample(array) for array in layered))
    drawn = sum(array.size for array in layered) / sum(array.size for array in samples)
    size, wanted = as_float(sizes), as_float(k)
    deviation = jnp.sqrt(drawn * jnp.maximum(wanted * (1 - wanted / size), drawn))
    ranks = jnp.clip(jnp.stack([wanted + 3 * deviation, wanted - 3 * deviation], axis=-1), 0.0, size[:, None])
    twice = jax.tree.map(lambda x: jnp.stack([x, x], axis=-1), sizes)
    # The ranks are rounded: they must not pass the exact size.
    goal = Goal(smaller(from_float(ranks), twice), slack=deviation[:, None] / 2)
    counter = _counter(samples, across, worth)

    def count(at: jax.Array) -> Words:  # two problems of two thresholds each, in one pass
        counts = counter(at.reshape(len(at), -1))
        return Words(counts.high.reshape(at.shape), counts.low.reshape(at.shape))

    found = search(count, goal, begin(_everything(twice), goal.k, even=True)).bracket
    return jnp.stack([jnp.maximum(found.lo[:, 0], 1), jnp.minimum(found.hi[:, 1], jnp.uint32(counting.END - 1))], axis=-1)


def _around(near: jax.Array, sizes: Sequence[int], otherwise: jax.Array, sampled: bool) -> jax.Array:
    """Two thresholds close to an earlier one, unless there is none or the sample says that it is out of date."""
    # So close that about as many scores lie between them as may be packed, if all lie within a few powers of two.
    drift = jnp.asarray([round(2**24 / math.sqrt(32 * size)) + 1 for size in sizes], jnp.uint32)
    usable = (near >= otherwise[:, 0]) & (near <= otherwise[:, 1]) if sampled else near > 0
    low, high = jnp.maximum(near, drift + 1) - drift, jnp.minimum(near, jnp.uint32(counting.END - 1) - drift) + drift
    return jnp.where(usable[:, None], jnp.stack([low, high], axis=-1), otherwise)


class Cut(NamedTuple):
    """Where the k-th largest score of each problem is.

    Attributes:
        at: uint32 [problems], a threshold with exactly k scores at or above it, or the k-th largest score itself if equal
            scores leave no such threshold.
        clean: bool [problems], the former.
        wanted: [problems], how many of the scores equal to an unclean `at` are among the k largest.
        bits: for each array which scores equal `at`, as `counting.equals` says; nothing where `at` is clean.
    """

    at: jax.Array
    clean: jax.Array
    wanted: Words
    bits: list[jax.Array]


def cut(layered: Sequence[jax.Array], k: Words, across: bool = False, near: jax.Array | None = None) -> Cut:
    """Finds where the k-th largest score is, of each layer of arrays [layers, ..., C] or of everything.

    Passes over all scores leave few of them between lo and hi. These are then packed into one word for each row of scores, and
    the rest of the search is in the words. Where few scores are left but stand close together, in one row, passes go on.

    Args:
        layered: arrays [layers, ..., C].
        k: [problems], how many to keep.
        across: everything is one problem.
        near: uint32 [problems], thresholds to start from; 0 for none.
    """
    counts = sizes_of(layered)
    counts = [sum(counts)] if across else counts
    sizes, spans = words(counts), _spans(layered, across)
    state = begin(_everything(sizes), k, even=True)
    sampled = sum(counts) >= _MANY
    if sampled:
        state = state._replace(at=_guess(layered, k, sizes, across))
    if near is not None:
        state = state._replace(at=_around(near, counts, state.at, sampled))
    # So few that most likely no two are in one row of 32.
    few = jnp.asarray([math.sqrt(size / 32) for size in counts], jnp.float32)

    def crowd(packed: Sequence[jax.Array], bracket: Bracket) -> jax.Array:
        rows = [counting.crowded(words) for words in packed]
        full = jnp.any(jnp.stack(rows), axis=0) if across else jnp.concatenate(rows)
        return full & unfinished(bracket, Goal(k))

    def narrow(loop: Any) -> Any:
        state, slack, _, _ = loop
        state = search(_counter(layered, across), Goal(k, slack, counting.WIDEST), state)
        arrays, lo, hi = lax.optimization_barrier((list(layered), state.bracket.lo, state.bracket.hi))  # as in `_counter`
        packed = [counting.pack(array, lo[span], hi[span]) for array, span in zip(arrays, spans)]
        crowded = crowd(packed, state.bracket)
        return state, jnp.where(crowded, slack / 16, slack), packed, crowded

    blank = [jnp.zeros_like(counting.pack(array, *jnp.ones((2, 1), jnp.uint32))) for array in layered]
    loop = (state, few, blank, jnp.full(few.shape, True))
    state, _, packed, _ = lax.while_loop(lambda loop: jnp.any(loop[-1]), narrow, loop)

    lo, hi, above_lo, above_hi = state.bracket
    inside, wanted = minus(above_lo, above_hi), minus(k, above_hi)

    def count(at: jax.Array) -> Words:
        found = [counting.packed_at_least(words, (at - lo[:, None])[span]) for words, span in zip(packed, spans)]
        counts = words(jnp.concatenate(found))
        return total(counts) if across else counts

    none = Words(*(jnp.zeros_like(lo, jnp.int32),) * 2)
    last = search(count, Goal(wanted), begin(Bracket(lo, hi, inside, none), wanted, even=False)).bracket
    bits = [counting.equals(word, lo[span], hi[span], last.lo[span]) for word, span in zip(packed, spans)]
    return Cut(last.lo, equal(last.above_lo, wanted), minus(wanted, smaller(last.above_hi, wanted)), bits)


def _limits(layered: Sequence[jax.Array], found: Cut, across: bool) -> jax.Array:
    """Before which position of each layer equal scores stay: uint32 [layers of all arrays]."""
    sizes = jnp.asarray(np.array(sizes_of(layered), np.uint32))
    clean = jnp.broadcast_to(found.clean, sizes.shape)
    spans = _spans(layered, across=False)

    def before(limits: jax.Array) -> Words:
        counts = [counting.equals_before(b, _size(a), limits[s]) for a, b, s in zip(layered, found.bits, spans)]
        return words(jnp.concatenate(counts))

    def part() -> jax.Array:
        everywhere = jax.tree.map(lambda x: x[:, 0], before(jnp.stack([sizes, sizes], axis=-1)))
        none = jax.tree.map(jnp.zeros_like, everywhere)
        wanted = found.wanted
        if across:  # an array keeps what those before it leave over
            earlier = running(everywhere)
            wanted = where(at_least(wanted, earlier), minus(wanted, earlier), none)
        wanted = smaller(wanted, everywhere)
        nothing = equal(wanted, none)
        goal = Goal(where(clean | nothing, everywhere, wanted))
        # Keys are positions from the end, so that more of them are above a lower one.
        start = begin(Bracket(jnp.zeros_like(sizes), sizes, everywhere, none), goal.k, even=False)
        last = search(lambda at: before(sizes[:, None] - at), goal, start).bracket
        return jnp.where(clean, sizes, jnp.where(nothing, jnp.uint32(0), sizes - last.lo))

    return lax.cond(jnp.all(clean), lambda: sizes, part)


def _size(array: jax.Array) -> int:
    """Scores in one layer."""
    return math.prod(array.shape[1:])


def sizes_of(layered: Sequence[jax.Array]) -> list[int]:
    """Scores in each layer of each array."""
    return [_size(array) for array in layered for _ in range(len(array))]


def by_layer(scores: Sequence[jax.Array], stacks: Sequence[int] | None = None) -> list[jax.Array]:
    """The scores as [layers, ..., C], with one layer where none are stacked."""
    stacks = stacks if stacks is not None else [0] * len(scores)
    if len(stacks) != len(scores) or any(stack not in (0, 1) for stack in stacks):
        raise ValueError(f"stacks are given as {list(stacks)} for {len(scores)} arrays; expected 0 or 1 for each")
    if not scores or min(leaf.size for leaf in scores) == 0:
        raise ValueError(f"no scores to rank: got arrays of sizes {[leaf.size for leaf in scores]}")
    found = []
    for leaf, stack in zip(scores, stacks):
        if stack and leaf.ndim == 0:
            raise ValueError("a scalar is said to stack layers; expected an array with layers along its first axis")
        split = leaf.reshape(leaf.shape if stack else (1, *leaf.shape))
        found.append(split[:, None] if split.ndim == 1 else split)
        if _size(found[-1]) >= 2**32:
            raise ValueError(f"an array {list(leaf.shape)} is to be ranked; one array or layer can have fewer than 2^32 scores")
    return found


def _wanted(keep: Any, sizes: Sequence[int]) -> Words:
    """How many to keep of each problem, as words."""
    if isinstance(keep, (int, np.ndarray, np.integer, list, tuple)) and not isinstance(keep, Words):
        given: Any = keep
        keep = [given] if np.ndim(given) == 0 else list(given)
        known = [(int(k), size) for k, size in zip(keep, sizes) if isinstance(k, (int, np.integer))]
        if wrong := [(k, size) for k, size in known if not 0 <= k <= size]:
            raise ValueError(f"{wrong[0][0]} of {wrong[0][1]} scores are to be kept; expected 0 to all")
    k = jax.tree.map(jnp.atleast_1d, words(keep))
    if k.high.shape != (len(sizes),):
        raise ValueError(f"`keep` has shape {list(k.high.shape)}; expected one number for each of {len(sizes)} problems")
    return k


def rank(
    scores: Sequence[jax.Array],
    keep: Any,
    *,
    across: bool = False,
    stacks: Sequence[int] | None = None,
    near: jax.Array | None = None,
) -> Ranked:
    """Masks of the largest scores of each array, of each layer, or of everything together.

    Scores are compared as float32; -0.0 equals 0.0; among equal scores the lower flat index (in the order of the arrays) is the
    larger; NaN is below everything, -inf included.

    Args:
        scores: arrays of any shapes, partitioned or not (but stacked layers each on all devices).
        keep: how many to keep of each problem: Python ints, int32 that may be traced, or what `words.remaining` gives.
        across: rank all arrays together, as one problem; then `stacks` mean nothing.
        stacks: for each array 1 if its first axis stacks layers, each of which is a problem by itself, else 0 (the default).
            Problems are numbered array by array, layer by layer.
        near: uint32 [problems], cuts of an earlier call with other scores or other `keep`; 0 for none. The closer they are, the
            fewer passes; the masks are the same.

    Returns:
        Masks with exactly `keep` True, and the thresholds.

    Raises:
        ValueError: an array is empty, an array or layer has 2^32 scores or more, or `keep`, `stacks` or `near` does not fit.
    """
    arrays = by_layer(scores, None if across else stacks)
    counts = sizes_of(arrays)
    counts = [sum(counts)] if across else counts
    if near is not None and near.shape != (len(counts),):
        raise ValueError(f"`near` has shape {list(near.shape)}; expected one cut for each of {len(counts)} problems")
    k = smaller(_wanted(keep, counts), words(counts))
    masks, cuts = _ranked(arrays, k, near, across)
    return Ranked([mask.reshape(leaf.shape) for mask, leaf in zip(masks, scores)], cuts)


@functools.partial(jax.jit, static_argnames="across")  # or every call outside jit would compile its loops again
def _ranked(arrays: list[jax.Array], k: Words, near: jax.Array | None, across: bool) -> tuple[list[jax.Array], jax.Array]:
    found = cut(arrays, k, across, near)
    limits = _limits(arrays, found, across)
    problems, layers = _spans(arrays, across), _spans(arrays, across=False)
    return [counting.kept(a, found.at[p], limits[i]) for a, p, i in zip(arrays, problems, layers)], found.at
