"""Contrastive distillation against NumPy in float64, and its memory bank on one and on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from vit_pair import STUDENT, TEACHER, B, frozen, make_batch

from bmjax import distill, losses, parallel
from bmjax.distill import contrast
from bmjax.train import Problem, init_state, make_step
from bmjax.train.checkpoint import Checkpoints
from bmjax.types import Context, Outputs

EXAMPLES, NEGATIVES, WIDTH = 20, 12, 6
RNG = np.random.default_rng(0)
S, T = (RNG.normal(size=(5, 4)).astype(np.float32) for _ in range(2))
WEIGHTS = np.array([1.0, 0.5, 0.0, 2.0, 1.0], np.float32)


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def critic(a, b, negatives, examples, temperature):
    """h of Tian et al. 2020: how sure it is that a and b are of one example."""
    return 1 / (1 + negatives / examples * np.exp(-a @ b / temperature))


def in_batch(s, t, weights, temperature=0.07, examples=None):
    s, t, kept = unit(s), unit(t), [i for i, w in enumerate(weights) if w > 0]
    n, m = len(kept) - 1, examples or len(kept)
    values = []
    for i in kept:
        value = -2 * np.log(critic(s[i], t[i], n, m, temperature))
        for j in kept:
            if j != i:
                value -= np.log(1 - critic(s[i], t[j], n, m, temperature)) + np.log(1 - critic(s[j], t[i], n, m, temperature))
        values.append(value)
    return np.average(values, weights=[weights[i] for i in kept])


@pytest.mark.parametrize(("temperature", "examples"), [(0.07, None), (0.5, 50_000)])
def test_in_a_batch_it_is_the_papers(temperature, examples):
    for weights in (np.ones(5, np.float32), WEIGHTS):
        found = distill.crd(S, T, weights, temperature=temperature, examples=examples)
        assert (found.shape, found.dtype) == ((), jnp.float32)
        np.testing.assert_allclose(found, in_batch(S, T, weights, temperature, examples), rtol=1e-5)
    np.testing.assert_array_equal(distill.crd(S, T), distill.crd(S, T, np.ones(5, np.float32)))


def test_embeddings_map_each_network_and_positions_are_averaged():
    s, t = RNG.normal(size=(5, 2, 2, 4)).astype(np.float32), RNG.normal(size=(5, 3, 7)).astype(np.float32)
    maps = distill.crd_embedding(3)(jax.random.key(0), s, t)
    maps["teacher"]["bias"] = jnp.array([0.3, -0.2, 0.1])
    a = s.mean((1, 2)) @ np.asarray(maps["student"]["kernel"])
    b = t.mean(1) @ np.asarray(maps["teacher"]["kernel"]) + np.asarray(maps["teacher"]["bias"])
    np.testing.assert_allclose(distill.crd(s, t, WEIGHTS, maps), in_batch(a, b, WEIGHTS), rtol=1e-5)


def test_it_stays_finite_and_falls_as_pairs_find_each_other():
    for a, b in ((S, 1e4 * S), (S, -S), (np.zeros_like(S), T)):
        value, slope = jax.value_and_grad(distill.crd)(jnp.asarray(a), jnp.asarray(b))
        assert np.isfinite(value) and np.isfinite(slope).all()
    assert distill.crd(T, T, temperature=0.5) < distill.crd(S, T, temperature=0.5)
    np.testing.assert_allclose(distill.crd(S[:1], T[:1]), 0, atol=1e-6)  # nobody to be told from


def context(params, state, key):
    same = lambda tree: tree
    return Context(params, state, jnp.int32(0), key, same, same)


SPARSE = RNG.permutation(100)[:EXAMPLES]  # of a split, whose ids are rows of the whole data set


@pytest.mark.parametrize("examples", [EXAMPLES, SPARSE])
def test_the_bank_gives_the_negatives_and_remembers_the_batch(examples):
    term = distill.crd_term("s", "t", examples=examples, negatives=NEGATIVES, width=3, temperature=0.2, momentum=0.4, weight=2.0)
    places = np.array([3, 7, 7, 11, 19])
    ids = places if examples is EXAMPLES else np.sort(SPARSE)[places]
    batch = {"id": jnp.asarray(ids, jnp.int32), "weights": jnp.asarray(WEIGHTS)}
    outputs = [Outputs(jnp.zeros((5, 2)), {name: jnp.asarray(x)}) for name, x in (("s", S), ("t", T))]
    params, bank = term.init(jax.random.key(1), *outputs)
    for rows in bank.values():
        assert rows.shape == (EXAMPLES, 3)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    mean, new = term.apply(context(params, bank, jax.random.key(2)), *outputs, batch)
    s, t = (unit(x @ np.asarray(params[name]["kernel"])) for name, x in (("student", S), ("teacher", T)))
    drawn = np.asarray(jax.random.randint(jax.random.key(2), (NEGATIVES,), 0, EXAMPLES))
    old = {name: np.asarray(rows, np.float64) for name, rows in bank.items()}
    values = []
    for i, own in enumerate(places):
        others = [j for j in drawn if j != own]
        h = functools.partial(critic, negatives=len(others), examples=EXAMPLES, temperature=0.2)
        value = -2 * np.log(h(s[i], t[i]))
        value -= sum(np.log(1 - h(s[i], old["teacher"][j])) + np.log(1 - h(old["student"][j], t[i])) for j in others)
        values.append(value)
    np.testing.assert_allclose(mean.value(), 2 * np.average(values, weights=WEIGHTS), rtol=1e-5)
    np.testing.assert_allclose(mean.count, WEIGHTS.sum(), rtol=1e-6)
    # Row 7 is there twice, and its second place has weight 0.
    for name, x in (("student", s), ("teacher", t)):
        want = old[name].copy()
        for place, row in ((0, 3), (1, 7), (3, 11), (4, 19)):
            want[row] = unit(0.4 * old[name][row] + 0.6 * x[place])
        np.testing.assert_allclose(new[name], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("examples", "unknown"), [(EXAMPLES, EXAMPLES), (EXAMPLES, -1), (np.array([2, 5, 9]), 6)])
def test_an_example_that_is_not_in_the_bank_has_no_loss_unless_it_is_padding(examples, unknown):
    term = distill.crd_term("s", "t", examples=examples, negatives=NEGATIVES, width=3)
    outputs = [Outputs(jnp.zeros((2, 2)), {name: jnp.asarray(x[:2])}) for name, x in (("s", S), ("t", T))]
    params, bank = term.init(jax.random.key(1), *outputs)
    for padding in (False, True):
        batch = {"id": jnp.array([2, unknown]), "weights": jnp.array([1.0, 1.0 - padding])}
        mean, new = term.apply(context(params, bank, jax.random.key(2)), *outputs, batch)
        assert np.isfinite(mean.value()) == padding
        for name, rows in new.items():
            assert (np.asarray(rows != bank[name]).any(axis=1).sum()) == 1


def test_a_schedule_is_its_weight():
    student, teacher = Outputs(None, {"final": jnp.asarray(S)}), Outputs(None, {"final": jnp.asarray(T)})
    batch = {"id": jnp.arange(len(S)), "weights": jnp.asarray(WEIGHTS)}

    def value(weight, step):
        term = distill.crd_term(examples=EXAMPLES, negatives=NEGATIVES, width=WIDTH, weight=weight)
        params, bank = term.init(jax.random.key(0), student, teacher)
        same = lambda tree: tree
        ctx = Context(params, bank, jnp.int32(step), jax.random.key(1), same, same)
        return term.apply(ctx, student, teacher, batch)[0].value(), set(term.schedules)

    (followed, names), (fixed, none) = value(optax.linear_schedule(0.0, 1.0, 10), 3), value(1.0, 3)
    np.testing.assert_allclose(followed, 0.3 * fixed, rtol=1e-5)
    assert fixed > 0 and (names, none) == ({"weight"}, set())


def test_of_an_example_that_is_there_twice_the_last_is_remembered():
    rows, there = jnp.array([4, 4, 1, 4]), jnp.array([True, True, True, False])
    bank = contrast._remember(jnp.zeros((5, 4)), jnp.asarray(S[:4]), rows, there, 0.0)
    np.testing.assert_allclose(bank, np.stack([np.zeros(4), unit(S[2]), *np.zeros((2, 4)), unit(S[1])]), atol=1e-6)


def test_positions_without_weight_are_not_in_the_mean():
    x, weights = RNG.normal(size=(2, 3, 4)).astype(np.float32), np.array([[1, 0, 1], [2, 1, 0]], np.float32)
    want = np.stack([x[0, [0, 2]].mean(0), (2 * x[1, 0] + x[1, 1]) / 3])
    x[0, 1] = np.nan
    np.testing.assert_allclose(contrast._over_positions(jnp.asarray(x), jnp.asarray(weights)), want, rtol=1e-5)


TERMS = {
    "ce": (0.5, losses.cross_entropy_term()),
    "crd": (0.8, distill.crd_term(examples=EXAMPLES, negatives=NEGATIVES, width=WIDTH)),
    "in batch": (
        0.2,
        losses.on_features(
            distill.crd, {"layers/1": "layers/2"}, trained={"embedding": distill.crd_embedding(WIDTH)}, temperature=0.2
        ),
    ),
}
PROBLEM = Problem(STUDENT, TERMS, optax.sgd(0.05), teacher=TEACHER, loss_tx=optax.sgd(0.05))


def batches():
    """Of one epoch and the next: ids that come again, and other padding in each."""
    for i in range(4):
        batch = make_batch()
        weights = np.where(np.arange(B) % 8 < 2 + i, 0.0, 1.0).astype(np.float32)
        ids = np.random.default_rng(i).permutation(EXAMPLES)[:B].astype(np.int32)
        yield {**batch, "inputs": batch["inputs"] + np.float32(0.1 * i), "weights": weights, "id": ids}


@functools.cache
def started(spec):
    mesh = parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None)
    state = init_state(PROBLEM, mesh, STUDENT.rules, jax.random.key(0), make_batch(), frozen=frozen())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    return jax.device_get(state), abstract, make_step(PROBLEM, mesh, abstract)


def trained(spec, begin=0, end=4, state=None):
    fresh, abstract, step = started(spec)
    state = jax.device_put(fresh if state is None else state, jax.tree.map(lambda x: x.sharding, abstract))
    for batch in list(batches())[begin:end]:
        state, metrics = step(state, frozen(), batch)
        metrics = jax.device_get(metrics)
    return jax.device_get(state), metrics


@pytest.mark.parametrize("spec", ["data=8", pytest.param("data=2,fsdp=2,tensor=2", marks=pytest.mark.slow)])
def test_the_bank_is_the_same_on_one_device_and_on_eight(spec):
    (one, here), (eight, there) = trained("data=1"), trained(spec)
    for name in here:
        np.testing.assert_allclose(here[name], there[name], rtol=1e-4, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), one, eight)
    fresh = started("data=1")[0]
    seen = {int(i) for batch in batches() for i in batch["id"][batch["weights"] > 0]}
    for name, rows in one.extra["crd"].items():
        moved = np.abs(rows - fresh.extra["crd"][name]).max(axis=1) > 1e-4
        assert set(np.flatnonzero(moved)) == seen
    assert 8 < len(seen) < EXAMPLES
    assert set(one.params["loss"]) == {"crd", "in batch"}


def test_a_run_that_was_cut_goes_on_with_its_bank(tmp_path):
    straight, _ = trained("data=8")
    half, _ = trained("data=8", 0, 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, jax.device_put(half, jax.tree.map(lambda x: x.sharding, started("data=8")[1])))
    with Checkpoints(tmp_path) as checkpoints:
        resumed = checkpoints.restore(started("data=8")[1]).state
    resumed, _ = trained("data=8", 2, 4, resumed)
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)


make = functools.partial(distill.crd_term, examples=EXAMPLES)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: distill.crd(S, T, temperature=0.0), "the distillation temperature is 0.0; expected a number above 0"),
        (lambda: distill.crd(S, T[:1]), "crd: the student has 5 examples and the teacher 1; they must agree"),
        (lambda: distill.crd(S, T[:3]), "crd: the student has 5 examples and the teacher 3; they must agree"),
        (lambda: distill.crd_term(examples=np.array([0, 2**31])), "the ids of the examples are 0 to 2147483648; expected int32"),
        (lambda: distill.crd(S, T[:, :3]), r"crd: the student's embeddings are \[5, 4\] and the teacher's \[5, 3\]; give"),
        (lambda: make(temperature=-1.0), "the distillation temperature is -1.0"),
        (lambda: distill.crd_term(examples=np.ones(3)), "crd: examples is float64; expected the integer ids"),
        (lambda: make(negatives=0), "crd: 0 negatives of 20 examples; expected 1 or more"),
        (lambda: distill.crd_term(examples=1), "crd: 1024 negatives of 1 examples"),
        (lambda: make(momentum=1.0), r"the bank's momentum is 1.0; expected a number in \[0, 1\)"),
        (lambda: make(weight=np.nan), "the weight of crd is nan"),
        (lambda: make(weight=lambda step: jnp.inf), "the weight of crd is inf at step 0"),
        (lambda: make(width=0), "embeddings of width 0"),
        (lambda: make().init(jax.random.key(0), None, None), "the term crd needs a teacher"),
        (lambda: make().apply(None, None, None, {}), r"crd needs batch\['id'\]"),
        (
            lambda: Problem(STUDENT, {"crd": (1.0, make())}, optax.sgd(0.1), teacher=TEACHER, accumulate=2),
            "the loss term 'crd' relates examples: 2 microbatches would change its value",
        ),
    ],
)
def test_bad_input_is_one_clear_line(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        wrong()
    assert "\n" not in str(error.value)
