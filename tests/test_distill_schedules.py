"""Temperatures, shares and weights that follow the step, against NumPy in float64; batches in which nothing counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, softmax

from bmjax import config as configs
from bmjax import data, distill, losses, parallel
from bmjax.distill import Distill
from bmjax.losses import on_features, on_logits, ramp
from bmjax.models import Plain, adapters
from bmjax.train import Problem, init_state, make_step
from bmjax.types import Mean

B, D, C, STEPS = 16, 5, 4, 4
RNG = np.random.default_rng(0)
WEIGHTS = np.where(np.arange(B) < 5, 0.0, RNG.uniform(0.1, 1.0, B)).astype(np.float32)  # whole shards of padding
BATCH = {
    "inputs": RNG.normal(size=(B, D)).astype(np.float32),
    "targets": RNG.integers(0, C, B).astype(np.int32),
    "weights": WEIGHTS,
    "id": np.arange(B, dtype=np.int32),
}
START, TEACHER = RNG.normal(size=(2, D, C)).astype(np.float32)
LINEAR = adapters.plain(lambda key, inputs: {"w": jnp.asarray(START)}, lambda params, inputs: inputs @ params["w"])
FROZEN = {"params": {"w": TEACHER}, "model_state": {}}


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(("begin", "end", "steps"), [(8.0, 1.1, 7), (0.1, 0.7, 100), (3.0, 3.0, 2), (5.0, 2.0, 1)])
def test_a_ramp_is_the_closed_form_and_lands_exactly(kind, begin, end, steps):
    schedule = ramp(begin, end, steps, kind)
    at = np.arange(steps) / max(steps - 1, 1)
    share = at if kind == "linear" else (1 - np.cos(np.pi * at)) / 2
    found = [float(schedule(jnp.int32(step))) for step in range(steps)]
    want = begin + (end - begin) * share if steps > 1 else [end]
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert found[-1] == np.float32(end) == float(schedule(steps + 5))
    assert found[0] == np.float32(begin if steps > 1 else end)


def kd_of(w, temperature):
    """(value, gradient) of T^2 KL against the teacher, a mean by the weights; float64."""
    x, a = BATCH["inputs"].astype(np.float64), WEIGHTS.astype(np.float64) / WEIGHTS.sum(dtype=np.float64)
    s, t = x @ w / temperature, x @ TEACHER.astype(np.float64) / temperature
    p, q = softmax(t, -1), softmax(s, -1)
    value = (p * (log_softmax(t, -1) - log_softmax(s, -1))).sum(-1)
    return temperature**2 * (a @ value), temperature * x.T @ (a[:, None] * (q - p))


def ce_of(w):
    x, a = BATCH["inputs"].astype(np.float64), WEIGHTS.astype(np.float64) / WEIGHTS.sum(dtype=np.float64)
    onehot = np.eye(C)[BATCH["targets"]]
    return -(a @ (onehot * log_softmax(x @ w, -1)).sum(-1)), x.T @ (a[:, None] * (softmax(x @ w, -1) - onehot))


def by_hand(temperature, share, rate=0.5):
    """(rows of metrics, last weights) of SGD with schedules (step -> number), in float64."""
    w, rows = START.astype(np.float64), []
    for step in range(STEPS):
        (kd, kd_slope), (ce, ce_slope) = kd_of(w, temperature(step)), ce_of(w)
        a = share(step)
        rows.append({"ce": ce, "kd": kd, "loss": (1 - a) * ce + a * kd, "kd/temperature": temperature(step), "kd/weight": a})
        w = w - rate * ((1 - a) * ce_slope + a * kd_slope)
    return rows, w


def trained(terms, spec, accumulate=1, model=LINEAR, frozen=FROZEN, batch=BATCH, steps=STEPS, teacher=LINEAR, rate=0.5):
    mesh = parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None)
    problem = Problem(model, terms, optax.sgd(rate), teacher, loss_tx=optax.sgd(rate), accumulate=accumulate)
    problem.check_schedules(steps)
    state = init_state(problem, mesh, ((".*", ()),), jax.random.key(0), batch, frozen=frozen)
    step, rows = make_step(problem, mesh, state), []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        rows.append({name: float(value) for name, value in metrics.items()})
    return rows, jax.device_get(state)


SETTINGS = Distill(share=0.9, share_end=0.2, temperature=4.0, temperature_end=1.5, schedule="cosine")


@pytest.mark.parametrize(("spec", "accumulate"), [("data=1", 1), ("data=8", 1), ("data=8", 2)])
def test_the_step_follows_temperature_and_share(spec, accumulate):
    half = lambda step: (1 - np.cos(np.pi * step / (STEPS - 1))) / 2
    want, w = by_hand(lambda step: 4 + (1.5 - 4) * half(step), lambda step: 0.9 + (0.2 - 0.9) * half(step))
    rows, state = trained(SETTINGS.terms(losses.cross_entropy_term(), STEPS), spec, accumulate)
    for row, expected in zip(rows, want):
        assert set(row) == {*expected, "ce/weight"}
        assert row["ce/weight"] == pytest.approx(1 - expected["kd/weight"], rel=1e-5)
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=2e-4), name
    assert rows[-1]["kd/temperature"] == 1.5
    assert rows[-1]["kd/weight"] == np.float32(0.2)
    np.testing.assert_allclose(state.params["model"]["w"], w, rtol=1e-4, atol=1e-5)


def test_terms_of_different_counts_follow_their_weights_too():
    """A term that counts pairs; the gradient divides each by its own count."""

    def half(student, teacher, batch):
        return Mean.of(jnp.square(student.logits[: B // 2]).sum(-1), batch["weights"][: B // 2])

    schedule = optax.linear_schedule(1.0, 0.0, 2)
    rows, state = trained({"ce": (0.5, losses.cross_entropy_term()), "half": (schedule, half)}, "data=1", steps=2)
    w = START.astype(np.float64)
    x, a = BATCH["inputs"][: B // 2].astype(np.float64), WEIGHTS[: B // 2].astype(np.float64)
    for row, weight in zip(rows, (1.0, 0.5)):
        ce, slope = ce_of(w)
        value = (a @ ((x @ w) ** 2).sum(-1)) / a.sum()
        assert row["loss"] == pytest.approx(0.5 * ce + weight * value, rel=1e-4)
        w = w - 0.5 * (0.5 * slope + weight * 2 * x.T @ (a[:, None] * (x @ w)) / a.sum())
    np.testing.assert_allclose(state.params["model"]["w"], w, rtol=1e-4, atol=1e-5)


def test_a_weight_inside_a_term_and_one_outside_are_both_logged():
    term = on_logits(distill.kd, optax.linear_schedule(2.0, 0.0, 4), temperature=2.0)
    rows, _ = trained({"kd": (optax.linear_schedule(0.0, 1.0, 4), term)}, "data=1", steps=2)
    plain = kd_of(START.astype(np.float64), 2.0)[0]
    assert [rows[0]["kd/weight"], rows[0]["kd/inner_weight"]] == [0.0, 2.0]
    assert rows[0]["kd"] == pytest.approx(2 * plain, rel=1e-5)
    assert [row["loss"] for row in rows] == pytest.approx([0.0, 0.25 * 1.5 * plain], rel=1e-5)


@pytest.mark.parametrize("fn", [distill.jsd, distill.skew_kl, distill.skew_reverse_kl])
def test_a_mixture_that_is_traced_is_the_one_that_is_not(fn):
    name = "beta" if fn is distill.jsd else "alpha"
    s, t = RNG.normal(size=(2, 6, C)).astype(np.float32)
    traced = jax.jit(lambda share: fn(s, t, **{name: share}))
    for share in (0.0, 0.3, 0.9):
        np.testing.assert_allclose(traced(share), fn(s, t, **{name: share}), rtol=2e-3, atol=1e-6)
    if fn is distill.jsd:
        np.testing.assert_allclose(traced(1.0), fn(s, t, beta=1.0), rtol=2e-3)


def test_an_argument_of_a_feature_loss_follows_the_step():
    def scaled(s, t, factor: float = 1.0):
        return factor * jnp.mean(jnp.square(s - t))

    model = Plain(hidden=(C,)).build((D,), C)
    params, _ = model.init(jax.random.key(1), BATCH)
    term = on_features(scaled, {"hidden_0": "hidden_0"}, factor=lambda step: 1.0 + step)
    frozen = {"params": params, "model_state": {}}
    rows, _ = trained({"f": (1.0, term)}, "data=1", model=model, teacher=model, frozen=frozen, steps=2, rate=0.0)
    assert [row["f/factor"] for row in rows] == [1.0, 2.0]
    assert rows[1]["f"] == pytest.approx(2 * rows[0]["f"], rel=1e-5)


def if_in_python(step):
    return 2.0 if step < 3 else 1.0


def needs_a_number(s, t, order: float = 1.0):
    return jnp.sum(s * t, -1) if order > 1 else jnp.sum(s, -1)


def check_last(schedule, **kw):
    term = on_logits(distill.kd, **kw)
    Problem(LINEAR, {"kd": (schedule, term)}, optax.sgd(0.1), LINEAR).check_schedules(10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: on_logits(distill.kd, temperature=optax.linear_schedule(0.0, 1.0, 9)),
            "temperature is 0.0 at step 0",
        ),
        (lambda: check_last(1.0, temperature=optax.linear_schedule(4.0, -1.0, 9)), "temperature .* 'kd' is -1.0 at step 9"),
        (lambda: check_last(optax.linear_schedule(1.0, np.inf, 9)), "weight of the loss term 'kd' is (inf|nan) at step 0"),
        (lambda: check_last(lambda step: 1 / (9 - step)), "weight of the loss term 'kd' is inf at step 9"),
        (lambda: on_logits(distill.kd, temperature=if_in_python), "cannot be traced"),
        (lambda: on_logits(distill.kd, temperature=lambda step: jnp.ones(3)), r"gives \[3\]; expected one number"),
        (lambda: trained({"n": (1.0, on_logits(needs_a_number, order=ramp(1, 2, 3)))}, "data=1"), "must know order before it is"),
        (lambda: Distill(share_end=0.1).terms(losses.cross_entropy_term()), "give terms"),
        (lambda: configs.validate(Distill(temperature_end=0.0)), "temperature_end"),
        (lambda: configs.validate(Distill(share_end=1.5)), "share_end"),
        (lambda: configs.validate(Distill(schedule="step")), "schedule"),
        (lambda: ramp(1.0, 2.0, 3, "step"), "expected one of linear, cosine"),
        (lambda: ramp(1.0, 2.0, 0), "1 step or more"),
    ],
)
def test_bad_schedules_are_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_objective_keeps_what_has_weight_at_either_end():
    task = losses.cross_entropy_term()
    assert set(Distill(share=0.0, share_end=0.5).terms(task, 3)) == {"ce", "kd"}
    assert set(Distill(share=1.0, share_end=0.5).terms(task, 3)) == {"ce", "kd"}
    assert set(Distill(hint_weight=0.0, hint_weight_end=1.0).terms(task, 3)) == {"ce", "kd", "hint"}
    weights = {name: weight for name, (weight, _) in Distill(share=0.25).terms(task, 3).items()}
    assert weights == {"ce": 0.75, "kd": 0.25}  # numbers stay numbers


TERMS = {
    "ce": losses.cross_entropy_term(),
    "kd": on_logits(distill.kd, temperature=2.0),
    "dist": on_logits(distill.dist),
    "hint": on_features(distill.hint, {"hidden_0": "hidden_0"}, project="linear"),
    "rkd": on_features(distill.rkd, {"hidden_0": "hidden_0"}),
    "similarity": on_features(distill.similarity, {"hidden_0": "hidden_0"}),
    "pkt": on_features(distill.pkt, {"hidden_0": "hidden_0"}),
}


@pytest.mark.parametrize("spec", ["data=1", "data=8"])
def test_a_batch_in_which_nothing_counts_has_the_loss_zero_and_changes_nothing(spec):
    model = Plain(hidden=(6,)).build((D,), C)
    params, _ = model.init(jax.random.key(1), BATCH)
    frozen = {"params": params, "model_state": {}}
    batch = {**BATCH, "weights": np.zeros(B, np.float32)}
    terms = {name: (1.0, term) for name, term in TERMS.items() if spec == "data=8" or name in ("ce", "kd", "hint")}
    mesh = parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None)
    problem = Problem(model, terms, optax.sgd(0.5), model, loss_tx=optax.sgd(0.5))
    state = init_state(problem, mesh, model.rules, jax.random.key(0), batch, frozen=frozen)
    before = jax.device_get(state.params)
    state, metrics = make_step(problem, mesh, state)(state, frozen, batch)
    assert {name: float(value) for name, value in metrics.items()} == dict.fromkeys(["loss", *terms], 0.0)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))


def split(weights):
    return data.Split(BATCH["inputs"], BATCH["targets"], BATCH["id"], {"weights": np.asarray(weights, np.float32)})


def test_data_in_which_nothing_counts_are_refused():
    with pytest.raises(ValueError, match="the weights of all 16 examples are 0, so there is nothing to train on"):
        data.train_batches(split(np.zeros(B)), 4, 0)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        data.eval_batches(split(np.zeros(B)), 4)
    assert len(data.eval_batches(split(np.eye(B)[3]), 4)) == 4


def test_a_batch_in_which_nothing_counts_is_refused_as_the_first_and_named_later(caplog):
    batches = data.train_batches(split(np.ones(B)), 4, 0)
    first, third = batches[0]["id"], batches[2]["id"]
    weights = np.ones(B)
    weights[first] = 0
    with pytest.raises(ValueError, match="the batch of step 0 has no item of a weight above 0"):
        data.train_batches(split(weights), 4, 0)[0]
    weights = np.ones(B)
    weights[third] = 0
    later = data.train_batches(split(weights), 4, 0)
    assert later[0]["weights"].all()
    with caplog.at_level("WARNING", logger="absl"):
        assert not later[2]["weights"].any()
    assert "the batch of step 2 has no item" in caplog.text


def test_settings_stay_plain_for_the_record():
    record = configs.to_dict(SETTINGS)
    assert record["temperature_end"] == 1.5
    assert configs.from_dict(record, {"Distill": Distill}) == dataclasses.replace(SETTINGS)
