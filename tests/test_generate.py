"""Cached generation against the uncached model, sampling against NumPy, and what a rollout is made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bmjax import parallel
from bmjax.models import Decoder, Plain, generate, rollout
from bmjax.models.generate import decode, prefill, truncate
from bmjax.parallel import collectives

B, PROMPT, STEPS, V = 4, 5, 6, 13
LENGTH = PROMPT + STEPS - 1  # the last token is not read
LENGTHS = np.array([5, 1, 3, 4], np.int32)
SIZES = {"layers": 2, "width": 16, "neurons": 24}
GPT2 = {"norm": "layernorm", "positions": "learned", "length": LENGTH, "mlp": "gelu", "bias": True, "tied": False}
CONFIGS = {
    "grouped": Decoder(**SIZES, heads=4, kv_heads=2, qk_norm=True),
    "learned": Decoder(**SIZES, heads=2, **GPT2),
    "again": Decoder(**SIZES, heads=4, kv_heads=1, remat="full"),
}
MODELS = {name: made.build((LENGTH,), V) for name, made in CONFIGS.items()}


@functools.cache
def prompt():
    return np.random.default_rng(0).integers(0, V, (B, PROMPT)).astype(np.int32)


@functools.cache
def random_params(name):
    shapes, _ = jax.eval_shape(MODELS[name].init, jax.random.key(0), {"inputs": prompt()})
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape)).astype(np.float32), shapes)


@functools.cache
def uncached(name):
    model = MODELS[name]
    return jax.jit(lambda p, x: model.apply(p, {}, {"inputs": x})[0].logits)


def close(found, want):
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def rows(prompt, lengths, tokens):
    """[B, LENGTH + 1]: each prompt with its continuation right behind it, zeros at the end."""
    full = np.zeros((len(prompt), LENGTH + 1), np.int32)
    for row, given, n, more in zip(full, prompt, lengths, tokens):
        row[:n] = given[:n]
        row[n : n + len(more)] = more
    return full


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_every_step_are_the_uncached_ones(name):
    """Ragged prompts, whose padding is tokens like any other; the continuation is arbitrary."""
    model, params = MODELS[name], random_params(name)
    more = np.random.default_rng(2).integers(0, V, (B, STEPS)).astype(np.int32)
    expected = uncached(name)(params, rows(prompt(), LENGTHS, more)[:, :LENGTH])
    read = jax.jit(lambda p, x, n: prefill(model, p, x, n, LENGTH))
    step = jax.jit(lambda p, cache, token, place: decode(model, p, cache, token, place))
    logits, cache = read(params, prompt(), LENGTHS)
    for i in range(STEPS):
        close(logits, np.asarray(expected)[np.arange(B), LENGTHS - 1 + i])
        if i < STEPS - 1:
            logits, cache = step(params, cache, more[:, i], LENGTHS + i)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_greedy_is_the_argmax_of_the_uncached_model_again_and_again(name, lengths):
    params = random_params(name)
    found = generate(MODELS[name], params, prompt(), steps=STEPS, prompt_lengths=lengths)
    assert found.tokens.dtype == jnp.int32
    starts = np.full(B, PROMPT) if lengths is None else lengths
    full = rows(prompt(), starts, np.zeros((B, 0)))
    for i in range(STEPS):
        logits = np.asarray(uncached(name)(params, full[:, :LENGTH]))
        full[np.arange(B), starts + i] = logits[np.arange(B), starts + i - 1].argmax(-1)
    np.testing.assert_array_equal(found.tokens, [row[n : n + STEPS] for row, n in zip(full, starts)])
    np.testing.assert_array_equal(found.lengths, STEPS)


@pytest.mark.parametrize("spec", ["data=4,tensor=2", "fsdp=4,tensor=2"])
def test_partitioned_parameters_generate_the_same(spec):
    params, model, mesh = random_params("grouped"), MODELS["grouped"], parallel.make_mesh(spec)
    split = jax.device_put(params, parallel.partition(params, model.rules, mesh))
    placed = jax.device_put(prompt(), parallel.batch_sharding(mesh))
    settings = {"steps": STEPS, "key": jax.random.key(0), "temperature": 0.8, "prompt_lengths": LENGTHS}
    np.testing.assert_array_equal(
        generate(model, split, placed, **settings).tokens, generate(model, params, prompt(), **settings).tokens
    )


def test_bfloat16_keeps_a_bfloat16_cache():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_params("grouped"))
    logits, cache = jax.eval_shape(lambda p: prefill(MODELS["grouped"], p, prompt(), jnp.asarray(LENGTHS), LENGTH), half)
    assert {logits.dtype, *(x.dtype for x in jax.tree.leaves(cache))} == {jnp.dtype(jnp.bfloat16)}
    assert {x.shape for x in jax.tree.leaves(cache)} == {(2, B, LENGTH, 2, 4)}


def test_the_ordinary_forward_pass_knows_no_cache():
    run = lambda p: MODELS["grouped"].module.apply({"params": p}, {"inputs": prompt()}, mutable=["cache"])
    assert jax.eval_shape(run, random_params("grouped"))[1] == {}
    assert "scatter" not in str(jax.make_jaxpr(run)(random_params("grouped")))


def kept(logits, top_k, top_p):
    """The ids that stay, in order, one token after another."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or len(logits)]
    weights = np.exp(np.array([logits[i] for i in order], np.float64) - max(logits))
    weights /= weights.sum()
    stay, total = [], 0.0
    for i, weight in zip(order, weights):
        if stay and total >= top_p:
            break
        stay.append(i)
        total += weight
    return stay


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.7), (4, None), (4, 0.7), (1, 0.5), (0, 1e-6), (0, 0.999)])
def test_truncation_keeps_what_the_definition_says(top_k, top_p):
    logits = np.random.default_rng(3).normal(size=(40, V)).astype(np.float32) * 2
    logits[:10] = np.round(logits[:10]) + 0.0  # ties, and no -0
    values, tokens = (np.asarray(x) for x in jax.jit(truncate, static_argnums=(1,))(logits, top_k, top_p))
    for row, found, ids in zip(logits, values, tokens):
        stay = kept(row, top_k, 2.0 if top_p is None else top_p)
        np.testing.assert_array_equal(ids[np.isfinite(found)], stay)
        np.testing.assert_array_equal(found[: len(stay)], row[stay])


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.5, 5, 0.8), (1.0, 0, 0.6)])
def test_samples_follow_the_distribution(temperature, top_k, top_p):
    """4000 first tokens of one prompt: no frequency further than five standard errors from its probability."""
    many, params = 4000, random_params("grouped")
    settings = {"steps": 1, "key": jax.random.key(5), "temperature": temperature, "top_k": top_k, "top_p": top_p}
    found = generate(MODELS["grouped"], params, np.repeat(prompt()[:1], many, axis=0), **settings)
    logits = np.asarray(uncached("grouped")(params, prompt()), np.float64)[0, -1] / temperature
    stay = kept(logits, top_k, 2.0 if top_p == 1 else top_p)
    expected = np.zeros(V)
    expected[stay] = np.exp(logits[stay] - logits.max())
    expected /= expected.sum()
    frequency = np.bincount(np.asarray(found.tokens)[:, 0], minlength=V) / many
    assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / many)).all()
    assert len(stay) > 1


def test_samples_follow_the_key_and_the_id_and_not_the_place():
    model, params = MODELS["grouped"], random_params("grouped")
    sample = lambda key, inputs, **more: np.asarray(
        generate(model, params, inputs, steps=STEPS, key=jax.random.key(key), temperature=1.0, **more).tokens
    )
    same = np.repeat(prompt()[:1], B, axis=0)
    here = sample(0, same)
    np.testing.assert_array_equal(here, sample(0, same, ids=np.arange(B)))
    np.testing.assert_array_equal(here[[2, 0, 3, 1]], sample(0, same, ids=np.array([2, 0, 3, 1])))
    assert len(np.unique(here, axis=0)) == B  # rows are not alike, and neither are steps
    assert not (here[:, 0] == here[:, 1]).all()
    assert not (here == sample(1, same)).all()


def test_generation_inside_jit_with_traced_arguments():
    model, params = MODELS["grouped"], random_params("grouped")
    inside = jax.jit(lambda p, x, n, key: generate(model, p, x, steps=STEPS, key=key, temperature=1.0, prompt_lengths=n))
    found = inside(params, prompt(), LENGTHS, jax.random.key(0))
    settings = {"steps": STEPS, "key": jax.random.key(0), "temperature": 1.0, "prompt_lengths": LENGTHS}
    np.testing.assert_array_equal(found.tokens, generate(model, params, prompt(), **settings).tokens)


def test_a_row_ends_with_its_stop_and_holds_only_stops_behind_it():
    params, model = random_params("grouped"), MODELS["grouped"]
    settings = {"steps": STEPS, "key": jax.random.key(3), "temperature": 1.5}
    free = np.asarray(generate(model, params, prompt(), **settings).tokens)
    stop = int(free[0, 2])
    found = generate(model, params, prompt(), stop=stop, **settings)
    for row, tokens, length in zip(free, np.asarray(found.tokens), found.lengths):
        hits = np.flatnonzero(row == stop)
        expected = hits[0] + 1 if len(hits) else STEPS
        assert length == expected
        np.testing.assert_array_equal(tokens[:expected], row[:expected])
        assert (tokens[expected:] == stop).all()
    assert np.asarray(found.lengths).min() < STEPS


def rollout_batch():
    inputs = np.random.default_rng(6).integers(0, V, (8, LENGTH)).astype(np.int32)
    lengths = np.array([3, 1, 2, 3, 3, 1, 3, 2], np.int32)
    weights = np.ones((8, LENGTH), np.float32)
    weights[6] = 0
    return {
        "inputs": inputs,
        "targets": inputs,
        "weights": weights,
        "prompt_lengths": lengths,
        "id": np.arange(8, dtype=np.int32),
    }


def test_a_rollout_trains_on_what_was_sampled():
    model, params, batch = MODELS["grouped"], random_params("grouped"), rollout_batch()
    key, lengths = jax.random.key(7), batch["prompt_lengths"]
    found = jax.device_get(jax.jit(lambda p, b: rollout(model, p, b, key, prompt=3, stop=2))(params, batch))
    steps = LENGTH + 1 - 3
    settings = {"steps": steps, "key": key, "temperature": 1.0, "stop": 2}
    sampled = generate(model, params, batch["inputs"][:, :3], prompt_lengths=lengths, ids=batch["id"], **settings)
    np.testing.assert_array_equal(found["targets"][:, :-1], found["inputs"][:, 1:])
    for i, n in enumerate(lengths):
        count = int(sampled.lengths[i])
        np.testing.assert_array_equal(found["inputs"][i, :n], batch["inputs"][i, :n])
        np.testing.assert_array_equal(found["targets"][i, n - 1 : n - 1 + count], sampled.tokens[i, :count])
        expected = np.zeros(LENGTH)
        expected[n - 1 : n - 1 + count] = i != 6
        np.testing.assert_array_equal(found["weights"][i], expected)
    assert (found["inputs"].dtype, found["targets"].dtype, found["weights"].dtype) == (np.int32, np.int32, np.float32)


def test_a_rollout_is_the_same_on_every_device_and_carries_no_gradient():
    """Inside the shard_map of data parallelism, differentiated like a step."""
    model, params, batch, key = MODELS["grouped"], random_params("grouped"), rollout_batch(), jax.random.key(7)

    def loss(p, b):
        fresh = rollout(model, p, b, key, prompt=3)
        return jnp.sum(fresh["weights"] * model.apply(p, {}, fresh)[0].logits.mean(-1)), fresh

    def body(p, b):
        with collectives.over("data"):
            return jax.grad(loss, has_aux=True)(collectives.vary(p), b)

    whole, fresh = jax.jit(jax.grad(loss, has_aux=True))(params, batch)
    mesh = parallel.make_mesh("data=8")
    summed = lambda grads, fresh: (jax.lax.psum(grads, "data"), fresh)
    specs = {"in_specs": (P(), P("data")), "out_specs": (P(), P("data"))}
    mapped = jax.shard_map(lambda p, b: summed(*body(p, b)), mesh=mesh, **specs)
    grads, shards = jax.jit(mapped)(params, parallel.put_batch(batch, mesh))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(shards), jax.device_get(fresh))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), jax.device_get(grads), jax.device_get(whole)
    )
    fixed = jax.jit(jax.grad(lambda p: jnp.sum(fresh["weights"] * model.apply(p, {}, fresh)[0].logits.mean(-1))))(params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), jax.device_get(whole), jax.device_get(fixed)
    )


def refused(name="grouped", **changes):
    settings = {"steps": 2, "prompt": prompt()} | changes
    return generate(MODELS[name], random_params(name), settings.pop("prompt"), **settings)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: refused("learned", steps=STEPS + 1), "a prompt of 5 and 7 steps need 11 positions, but 10 were learned"),
        (lambda: refused(prompt=np.full((2, 3), V)), r"prompt holds 13; expected ints in \[0, 12\]"),
        (lambda: refused(prompt=jnp.full((2, 3), -1)), r"prompt holds -1; expected ints in \[0, 12\]"),
        (lambda: refused(prompt=np.zeros((2, 3))), r"the prompt must be ints \[B, P\].*; got float64 \[2, 3\]"),
        (lambda: refused(prompt=np.zeros(3, int)), r"the prompt must be ints \[B, P\].*; got int64 \[3\]"),
        (lambda: refused(steps=0), "steps is 0; expected 1 or more"),
        (lambda: refused(temperature=-0.1), "temperature is -0.1; expected 0"),
        (lambda: refused(temperature=float("nan")), "temperature is nan; expected 0"),
        (lambda: refused(temperature=1.0), "sampling at temperature 1.0 needs a key"),
        (lambda: refused(top_p=0.0), r"top_p is 0.0; expected a probability in \(0, 1\]"),
        (lambda: refused(top_p=1.1), r"top_p is 1.1; expected a probability in \(0, 1\]"),
        (lambda: refused(top_k=-1), "top_k is -1; expected 0 .* up to the vocabulary of 13"),
        (lambda: refused(top_k=V + 1), "top_k is 14; expected 0 .* up to the vocabulary of 13"),
        (lambda: refused(stop=V), r"stop is 13; expected a token in \[0, 12\]"),
        (lambda: refused(prompt_lengths=np.array([5, 6, 1, 1])), r"prompt_lengths holds 6; expected ints in \[1, 5\]"),
        (lambda: refused(prompt_lengths=np.array([5, 0, 1, 1])), r"prompt_lengths holds 0; expected ints in \[1, 5\]"),
        (lambda: refused(prompt_lengths=np.array([5])), r"prompt_lengths has shape \[1\], expected \[4\]"),
        (lambda: refused(ids=np.arange(3)), r"ids have shape \[3\]; expected one for each of the 4 prompts"),
        (
            lambda: generate(Plain().build((4,), 2), {}, prompt(), steps=1),
            "generate needs a causal language model, as `Decoder` builds; got PlainMLP",
        ),
        (
            lambda: rollout(MODELS["grouped"], {}, {"inputs": prompt(), "segments": prompt()}, jax.random.key(0), prompt=2),
            "a rollout continues one prompt a row; the batch is packed",
        ),
        (
            lambda: rollout(MODELS["grouped"], {}, {"inputs": prompt()}, jax.random.key(0), prompt=6),
            "the prompt is 6 tokens; expected 1 to the 5 of a row",
        ),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words):
        make()
