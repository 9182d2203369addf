"""Sampling from a causal language model with a cache of keys and values: one prefill, then one token a step.

A row's tokens stand at their own positions from 0 on, in the cache too. Prompts are padded on the right: what stands behind
a prompt is never seen by it, and is overwritten by what is generated before anything could see it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.models.decoder import CausalLM
from bmjax.models.linen import LinenModel
from bmjax.types import Batch, Params


class Generated(NamedTuple):
    """What was sampled.

    Attributes:
        tokens: [B, steps] int32; after a stop, only stops.
        lengths: [B] int32, how many of them count: up to the first stop, and with it.
    """

    tokens: jax.Array
    lengths: jax.Array


class _Settings(NamedTuple):
    """What a compiled sampler is made for."""

    steps: int
    greedy: bool
    top_k: int
    nucleus: bool
    stop: int | None
    vocabulary: int  # ids from this one on are never sampled; 0 for all


def prefill(model: LinenModel, params: Params, prompt: jax.Array, lengths: jax.Array, slots: int) -> tuple[jax.Array, Params]:
    """Reads the prompts.

    Args:
        model: built by `Decoder`.
        params: its parameters.
        prompt: [B, P] int, padded on the right.
        lengths: [B] int in [1, P].
        slots: tokens of a row that the cache has room for; at least P.

    Returns:
        The logits [B, vocabulary] after each prompt's last token, and the cache.
    """
    positions = jnp.broadcast_to(jnp.arange(prompt.shape[1], dtype=jnp.int32), prompt.shape)
    outputs, cache = _forward(model, params, model.module.empty_cache(params, prompt.shape[0], slots), prompt, positions)
    hidden, kernel, bias = outputs.head
    # Only one token's logits are wanted; as nothing reads `outputs.logits`, they are never computed.
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    logits = last @ kernel
    return logits if bias is None else logits + bias, cache


def decode(model: LinenModel, params: Params, cache: Params, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Params]:
    """One more token for each row.

    Args:
        model, params: as in `prefill`.
        cache: from `prefill` or from here.
        tokens: [B] int.
        positions: [B] int: where they stand, each below the cache's slots and one behind the row's last.

    Returns:
        The logits [B, vocabulary] after the tokens, and the cache.
    """
    outputs, cache = _forward(model, params, cache, tokens[:, None], positions[:, None])
    return outputs.logits[:, 0], cache


def _forward(model: LinenModel, params: Params, cache: Params, tokens: jax.Array, positions: jax.Array) -> Any:
    batch = {"inputs": tokens, "positions": positions}
    outputs, changed = model.module.apply({"params": params, "cache": cache}, batch, mutable=["cache"])
    return outputs, changed["cache"]


def truncate(logits: jax.Array, top_k: int = 0, top_p: float | jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The likeliest tokens, most likely first; ties go to the lower id.

    Args:
        logits: [..., V] float.
        top_k: how many tokens stay; 0 for all (Fan et al. 2018).
        top_p: the fewest of these whose probabilities add up to it or more stay; None for all (Holtzman et al. 2020).

    Returns:
        Their logits [..., K], float32, -inf where dropped, and ids [..., K] int32; K is top_k or V.
    """
    values, tokens = jax.lax.top_k(logits.astype(jnp.float32), top_k or logits.shape[-1])
    if top_p is not None:
        probabilities = jax.nn.softmax(values, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The first always stays, whatever rounding does to its 0.
        keep = (before < top_p) | (jnp.arange(values.shape[-1]) == 0)
        values = jnp.where(keep, values, -jnp.inf)
    return values, tokens.astype(jnp.int32)


def _choose(logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array, settings: _Settings) -> jax.Array:
    """[B] int32: the next token of each row, from logits [B, V] and one key a row."""
    logits = logits[:, : settings.vocabulary or None]
    if settings.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / temperature
    draw = jax.vmap(jax.random.categorical)
    if not settings.top_k and not settings.nucleus:
        return draw(keys, logits).astype(jnp.int32)
    values, tokens = truncate(logits, settings.top_k, top_p if settings.nucleus else None)
    return jnp.take_along_axis(tokens, draw(keys, values)[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def _generate(
    params: Params,
    prompt: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    *,
    model: LinenModel,
    settings: _Settings,
) -> Generated:
    def choose(logits: jax.Array, step: jax.Array | int) -> jax.Array:
        return _choose(logits, jax.vmap(lambda key: jax.random.fold_in(key, step))(keys), temperature, top_p, settings)

    def ended(token: jax.Array) -> jax.Array:
        return jnp.zeros_like(token, bool) if settings.stop is None else token == settings.stop

    def advance(carry: tuple[Params, jax.Array, jax.Array], step: jax.Array) -> tuple[Any, jax.Array]:
        cache, token, done = carry
        logits, cache = decode(model, params, cache, token, lengths + step - 1)
        token = choose(logits, step)
        if settings.stop is not None:
            token = jnp.where(done, settings.stop, token)
        return (cache, token, done | ended(token)), token

    # The last token is never read, so it needs no slot.
    logits, cache = prefill(model, params, prompt, lengths, prompt.shape[1] + settings.steps - 1)
    first = choose(logits, 0)
    _, rest = jax.lax.scan(advance, (cache, first, ended(first)), jnp.arange(1, settings.steps))
    tokens = jnp.concatenate([first[:, None], rest.T], axis=1)
    return Generated(tokens, _until_stop(tokens, settings.stop))


def _until_stop(tokens: jax.Array, stop: int | None) -> jax.Array:
    """[B] int32: tokens up to the first stop, and with it."""
    if stop is None:
        return jnp.full_like(tokens[:, 0], tokens.shape[1])
    return jnp.sum(jnp.cumsum(tokens == stop, axis=1) - (tokens == stop) == 0, axis=1, dtype=jnp.int32)


def generate(
    model: LinenModel,
    params: Params,
    prompt: Any,
    *,
    steps: int,
    key: jax.Array | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    prompt_lengths: Any = None,
    stop: int | None = None,
    ids: Any = None,
    vocabulary: int = 0,
) -> Generated:
    """Continues each prompt by `steps` tokens. Pure: it may be called inside `jit`, with prompt, lengths, ids and key traced.

    Args:
        model: built by `Decoder`.
        params: its parameters, partitioned or not.
        prompt: [B, P] int; shorter ones are padded on the right, with any token.
        steps: tokens to sample for each row.
        key: PRNG key; needed for sampling.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: sample among so many likeliest tokens; 0 for all.
        top_p: sample among the fewest likeliest tokens, of those, that have this probability together, after the temperature.
        prompt_lengths: [B] int, of each prompt; None if all are P long.
        stop: token that ends a row.
        ids: [B] int; a row's samples follow the key and its id, and not its place. None for 0, 1, ...
        vocabulary: tokens from this one on are padding and never sampled; 0 if none are.

    Raises:
        ValueError: one of these is out of its range; of traced arrays only the shapes are checked.
    """
    prompt = prompt if isinstance(prompt, jax.Array) else np.asarray(prompt)
    kept, nucleus = 0 if temperature == 0 else top_k, temperature != 0 and top_p < 1
    settings = _Settings(steps, temperature == 0, kept, nucleus, stop, vocabulary)
    _check(model, prompt, settings, key, temperature, top_k, top_p)
    rows, longest = prompt.shape
    lengths = jnp.full(rows, longest, jnp.int32) if prompt_lengths is None else prompt_lengths
    ids = jnp.arange(rows) if ids is None else ids
    _check_range("prompt_lengths", lengths, (rows,), 1, longest)
    if np.shape(ids) != (rows,):
        raise ValueError(f"ids have shape {list(np.shape(ids))}; expected one for each of the {rows} prompts")
    base = jax.random.key(0) if key is None else key
    keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.asarray(ids))
    prompt, lengths = jnp.asarray(prompt, jnp.int32), jnp.asarray(lengths, jnp.int32)
    return _generate(params, prompt, lengths, keys, jnp.float32(temperature), jnp.float32(top_p), model=model, settings=settings)


def _check(
    model: LinenModel, prompt: Any, settings: _Settings, key: jax.Array | None, temperature: float, top_k: int, top_p: float
) -> None:
    module, steps, stop = model.module, settings.steps, settings.stop
    if not isinstance(module, CausalLM):
        raise ValueError(f"generate needs a causal language model, as `Decoder` builds; got {type(module).__name__}")
    if np.ndim(prompt) != 2 or 0 in np.shape(prompt) or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(f"the prompt must be ints [B, P], P of at least 1; got {prompt.dtype} {list(np.shape(prompt))}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected 1 or more tokens to generate")
    needed = prompt.shape[1] + steps - 1
    if module.length and needed > module.length:
        raise ValueError(
            f"a prompt of {prompt.shape[1]} and {steps} steps need {needed} positions, but {module.length} were learned; "
            "shorten one of them"
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected 0 (the likeliest token) or a number above")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected a probability in (0, 1]")
    if not 0 <= settings.vocabulary <= module.vocabulary:
        raise ValueError(f"vocabulary is {settings.vocabulary}; expected 0 (all tokens) up to the model's {module.vocabulary}")
    vocabulary = settings.vocabulary or module.vocabulary
    if not 0 <= top_k <= vocabulary:
        raise ValueError(f"top_k is {top_k}; expected 0 (all tokens) up to the vocabulary of {vocabulary}")
    if stop is not None and not 0 <= stop < vocabulary:
        raise ValueError(f"stop is {stop}; expected a token in [0, {vocabulary - 1}]")
    if temperature > 0 and key is None:
        raise ValueError(f"sampling at temperature {temperature} needs a key; give one, or temperature 0")
    _check_range("prompt", prompt, np.shape(prompt), 0, module.vocabulary - 1)


def _check_range(name: str, values: Any, shape: tuple[int, ...], low: int, high: int) -> None:
    """Raises ValueError if an array has another shape or, where its values are known, one outside [low, high]."""
    if np.shape(values) != shape:
        raise ValueError(f"{name} has shape {list(np.shape(values))}, expected {list(shape)}")
    if not isinstance(values, jax.core.Tracer):
        host = np.asarray(values)
        bad = host[(host < low) | (host > high)]
        if bad.size:
            raise ValueError(f"{name} holds {bad[0]}; expected ints in [{low}, {high}]")


def rollout(
    model: LinenModel,
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    prompt: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: int | None = None,
    vocabulary: int = 0,
) -> dict[str, jax.Array]:
    """A batch on the model's own samples, as on-policy distillation trains on (Agarwal et al. 2024, GKD).

    The first `prompt` tokens of each row stay (fewer where "prompt_lengths" [B] says so), the rest is sampled, and only sampled
    tokens, up to the first stop and with it, are targets of weight above 0. Samples follow the key and "id".

    Args:
        model: built by `Decoder`.
        params: of the policy; no gradient flows into them from here.
        batch: "inputs" [B, T] int and maybe "prompt_lengths", "id" [B] int, "weights" [B] or [B, T] (a row without any weight
            stays without).
        key: PRNG key.
        prompt: tokens of each row to continue, below T + 1.
        temperature, top_k, top_p, stop, vocabulary: as in `generate`.

    Returns:
        The batch with other "inputs" [B, T] int32, "targets" [B, T] int32 and "weights" [B, T] float32.

    Raises:
        ValueError: the rows are packed, the prompt leaves nothing to sample, or as `generate`.
    """
    rows, length = batch["inputs"].shape
    if "segments" in batch:
        raise ValueError("a rollout continues one prompt a row; the batch is packed: give one sequence a row, without segments")
    if not 1 <= prompt <= length:
        raise ValueError(f"the prompt is {prompt} tokens; expected 1 to the {length} of a row")
    starts = jnp.asarray(batch.get("prompt_lengths", jnp.full(rows, prompt, jnp.int32)))
    found = generate(
        model,
        jax.lax.stop_gradient(params),
        batch["inputs"][:, :prompt],
        steps=length + 1 - prompt,
        key=key,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        prompt_lengths=starts,
        stop=stop,
        ids=batch.get("id"),
        vocabulary=vocabulary,
    )
    # Where each place of the row of T + 1 tokens comes from: the prompt, then the samples, then padding without weight.
    place = jnp.arange(length + 1) - starts[:, None]
    sampled = jnp.take_along_axis(found.tokens, jnp.clip(place, 0, found.tokens.shape[1] - 1), axis=1)
    given = jnp.pad(jnp.asarray(batch["inputs"], jnp.int32)[:, :prompt], ((0, 0), (0, length + 1 - prompt)))
    row = jnp.where(place < 0, given, sampled)
    weights = ((place >= 0) & (place < found.lengths[:, None]))[:, 1:].astype(jnp.float32)
    if "weights" in batch:
        weights *= (jnp.asarray(batch["weights"]).reshape(rows, -1) > 0).any(axis=1, keepdims=True)
    return {**batch, "inputs": row[:, :-1], "targets": row[:, 1:], "weights": weights}
