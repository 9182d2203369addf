"""On-policy distillation: what the student is trained on is what it generates, on any mesh, and only that counts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bmjax import config, distill, losses, parallel
from bmjax.models import Decoder, Transformer, generate
from bmjax.train import Problem, abstract_state, init_state, make_step
from bmjax.train.objective import _ROLLOUT
from bmjax.types import Mean, Term

B, T, V, PROMPT, STOP = 16, 7, 11, 3, 2
SIZES = {"heads": 2, "neurons": 8}
STUDENT = Decoder(layers=1, width=8, **SIZES).build((T,), V)
TEACHER = Decoder(layers=2, width=12, **SIZES).build((T,), V)


def make_batch():
    rng = np.random.default_rng(0)
    row = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    weights = np.where(np.arange(B)[:, None] < 5, 0.0, rng.integers(0, 2, (B, T))).astype(np.float32)  # whole shards of padding
    weights[5:, 0] = 1
    ids = rng.permutation(100)[:B].astype(np.int32)
    return {"inputs": row[:, :-1], "targets": row[:, 1:], "weights": weights, "id": ids}


def scaled(model, seed):
    """Parameters large enough that tokens differ in likelihood."""
    return jax.tree.map(lambda x: np.asarray(3 * x), jax.jit(model.init)(jax.random.key(seed), make_batch())[0])


@functools.cache
def frozen():
    return {"params": scaled(TEACHER, 1), "model_state": {}}


def spy():
    """A term of value 0 that keeps the batch it saw."""
    names = ("inputs", "targets", "weights")

    def init(key, student, teacher):
        return {}, {name: jnp.zeros((B, T), jnp.float32 if name == "weights" else jnp.int32) for name in names}

    def apply(ctx, student, teacher, batch):
        weights = jnp.broadcast_to(batch["weights"].reshape(len(batch["weights"]), -1), (len(batch["weights"]), T))
        seen = ctx.all_gather({name: batch[name] for name in names} | {"weights": weights})
        return Mean(jnp.float32(0) * jnp.sum(weights), jnp.sum(weights)), seen

    return Term(init, apply)


def problem(rollout, **changes):
    terms = {"jsd": (1.0, losses.on_logits(distill.jsd, beta=0.5)), "spy": (0.0, spy())}
    return Problem(STUDENT, **{"terms": terms, "tx": optax.sgd(0.1), "teacher": TEACHER, "rollout": rollout} | changes)


def train(problem, spec="data=1", steps=2, batch=None):
    """(states after each step, the first of all before it; metrics of each)."""
    mesh = parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None)
    batch, start = batch or make_batch(), scaled(STUDENT, 2)
    state = init_state(problem, mesh, STUDENT.rules, jax.random.key(0), batch, params=start, frozen=frozen())
    step, states, history = make_step(problem, mesh, state), [jax.device_get(state)], []
    for _ in range(steps):
        state, metrics = step(state, frozen(), batch)
        history.append(jax.device_get(metrics))
        states.append(jax.device_get(state))
    return states, history


def close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **({"rtol": 1e-4, "atol": 1e-6} | tolerance)), one, other)


def by_hand(state, batch, temperature, fraction=1.0):
    """What the step is trained on: by `generate`, row by row of T + 1 tokens."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step), _ROLLOUT)
    sample_key, coin_key = jax.random.split(key)
    settings = {"steps": T + 1 - PROMPT, "key": sample_key, "temperature": temperature, "stop": STOP, "ids": batch["id"]}
    found = generate(STUDENT, state.params["model"], batch["inputs"][:, :PROMPT], **settings)
    coins = [float(jax.random.uniform(jax.random.fold_in(coin_key, i))) for i in batch["id"]]
    want = {name: batch[name].copy() for name in ("inputs", "targets", "weights")}
    for i, coin in enumerate(coins):
        if coin < fraction:
            row = np.concatenate([batch["inputs"][i, :PROMPT], found.tokens[i]])
            want["inputs"][i], want["targets"][i] = row[:-1], row[1:]
            counted = (np.arange(T) >= PROMPT - 1) & (np.arange(T) < PROMPT - 1 + found.lengths[i])
            want["weights"][i] = counted * (batch["weights"][i] > 0).any()
    return want, np.array(coins) < fraction


@functools.cache
def run(spec, temperature, fraction):
    return train(problem(distill.on_policy(PROMPT, fraction, temperature=temperature, stop=STOP)), spec)


@pytest.mark.parametrize(("temperature", "fraction"), [pytest.param(0.0, 1.0, marks=pytest.mark.slow), (1.0, 0.5)])
def test_the_student_is_trained_on_what_it_generates(temperature, fraction):
    states, _ = run("data=1", temperature, fraction)
    ends = []
    for before, after in itertools.pairwise(states):
        want, sampled = by_hand(before, make_batch(), temperature, fraction)
        for name, value in want.items():
            np.testing.assert_array_equal(after.extra["spy"][name], value)
        ends.extend(want["weights"][sampled].sum(1))
        assert sampled.all() if fraction == 1 else 0 < sampled.sum() < B
    assert temperature == 0 or len(np.unique(ends)) > 2  # nothing counts, all, and what stops early
    assert not np.array_equal(states[1].extra["spy"]["targets"], states[2].extra["spy"]["targets"])


@pytest.mark.parametrize(
    ("spec", "temperature", "fraction"),
    [
        pytest.param("data=8", 0.0, 1.0, marks=pytest.mark.slow),
        ("data=8", 1.0, 0.5),
        ("data=2,fsdp=2,tensor=2", 1.0, 0.5),
        pytest.param("data=2,fsdp=2,tensor=2", 0.0, 1.0, marks=pytest.mark.slow),
    ],
)
def test_every_mesh_samples_the_same_tokens(spec, temperature, fraction):
    (one, here), (eight, there) = run("data=1", temperature, fraction), run(spec, temperature, fraction)
    for before, after, atol in zip(one[1:], eight[1:], (1e-6, 2e-4)):  # small embeddings blow the first step's rounding up
        jax.tree.map(np.testing.assert_array_equal, before.extra["spy"], after.extra["spy"])
        close(after.params, before.params, atol=atol)
    close(here, there, rtol=1e-4)


def test_no_gradient_flows_through_sampling():
    """One step is the plain step on what was sampled."""
    states, history = run("data=1", 1.0, 0.5)
    want, _ = by_hand(states[0], make_batch(), 1.0, 0.5)
    plain, metrics = train(problem(None), steps=1, batch={**make_batch(), **want})
    close(plain[1].params, states[1].params, rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["jsd"], history[0]["jsd"], rtol=1e-5)


@pytest.mark.slow
def test_microbatches_change_nothing():
    jsd_alone = {"jsd": (1.0, losses.on_logits(distill.jsd, beta=0.5))}
    half, _ = train(problem(distill.on_policy(PROMPT, 0.5, stop=STOP), terms=jsd_alone, accumulate=2), steps=1)
    close(half[1].params, run("data=1", 1.0, 0.5)[0][1].params, rtol=1e-5)


def test_a_fraction_of_nothing_is_the_plain_step():
    plain, _ = train(problem(None))
    found, _ = train(problem(distill.on_policy(PROMPT, 0.0)))
    jax.tree.map(np.testing.assert_array_equal, found[-1], plain[-1])


def test_a_schedule_follows_the_step_and_labels_are_for_the_datas_rows():
    jump = lambda step: jnp.where(step < 1, 0.0, 1.0)
    terms = {
        "jsd": (1.0, losses.on_logits(distill.jsd, beta=0.5)),
        "ce": (0.5, distill.off_policy(losses.cross_entropy_term())),
        "spy": (0.0, spy()),
    }
    states, history = train(problem(distill.on_policy(PROMPT, jump), terms=terms))
    np.testing.assert_array_equal(states[1].extra["spy"]["targets"], make_batch()["targets"])
    assert not np.array_equal(states[2].extra["spy"]["targets"], make_batch()["targets"])
    logits = STUDENT.apply(states[0].params["model"], {}, make_batch())[0].logits
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    nll = -np.take_along_axis(log_p, make_batch()["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(history[0]["ce"], np.average(nll, weights=make_batch()["weights"]), rtol=1e-5)
    assert history[1]["ce"] == 0  # every row is the student's own


def test_the_students_samples_come_nearer_to_the_teachers_likings():
    adam = problem(distill.on_policy(PROMPT, 0.5, stop=STOP), tx=optax.adam(0.01))
    _, history = train(adam, steps=60)
    jsd = [metrics["jsd"] for metrics in history]
    assert np.mean(jsd[-10:]) < 0.6 * jsd[0]


def test_the_config_makes_it():
    assert distill.Rollouts().build(10) is None
    made = distill.Rollouts(fraction=0.0, fraction_end=1.0, prompt=PROMPT, temperature=0.0, stop=STOP).build(2)
    key, batch, params = jax.random.key(3), make_batch(), scaled(STUDENT, 2)
    none, whole = (made(STUDENT, params, batch, key, jnp.int32(step)) for step in (0, 1))
    want = distill.on_policy(PROMPT, 1.0, temperature=0.0, stop=STOP)(STUDENT, params, batch, key, jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, whole, want)
    np.testing.assert_array_equal(none["targets"], batch["targets"])
    assert not none["sampled"].any() and whole["sampled"].all()


def abstract():
    mesh = parallel.make_mesh("data=2,fsdp=4")
    return abstract_state(problem(None), mesh, STUDENT.rules, jax.random.key(0), make_batch(), frozen=frozen())


def sampled(batch=None, model=STUDENT, **changes):
    rollout = distill.on_policy(**{"prompt": PROMPT} | changes)
    return rollout(model, {}, make_batch() if batch is None else batch, jax.random.key(0), jnp.int32(0))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: distill.on_policy(3, 1.5), r"the rollout's fraction is 1.5; expected a number in \[0, 1\]"),
        (lambda: distill.on_policy(3, lambda step: -1.0), r"the rollout's fraction is -1; expected"),
        (lambda: distill.on_policy(3, np.nan), "the rollout's fraction is nan"),
        (lambda: sampled({"inputs": make_batch()["inputs"]}), r"a rollout needs batch\['id'\]"),
        (lambda: sampled({**make_batch(), "segments": make_batch()["inputs"]}), "the batch is packed"),
        (lambda: sampled(prompt=T + 1), "the prompt is 8 tokens; expected 1 to the 7 of a row"),
        (
            lambda: sampled({**make_batch(), "targets": np.zeros(B, np.int32)}),
            r"a rollout continues tokens \[B, T\]; the inputs are",
        ),
        (lambda: sampled(model=Transformer().build((4, 4, 1), 2)), "generate needs a causal language model"),
        (lambda: sampled(stop=V), "stop is 11"),
        (
            lambda: make_step(problem(distill.on_policy(PROMPT)), parallel.make_mesh("data=2,fsdp=4"), abstract(), "hybrid"),
            "the executor hybrid cannot run a problem's rollout; take partitioned",
        ),
        (lambda: config.validate(distill.Rollouts(fraction=2.0)), "fraction"),
        (lambda: config.validate(distill.Rollouts(top_p=0.0)), "top_p"),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)
