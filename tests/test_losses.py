import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import log_loss

from bmjax import losses
from bmjax.types import Mean, Outputs, Term

N, C = 12, 5
RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.normal(size=(N, C))).astype(np.float32)
TARGETS = RNG.integers(0, C, N).astype(np.int32)
WEIGHTS = np.where(np.arange(N) % 4 == 0, 0, RNG.uniform(0.1, 2, N)).astype(np.float32)
CLASS_WEIGHTS = (1.0, 0.5, 2.0, 0.0, 3.0)


def log_softmax(logits):
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wide.max(-1, keepdims=True)


def batch(targets=TARGETS, weights=WEIGHTS):
    return {"targets": jnp.asarray(targets), "weights": jnp.asarray(weights)}


def value(term, logits=LOGITS, **kwargs):
    return term(Outputs(jnp.asarray(logits), {}), None, batch(**kwargs))


def test_cross_entropy_is_scikit_learns_log_loss():
    found = losses.cross_entropy(LOGITS, TARGETS)
    assert (found.shape, found.dtype) == ((N,), jnp.float32)
    want = [log_loss([t], np.exp(log_softmax(row))[None], labels=range(C)) for row, t in zip(LOGITS, TARGETS)]
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
def test_the_term_is_the_weighted_log_loss(class_weights):
    mean = value(losses.cross_entropy_term(class_weights=class_weights))
    weights = WEIGHTS.astype(np.float64) * (1 if class_weights is None else np.array(class_weights)[TARGETS])
    want = log_loss(TARGETS, np.exp(log_softmax(LOGITS)), sample_weight=weights, labels=range(C))
    np.testing.assert_allclose(mean.value(), want, rtol=1e-5)
    np.testing.assert_allclose(mean.count, weights.sum(), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_spreads_mass_over_all_classes(smoothing):
    target = (1 - smoothing) * np.eye(C)[TARGETS] + smoothing / C
    want = -(target * log_softmax(LOGITS)).sum(-1)
    np.testing.assert_allclose(losses.cross_entropy(LOGITS, TARGETS, smoothing), want, rtol=1e-5)
    weights = WEIGHTS * np.array(CLASS_WEIGHTS)[TARGETS]
    mean = value(losses.cross_entropy_term(smoothing, CLASS_WEIGHTS))
    np.testing.assert_allclose(mean.value(), np.average(want, weights=weights), rtol=1e-5)


def test_sequences_take_a_weight_for_each_position():
    logits, targets, weights = LOGITS.reshape(3, 4, C), TARGETS.reshape(3, 4), WEIGHTS.reshape(3, 4)
    flat = value(losses.cross_entropy_term(0.1, CLASS_WEIGHTS))
    whole = value(losses.cross_entropy_term(0.1, CLASS_WEIGHTS), logits, targets=targets, weights=weights)
    np.testing.assert_allclose(whole, flat, rtol=1e-6)


def test_large_logits_and_low_precision_stay_finite():
    want = -log_softmax(LOGITS * 1e4)[np.arange(N), TARGETS]
    np.testing.assert_allclose(losses.cross_entropy(LOGITS * 1e4, TARGETS), want, rtol=1e-5)
    low = jnp.asarray(LOGITS, jnp.bfloat16)
    found = losses.cross_entropy(low, TARGETS)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, -log_softmax(np.asarray(low, np.float64))[np.arange(N), TARGETS], rtol=1e-5, atol=1e-6)


def test_the_gradient_is_softmax_minus_target():
    found = jax.grad(lambda x: losses.cross_entropy(x, TARGETS, 0.1).sum())(jnp.asarray(LOGITS))
    want = np.exp(log_softmax(LOGITS)) - (0.9 * np.eye(C)[TARGETS] + 0.1 / C)
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_a_class_that_is_masked_with_minus_infinity_costs_nothing():
    logits = np.where(np.eye(C, dtype=bool)[(TARGETS + 1) % C], -np.inf, LOGITS)
    value, slope = jax.value_and_grad(lambda x: losses.cross_entropy(x, TARGETS).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(value, -log_softmax(logits)[np.arange(N), TARGETS].sum(), rtol=1e-5)
    np.testing.assert_allclose(slope, np.exp(log_softmax(logits)) - np.eye(C)[TARGETS], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: losses.cross_entropy_term(1.0), r"label_smoothing is 1.0; expected a number in \[0, 1\)"),
        (lambda: losses.cross_entropy_term(float("nan")), "label_smoothing is nan"),
        (
            lambda: losses.cross_entropy_term(class_weights=(1, -1)),
            "class_weights holds -1; expected finite numbers of 0 or more",
        ),
        (lambda: losses.cross_entropy_term(class_weights=(1, float("nan"))), "class_weights holds nan"),
        (lambda: losses.cross_entropy_term(class_weights=(1, float("inf"))), "class_weights holds inf"),
        (lambda: losses.cross_entropy_term(class_weights=(0, 0)), "class_weights are all 0"),
        (lambda: losses.cross_entropy_term(class_weights=()), "class_weights are all 0"),
        (lambda: value(losses.cross_entropy_term(class_weights=(1, 1))), "2 class_weights for 5 classes; give one per class"),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_the_config_makes_the_same_term():
    want = value(losses.cross_entropy_term(0.2, CLASS_WEIGHTS))
    np.testing.assert_array_equal(value(losses.Task(0.2, CLASS_WEIGHTS).term()), want)


def test_a_plain_function_becomes_a_term_without_parameters():
    full = losses.as_term(losses.cross_entropy_term())
    assert full.init(jax.random.key(0), None, None) == ({}, {})
    assert (full.student_features, full.teacher_features, full.relates_examples) == ((), (), False)
    got = full.apply(None, Outputs(jnp.asarray(LOGITS), {}), None, batch())
    np.testing.assert_array_equal(got, value(losses.cross_entropy_term()))
    term = Term(None, None)
    assert losses.as_term(term) is term


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_items_of_weight_0_poison_neither_a_mean_nor_its_gradient(bad):
    values, weights = np.array([1.0, bad, 3.0], np.float32), np.array([1.0, 0.0, 3.0], np.float32)
    mean = Mean.of(values, weights)
    assert (float(mean.total), float(mean.count), float(mean.value())) == (10.0, 4.0, 2.5)
    slope = jax.grad(lambda v: Mean.of(v, weights).value())(jnp.asarray(values))
    np.testing.assert_array_equal(slope, [0.25, 0, 0.75])


def test_a_mean_of_nothing_is_0_and_has_no_slope():
    zeros = jnp.zeros(3)
    mean = Mean.of(zeros + np.nan, zeros)
    assert [float(x) for x in (*mean, mean.value())] == [0.0, 0.0, 0.0]
    np.testing.assert_array_equal(jax.grad(lambda v: Mean.of(v, zeros).value())(zeros), [0, 0, 0])


def test_a_weight_for_each_example_holds_for_all_its_positions():
    values = RNG.normal(size=(4, 3, 2)).astype(np.float32)
    weights = np.array([0, 1, 2, 0.5], np.float32)
    mean = Mean.of(values, weights)
    np.testing.assert_allclose(mean.count, 3.5 * 6, rtol=1e-6)
    np.testing.assert_allclose(
        mean.value(), np.average(values.reshape(4, 6).astype(np.float64).mean(1), weights=weights), rtol=1e-5
    )


def test_a_count_has_no_gradient():
    slope = jax.grad(lambda w: Mean.of(jnp.arange(3.0), w).value())(jnp.ones(3))
    np.testing.assert_array_equal(slope, [0, 0, 0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
def test_two_targets_an_example_are_one_soft_target(class_weights, smoothing):
    rng = np.random.default_rng(1)
    other, mix = rng.integers(0, C, N).astype(np.int32), rng.uniform(0, 1, N).astype(np.float32)
    mix[:2] = 1, 0
    mixed = {**batch(), "targets_b": jnp.asarray(other), "mix": jnp.asarray(mix)}
    found = losses.cross_entropy_term(smoothing, class_weights)(Outputs(jnp.asarray(LOGITS), {}), None, mixed)
    scale = np.ones(C) if class_weights is None else np.array(class_weights)
    smooth = lambda targets: (1 - smoothing) * np.eye(C)[targets] + smoothing / C
    one, two = mix * scale[TARGETS], (1 - mix) * scale[other]
    soft = one[:, None] * smooth(TARGETS) + two[:, None] * smooth(other)
    total = -(WEIGHTS[:, None] * soft * log_softmax(LOGITS)).sum()
    np.testing.assert_allclose(found.total, total, rtol=1e-5)
    np.testing.assert_allclose(found.count, (WEIGHTS * (one + two)).sum(), rtol=1e-5)
