import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from bmjax import config, distill, losses
from bmjax.losses import as_term
from bmjax.types import Context, Outputs

B, C = 6, 5
RNG = np.random.default_rng(0)
STUDENT, TEACHER = (2 * RNG.normal(size=(2, B, C))).astype(np.float32)
WEIGHTS = np.array([1, 0, 0.5, 2, 0, 1], np.float32)
BATCH = {"targets": jnp.asarray(RNG.integers(0, C, B)), "weights": jnp.asarray(WEIGHTS)}


def outputs(logits=None, **features):
    return Outputs(None if logits is None else jnp.asarray(logits), {name: jnp.asarray(x) for name, x in features.items()})


def kl(student, teacher, temperature=1.0):
    p, q = (softmax(x.astype(np.float64) / temperature, axis=-1) for x in (teacher, student))
    return rel_entr(p, q).sum(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_scipys_relative_entropy(temperature):
    found = distill.kl_divergence(STUDENT, TEACHER, temperature)
    assert (found.shape, found.dtype) == ((B,), jnp.float32)
    np.testing.assert_allclose(found, kl(STUDENT, TEACHER, temperature), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(distill.kl_divergence(TEACHER, TEACHER, temperature), np.zeros(B))


def test_kl_takes_sequences_and_low_precision():
    found = distill.kl_divergence(STUDENT.reshape(2, 3, C), TEACHER.reshape(2, 3, C), 2.0)
    np.testing.assert_allclose(found, kl(STUDENT, TEACHER, 2.0).reshape(2, 3), rtol=1e-5, atol=1e-6)
    low = jnp.asarray(STUDENT, jnp.bfloat16)
    found = distill.kl_divergence(low, TEACHER)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, kl(np.asarray(low, np.float64), TEACHER), rtol=1e-5, atol=1e-6)


def test_the_gradient_of_kl_is_the_difference_of_the_softmaxes_over_t():
    slope = jax.grad(lambda s: distill.kl_divergence(s, TEACHER, 2.0).sum())(jnp.asarray(STUDENT))
    want = (softmax(STUDENT.astype(np.float64) / 2, -1) - softmax(TEACHER.astype(np.float64) / 2, -1)) / 2
    np.testing.assert_allclose(slope, want, atol=1e-6)


def test_a_class_without_teacher_mass_costs_nothing_even_at_minus_infinity():
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[:, 2] = teacher[:, 2] = -np.inf
    value, slope = jax.value_and_grad(lambda s: distill.kl_divergence(s, teacher, 2.0).sum())(jnp.asarray(student))
    rest = [0, 1, 3, 4]
    np.testing.assert_allclose(value, kl(student[:, rest], teacher[:, rest], 2.0).sum(), rtol=1e-5)
    want = (softmax(student.astype(np.float64) / 2, -1) - softmax(teacher.astype(np.float64) / 2, -1)) / 2
    np.testing.assert_allclose(slope, want, atol=1e-6)
    teacher[:, 2] = 0.0  # the student now rules out what the teacher holds possible
    assert np.isposinf(distill.kl_divergence(student, teacher)).all()


@pytest.mark.parametrize(("t_squared", "factor"), [(True, 9.0), (False, 1.0)])
def test_kd_follows_the_named_convention_and_the_weights(t_squared, factor):
    mean = distill.kd(3.0, t_squared=t_squared)(outputs(STUDENT), outputs(TEACHER), BATCH)
    np.testing.assert_allclose(mean.value(), factor * np.average(kl(STUDENT, TEACHER, 3.0), weights=WEIGHTS), rtol=1e-5)
    np.testing.assert_allclose(mean.count, WEIGHTS.sum())


def test_with_t_squared_the_gradient_at_high_temperature_matches_centred_logits():
    """Hinton et al. 2015, equation 4: as T grows the gradient of T^2 KL tends to (z - v) / C for centred logits."""
    student, teacher = (x - x.mean(-1, keepdims=True) for x in (STUDENT, TEACHER))
    slope = jax.grad(lambda s: distill.kd(1000.0)(outputs(s), outputs(teacher), BATCH).total)(jnp.asarray(student))
    np.testing.assert_allclose(slope, WEIGHTS[:, None] * (student - teacher) / C, atol=0.01)


def hint_term(student, teacher):
    term = as_term(distill.hint("s", "t"))
    params, state = term.init(jax.random.key(0), outputs(s=student), outputs(t=teacher))
    assert state == {}
    return term, params


def context(params):
    return Context(params, {}, jnp.int32(0), jax.random.key(0), None, None)


@pytest.mark.parametrize("shape", [(B, 3), (B, 4, 3)])
def test_the_hint_projects_each_token_by_itself(shape):
    student = RNG.normal(size=shape).astype(np.float32)
    teacher = RNG.normal(size=(*shape[:-1], 7)).astype(np.float32)
    term, params = hint_term(student, teacher)
    assert {name: x.shape for name, x in params.items()} == {"kernel": (3, 7), "bias": (7,)}
    params = {"kernel": params["kernel"], "bias": jnp.arange(7.0)}
    mean = term.apply(context(params), outputs(s=student), outputs(t=teacher), BATCH)
    rows = []
    for s, t in zip(student.reshape(B, -1, 3), teacher.reshape(B, -1, 7)):
        rows.append(
            np.mean([(a.astype(np.float64) @ np.asarray(params["kernel"]) + np.arange(7) - b) ** 2 for a, b in zip(s, t)])
        )
    np.testing.assert_allclose(mean.value(), np.average(rows, weights=WEIGHTS), rtol=1e-5)
    np.testing.assert_allclose(mean.count, WEIGHTS.sum() * np.prod(shape[1:-1]))
    assert (term.student_features, term.teacher_features) == (("s",), ("t",))


def test_the_hint_starts_as_the_identity_where_widths_agree():
    feature = RNG.normal(size=(B, 4, 3)).astype(np.float32)
    term, params = hint_term(feature, feature)
    np.testing.assert_array_equal(params["kernel"], np.eye(3))
    assert float(term.apply(context(params), outputs(s=feature), outputs(t=feature), BATCH).value()) == 0.0


def test_the_hints_projector_takes_another_batch_size():
    one, many = (RNG.normal(size=(n, 4, 3)).astype(np.float32) for n in (1, 9))
    term, params = hint_term(one, one)
    shifted = term.apply(context(params), outputs(s=many), outputs(t=many + 2), {"weights": jnp.ones(9)})
    np.testing.assert_allclose(shifted.value(), 4.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: distill.kd(0.0), "the distillation temperature is 0.0; expected a number above 0"),
        (lambda: distill.kd(-1.0), "the distillation temperature is -1.0"),
        (lambda: distill.kd(float("nan")), "the distillation temperature is nan"),
        (lambda: distill.kd(float("inf")), "the distillation temperature is inf"),
        (lambda: distill.kd()(outputs(STUDENT), None, BATCH), "kd needs a teacher"),
        (
            lambda: distill.kd()(outputs(STUDENT), outputs(TEACHER[:, :4]), BATCH),
            "the student has 5 classes and the teacher 4; kd needs the same classes",
        ),
        (
            lambda: distill.kd()(outputs(STUDENT), outputs(TEACHER[:1]), BATCH),
            r"the student's logits are \[6, 5\] and the teacher's \[1, 5\]",
        ),
        (lambda: distill.hint("s", "t").init(jax.random.key(0), outputs(s=STUDENT), None), "hint needs a teacher"),
        (
            lambda: distill.hint("s", "t").init(jax.random.key(0), outputs(s=STUDENT), outputs(t=TEACHER[:3])),
            r"hint: s is \[6, 5\] and the teacher's t is \[3, 5\]; all axes but the last must agree",
        ),
        (lambda: config.validate(distill.Distill(share=1.5)), "share"),
        (lambda: config.validate(distill.Distill(temperature=0.0)), "temperature"),
        (lambda: config.validate(distill.Distill(hint_weight=-1.0)), "hint_weight"),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("objective", "weights"),
    [
        (distill.Distill(), {"ce": 0.1, "kd": 0.9}),
        (distill.Distill(share=0.0), {"ce": 1.0}),
        (distill.Distill(share=1.0), {"kd": 1.0}),
        (distill.Distill(share=0.25, hint_weight=3.0), {"ce": 0.75, "kd": 0.25, "hint": 3.0}),
        (distill.Distill(share=1.0, hint_weight=0.5), {"kd": 1.0, "hint": 0.5}),
    ],
)
def test_the_config_gives_the_terms_that_have_weight(objective, weights):
    terms = objective.terms(losses.cross_entropy_term())
    assert {name: weight for name, (weight, _) in terms.items()} == pytest.approx(weights)


def test_the_configs_terms_are_those_it_names():
    task = losses.cross_entropy_term()
    terms = distill.Distill(0.5, 3.0, 1.0, "layers/0", "layers/2/mlp").terms(task)
    assert terms["ce"][1] is task
    assert (terms["hint"][1].student_features, terms["hint"][1].teacher_features) == (("layers/0",), ("layers/2/mlp",))
    found = terms["kd"][1](outputs(STUDENT), outputs(TEACHER), BATCH).value()
    np.testing.assert_allclose(found, 9 * np.average(kl(STUDENT, TEACHER, 3.0), weights=WEIGHTS), rtol=1e-5)
