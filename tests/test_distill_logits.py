"""Losses on logits against NumPy in float64, written from the papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from bmjax import distill

B, C = 6, 5
RNG = np.random.default_rng(0)
S, T = (2 * RNG.normal(size=(2, B, C))).astype(np.float32)
LABELS = RNG.integers(0, C, B)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def probabilities(temperature=1.0):
    return (softmax(x.astype(np.float64) / temperature, -1) for x in (T, S))


def reference_parts(temperature):
    """TCKD and NCKD of Zhao et al. 2022, equations 3 to 5."""
    p, q = probabilities(temperature)
    tckd, nckd = [], []
    for a, b, y in zip(p, q, LABELS):
        tckd.append(a[y] * np.log(a[y] / b[y]) + (1 - a[y]) * np.log((1 - a[y]) / (1 - b[y])))
        a, b = (np.delete(x, y) / np.delete(x, y).sum() for x in (a, b))
        nckd.append(kl(a, b))
    return np.array(tckd), np.array(nckd), p[np.arange(B), LABELS]


def reference_jsd(beta, temperature=1.0):
    p, q = probabilities(temperature)
    m = beta * p + (1 - beta) * q
    return temperature**2 * (beta * kl(p, m) + (1 - beta) * kl(q, m)) / (beta * (1 - beta))


def reference_standardized():
    z = lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) / 2
    p, q = (softmax(z(x.astype(np.float64)), -1) for x in (T, S))
    return 4 * kl(p, q)


def reference_virtual(correct, temperature):
    u = np.full((B, C), (1 - correct) / (C - 1))
    u[np.arange(B), LABELS] = correct
    u = u ** (1 / temperature)
    q = softmax(S.astype(np.float64) / temperature, -1)
    return temperature**2 * kl(u / u.sum(-1, keepdims=True), q)


def reference_skew(alpha):
    p, q = probabilities(2.0)
    return 4 * kl(p, alpha * p + (1 - alpha) * q), 4 * kl(q, (1 - alpha) * p + alpha * q)


CASES = {
    "kd": (lambda: distill.kd(S, T, 3.0), lambda: 9 * kl(*probabilities(3.0))),
    "kd without T^2": (lambda: distill.kd(S, T, 3.0, t_squared=False), lambda: kl(*probabilities(3.0))),
    "kd at its default": (lambda: distill.kd(S, T), lambda: 16 * kl(*probabilities(4.0))),
    "soft cross-entropy": (
        lambda: distill.soft_cross_entropy(S, T, 2.0),
        lambda: -4 * (softmax(T.astype(np.float64) / 2, -1) * log_softmax(S.astype(np.float64) / 2, -1)).sum(-1),
    ),
    "reverse kl": (lambda: distill.reverse_kl(S, T, 2.0), lambda: 4 * kl(*reversed([*probabilities(2.0)]))),
    "jsd": (lambda: distill.jsd(S, T, 0.3, 2.0), lambda: reference_jsd(0.3, 2.0)),
    "jsd near 0": (lambda: distill.jsd(S, T, 1e-3), lambda: reference_jsd(1e-3)),
    "jsd near 1": (lambda: distill.jsd(S, T, 1 - 1e-3), lambda: reference_jsd(1 - 1e-3)),
    "skew kl": (lambda: distill.skew_kl(S, T, 0.2, 2.0), lambda: reference_skew(0.2)[0]),
    "skew reverse kl": (lambda: distill.skew_reverse_kl(S, T, 0.2, 2.0), lambda: reference_skew(0.2)[1]),
    "tvd": (lambda: distill.tvd(S, T, 2.0), lambda: 0.5 * np.abs(np.subtract(*probabilities(2.0))).sum(-1)),
    "dkd": (
        lambda: distill.dkd(S, T, LABELS, 0.7, 3.0, 2.0),
        lambda: 4 * (0.7 * reference_parts(2.0)[0] + 3 * reference_parts(2.0)[1]),
    ),
    "standardised": (lambda: distill.logit_standardized_kd(S, T), reference_standardized),
    "virtual teacher": (lambda: distill.label_smoothing_teacher(S, LABELS, 0.95, 20.0), lambda: reference_virtual(0.95, 20.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_values_are_those_of_the_formula(case):
    found, want = (make() for make in CASES[case])
    assert (found.shape, found.dtype) == ((B,), jnp.float32)
    # Rounding of the logarithms is multiplied by T^2 = 400 for the virtual teacher.
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=1e-4 if "virtual" in case else 1e-6)


ALL = {
    "kd": distill.kd,
    "soft_cross_entropy": distill.soft_cross_entropy,
    "reverse_kl": distill.reverse_kl,
    "jsd": distill.jsd,
    "jsd 0": lambda s, t: distill.jsd(s, t, 0.0),
    "jsd 1": lambda s, t: distill.jsd(s, t, 1.0),
    "skew_kl": distill.skew_kl,
    "skew_reverse_kl": distill.skew_reverse_kl,
    "tvd": distill.tvd,
    "dkd": lambda s, t: distill.dkd(s, t, jnp.asarray(LABELS)[: len(s)]),
    "dkd at 1": lambda s, t: distill.dkd(s, t, jnp.asarray(LABELS)[: len(s)], temperature=1.0),
    "standardised": distill.logit_standardized_kd,
    "virtual": lambda s, t: distill.label_smoothing_teacher(s, jnp.asarray(LABELS)[: len(s)]),
}


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("soft_cross_entropy", "virtual")])
def test_a_student_like_its_teacher_costs_nothing(name):
    np.testing.assert_allclose(ALL[name](T, T), np.zeros(B), atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_finite_at_extreme_logits(name):
    """Logits of +-1e4 in opposite order, and a class that is masked in both (never the label's)."""
    hard = np.where(RNG.uniform(size=(2, B, C)) < 0.5, -1e4, 1e4).astype(np.float32)
    masked = hard.copy()
    masked[:, np.arange(B), (LABELS + 1) % C] = -np.inf
    only = np.full((2, B, C), -np.inf, np.float32)
    only[:, np.arange(B), LABELS] = 3.0  # the label alone is left
    for s, t in (hard, -hard, masked, (S, hard[1]), (hard[0], T), np.zeros((2, B, C), np.float32), only):
        value, slope = jax.value_and_grad(lambda s, t=t: ALL[name](s, jnp.asarray(t)).sum())(jnp.asarray(s))
        assert np.isfinite(value) and np.isfinite(slope).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_class_that_one_network_rules_out_ruins_no_step(name, whose):
    """A class of -inf in one network alone, never the label's: the value is finite, and the gradient of a usual size."""
    pair, ruled = [S.copy(), T.copy()], (np.arange(B), (LABELS + 1) % C)
    pair[whose == "teacher"][ruled] = -np.inf
    s, t = (jnp.asarray(x) for x in pair)
    value, slope = jax.value_and_grad(lambda s: ALL[name](s, t).sum())(s)
    assert np.isfinite(value) and np.abs(slope).max() < 1e4
    assert np.any(slope[~np.isneginf(s)])


def test_what_is_ruled_out_has_the_log_probability_of_minus_200():
    one, other = np.array([0.0, 1.0, -np.inf], np.float32), np.array([0.5, 0.0, -1.0], np.float32)
    p, q = (softmax(x.astype(np.float64)) for x in (other, one))
    log_q = np.where(q > 0, np.log(np.where(q > 0, q, 1)), -200)
    want, crossed = (p * (np.log(p) - log_q)).sum(), -(p * log_q).sum()
    np.testing.assert_allclose(distill.kd(one, other, 1.0), want, rtol=1e-5)
    np.testing.assert_allclose(distill.reverse_kl(other, one), want, rtol=1e-5)
    np.testing.assert_allclose(distill.soft_cross_entropy(one, other, 1.0), crossed, rtol=1e-5)
    slope = jax.grad(lambda s: distill.kd(s, jnp.asarray(other), 1.0))(jnp.asarray(one))
    np.testing.assert_allclose(slope, q - p, rtol=1e-5)
    only_bias = lambda z: (jnp.ones(1), jnp.zeros((1, 3)), z)
    for name in ("kd", "soft_cross_entropy"):
        plain, fused = getattr(distill, name), getattr(distill.vocabulary, name)
        wanted = jax.value_and_grad(plain)(jnp.asarray(one), jnp.asarray(other), 1.0)
        found = jax.value_and_grad(lambda z, fn=fused: fn(only_bias(z), only_bias(other), 1.0))(jnp.asarray(one))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


@pytest.mark.parametrize("name", ALL)
def test_items_are_independent_and_sequences_and_a_batch_of_1_work(name):
    whole = ALL[name](S, T)
    other = ALL[name](np.concatenate([[S[1] + 3], S[1:]]), np.concatenate([[T[2]], T[1:]]))
    np.testing.assert_array_equal(whole[1:], other[1:])
    assert whole[0] != other[0]
    np.testing.assert_allclose(ALL[name](S[:1], T[:1]), whole[:1], rtol=1e-6)


def test_sequences_are_items_too():
    s, t, labels = S.reshape(2, 3, C), T.reshape(2, 3, C), LABELS.reshape(2, 3)
    np.testing.assert_allclose(distill.dkd(s, t, labels), distill.dkd(S, T, LABELS).reshape(2, 3), rtol=1e-6)
    np.testing.assert_allclose(distill.jsd(s, t), distill.jsd(S, T).reshape(2, 3), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_tckd_plus_the_teachers_doubt_times_nckd(temperature):
    """Zhao et al. 2022, equation 6, of each item."""
    tckd = distill.dkd(S, T, LABELS, 1.0, 0.0, temperature)
    nckd = distill.dkd(S, T, LABELS, 0.0, 1.0, temperature)
    doubt = 1 - reference_parts(temperature)[2]
    np.testing.assert_allclose(distill.kd(S, T, temperature), tckd + doubt * nckd, rtol=1e-5, atol=1e-6)


def test_jsd_goes_over_to_both_kls_and_stays_between_its_bounds():
    forward, backward = kl(*probabilities()), kl(*reversed([*probabilities()]))
    np.testing.assert_allclose(distill.jsd(S, T, 0.0), forward, rtol=1e-5)
    np.testing.assert_allclose(distill.jsd(S, T, 1.0), backward, rtol=1e-5)
    np.testing.assert_allclose(distill.jsd(S, T, 1e-5), forward, rtol=1e-3)
    np.testing.assert_allclose(distill.jsd(S, T, 1 - 1e-5), backward, rtol=1e-3)
    np.testing.assert_allclose(distill.jsd(S, T, 0.3), distill.jsd(T, S, 0.7), rtol=1e-5)
    apart = 100 * np.eye(2, dtype=np.float32)
    np.testing.assert_allclose(distill.jsd(apart, apart[::-1]), 4 * np.log(2), rtol=1e-5)


def test_a_skew_of_0_is_the_kl():
    np.testing.assert_array_equal(distill.skew_kl(S, T, 0.0), distill.kd(S, T, 1.0))
    np.testing.assert_array_equal(distill.skew_reverse_kl(S, T, 0.0), distill.reverse_kl(S, T))


def test_soft_cross_entropy_has_the_gradient_of_kd():
    slopes = [jax.grad(lambda s, fn=fn: fn(s, T, 2.0).sum())(jnp.asarray(S)) for fn in (distill.kd, distill.soft_cross_entropy)]
    np.testing.assert_allclose(*slopes, atol=1e-6)


def test_the_slopes_of_kd_are_those_of_the_formula():
    """By the student, by the teacher (two students that learn from each other), by the temperature, and of second order."""
    temperature = 2.0
    p, q = probabilities(temperature)
    value = temperature**2 * kl(p, q)
    by_s, by_t, by_temperature = jax.grad(lambda *x: distill.kd(*x).sum(), (0, 1, 2))(S, T, temperature)
    np.testing.assert_allclose(distill.kd(S, T, temperature), value, rtol=1e-5)
    np.testing.assert_allclose(by_s, temperature * (q - p), atol=1e-5)
    log_ratio = np.log(p / q)
    np.testing.assert_allclose(by_t, temperature * p * (log_ratio - kl(p, q)[:, None]), atol=1e-5)
    step = 1e-4
    high, low = ((2 + h) ** 2 * kl(*probabilities(2 + h)) for h in (step, -step))
    np.testing.assert_allclose(by_temperature, ((high - low) / (2 * step)).sum(), rtol=1e-4)
    curve = jax.jacfwd(jax.grad(lambda s: distill.kd(s, T[0], temperature)))(S[0])
    np.testing.assert_allclose(curve, np.diag(q[0]) - np.outer(q[0], q[0]), atol=1e-5)


def test_the_mixtures_gradients_are_those_of_the_formula():
    """By central differences of the float64 formula."""
    probe = RNG.normal(size=(B, C))
    for fn, want in (
        (lambda s: distill.jsd(s, T, 0.3), lambda p, q: kl(p, 0.3 * p + 0.7 * q) / 0.7 + kl(q, 0.3 * p + 0.7 * q) / 0.3),
        (lambda s: distill.skew_kl(s, T, 0.1), lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
        (lambda s: distill.skew_reverse_kl(s, T, 0.1), lambda p, q: kl(q, 0.9 * p + 0.1 * q)),
    ):
        p = softmax(T.astype(np.float64), -1)
        at = lambda h, want=want, p=p: want(p, softmax(S + h * probe, -1)).sum()
        slope = jax.grad(lambda s, fn=fn: fn(s).sum())(jnp.asarray(S))
        np.testing.assert_allclose((np.asarray(slope) * probe).sum(), (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-4)


def test_standardised_logits_know_neither_scale_nor_shift():
    np.testing.assert_allclose(distill.logit_standardized_kd(3 * T + 2, T), np.zeros(B), atol=1e-6)
    alike, teacher = jnp.full_like(S, 5.3), (T - T.mean(-1, keepdims=True)) / T.std(-1, keepdims=True)
    slopes = jax.grad(lambda s: distill.logit_standardized_kd(s, T).sum())(alike)
    np.testing.assert_allclose(slopes, jax.grad(lambda s: distill.kd(s, teacher, 2.0).sum())(alike), rtol=1e-5, atol=1e-6)
    masked = lambda x: np.concatenate([x, np.full((B, 2), -np.inf, np.float32)], -1)
    found = distill.logit_standardized_kd(masked(S), masked(T))
    np.testing.assert_allclose(found, distill.logit_standardized_kd(S, T), rtol=1e-5)


def test_low_precision_is_computed_in_float32():
    low = jnp.asarray(S, jnp.bfloat16)
    for fn in (distill.jsd, distill.tvd, distill.reverse_kl, distill.logit_standardized_kd):
        assert fn(low, T).dtype == jnp.float32
        np.testing.assert_allclose(fn(low, T), fn(low.astype(jnp.float32), T), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: distill.kd(S, T, 0.0), "the distillation temperature is 0.0; expected a number above 0"),
        (lambda: distill.tvd(S, T, float("nan")), "the distillation temperature is nan"),
        (lambda: distill.kd(S, T, np.float32(-1)), "temperature is -1.0"),
        (lambda: distill.kd(S, T, jnp.float32(0)), "temperature is 0.0"),
        (lambda: distill.reverse_kl(S, T, np.array(np.nan)), "temperature is nan"),
        (lambda: distill.jsd(S, T, np.float32(1.5)), "beta is 1.5"),
        (lambda: distill.skew_reverse_kl(S, T[:1]), r"skew_reverse_kl: the student's array is \[6, 5\] and"),
        (lambda: distill.kd(S, T[:1]), r"kd: the student's array is \[6, 5\] and the teacher's \[1, 5\]"),
        (lambda: distill.jsd(S, T, 1.5), r"jsd: beta is 1.5; expected a number in \[0, 1\]"),
        (lambda: distill.skew_kl(S, T, 1.0), r"skew_kl: alpha is 1.0; expected a number in \[0, 1\)"),
        (lambda: distill.dkd(S, T, LABELS[:2]), r"dkd: labels \[2\] for logits \[6, 5\]"),
        (lambda: distill.label_smoothing_teacher(S[:, :1], LABELS), "1 class; expected 2 or more"),
        (lambda: distill.label_smoothing_teacher(S, LABELS, 1.0), "correct is 1.0"),
        (lambda: distill.label_smoothing_teacher(S, LABELS[:2]), r"labels \[2\] for logits"),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)
