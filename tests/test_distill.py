import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr, softmax

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
    log_q = np.where(np.isneginf(student), -200.0, log_softmax(student.astype(np.float64), -1))  # as the docstring says
    p = softmax(teacher.astype(np.float64), -1)
    np.testing.assert_allclose(distill.kl_divergence(student, teacher), (p * (np.log(p) - log_q)).sum(-1), rtol=1e-5)


def applied(term, student, teacher, batch=BATCH, params=None):
    return as_term(term).apply(context(params), student, teacher, batch)


@pytest.mark.parametrize(("t_squared", "factor"), [(True, 9.0), (False, 1.0)])
def test_kd_follows_the_named_convention_and_the_weights(t_squared, factor):
    term = losses.on_logits(distill.kd, 0.5, temperature=3.0, t_squared=t_squared)
    mean = applied(term, outputs(STUDENT), outputs(TEACHER))
    np.testing.assert_allclose(mean.value(), 0.5 * factor * np.average(kl(STUDENT, TEACHER, 3.0), weights=WEIGHTS), rtol=1e-5)
    np.testing.assert_allclose(mean.count, WEIGHTS.sum())
    assert not term.relates_examples


def test_with_t_squared_the_gradient_at_high_temperature_matches_centred_logits():
    """Hinton et al. 2015, equation 4: as T grows the gradient of T^2 KL tends to (z - v) / C for centred logits."""
    student, teacher = (x - x.mean(-1, keepdims=True) for x in (STUDENT, TEACHER))
    term = losses.on_logits(distill.kd, temperature=1000.0)
    slope = jax.grad(lambda s: applied(term, outputs(s), outputs(teacher)).total)(jnp.asarray(student))
    np.testing.assert_allclose(slope, WEIGHTS[:, None] * (student - teacher) / C, atol=0.01)


def test_labels_are_the_batchs_targets_and_both_of_them_where_it_was_mixed():
    term, labels = losses.on_logits(distill.dkd, beta=2.0), np.asarray(BATCH["targets"])
    one = distill.dkd(STUDENT, TEACHER, BATCH["targets"], beta=2.0)
    found = applied(term, outputs(STUDENT), outputs(TEACHER))
    np.testing.assert_allclose(found.value(), np.average(one, weights=WEIGHTS), rtol=1e-5)
    other, mix = (labels + 1) % C, np.linspace(0, 1, B, dtype=np.float32)
    mixed = {**BATCH, "targets_b": jnp.asarray(other), "mix": jnp.asarray(mix)}
    two = distill.dkd(STUDENT, TEACHER, jnp.asarray(other), beta=2.0)
    found = applied(term, outputs(STUDENT), outputs(TEACHER), mixed)
    np.testing.assert_allclose(found.value(), np.average(mix * one + (1 - mix) * two, weights=WEIGHTS), rtol=1e-5)


def test_a_loss_whose_second_argument_is_labels_needs_no_teacher():
    found = applied(losses.on_logits(distill.label_smoothing_teacher), outputs(STUDENT), None)
    want = distill.label_smoothing_teacher(STUDENT, BATCH["targets"])
    np.testing.assert_allclose(found.value(), np.average(want, weights=WEIGHTS), rtol=1e-5)


def test_a_loss_of_your_own_is_a_function_of_two_arrays():
    def logit_mse(s, t):
        return jnp.square(s - t).mean(-1)

    found = applied(losses.on_logits(logit_mse), outputs(STUDENT), outputs(TEACHER))
    np.testing.assert_allclose(found.value(), np.average(((STUDENT - TEACHER) ** 2).mean(-1), weights=WEIGHTS), rtol=1e-5)


def test_a_loss_over_the_batch_counts_like_a_mean_of_items():
    term = losses.on_logits(distill.dist, 3.0)
    assert term.relates_examples
    mean = applied(term, outputs(STUDENT), outputs(TEACHER))
    np.testing.assert_allclose(mean.value(), 3 * distill.dist(STUDENT, TEACHER, weights=WEIGHTS), rtol=1e-5)
    np.testing.assert_allclose(mean.count, WEIGHTS.sum())


def context(params):
    return Context(params, {}, jnp.int32(0), jax.random.key(0), lambda x: x, lambda x: x)


def hint_term(student, teacher, fn=distill.hint, **kw):
    term = losses.on_features(fn, {"s": "t"}, **{"project": "linear"} | kw)
    params, state = term.init(jax.random.key(0), outputs(s=student), outputs(t=teacher))
    assert state == {}
    return term, params


@pytest.mark.parametrize("shape", [(B, 3), (B, 4, 3)])
def test_the_hint_projects_each_token_by_itself(shape):
    student = RNG.normal(size=shape).astype(np.float32)
    teacher = RNG.normal(size=(*shape[:-1], 7)).astype(np.float32)
    term, params = hint_term(student, teacher)
    linear = params["project"]["0"]
    assert {name: x.shape for name, x in linear.items()} == {"kernel": (3, 7), "bias": (7,)}
    linear["bias"] = jnp.arange(7.0)
    mean = term.apply(context(params), outputs(s=student), outputs(t=teacher), BATCH)
    rows = []
    for s, t in zip(student.reshape(B, -1, 3), teacher.reshape(B, -1, 7)):
        rows.append(
            np.mean([(a.astype(np.float64) @ np.asarray(linear["kernel"]) + np.arange(7) - b) ** 2 for a, b in zip(s, t)])
        )
    np.testing.assert_allclose(mean.value(), np.average(rows, weights=WEIGHTS), rtol=1e-5)
    np.testing.assert_allclose(mean.count, WEIGHTS.sum())
    assert (term.student_features, term.teacher_features) == (("s",), ("t",))


def test_a_weight_for_each_position_leaves_positions_out():
    s, t = RNG.normal(size=(2, B, 4, 3)).astype(np.float32)
    weights = RNG.integers(0, 3, (B, 4)).astype(np.float32)
    term, params = hint_term(s, t, project=None)
    assert params == {}
    mean = term.apply(context(params), outputs(s=s), outputs(t=t), {"weights": jnp.asarray(weights)})
    np.testing.assert_allclose(mean.value(), np.average(((s - t) ** 2).mean(-1), weights=weights), rtol=1e-5)
    np.testing.assert_allclose(mean.count, weights.sum())


def test_a_loss_that_relates_positions_gets_a_mask():
    s, t = RNG.normal(size=(2, B, 2, 4, 4)).astype(np.float32)
    weights = (np.arange(4)[None] < np.array([4, 2, 3, 0, 1, 4])[:, None]).astype(np.float32)
    term, _ = hint_term(s, t, distill.attention_scores, project=None)
    mean = term.apply(context({}), outputs(s=s), outputs(t=t), {"weights": jnp.asarray(weights)})
    each = [((s - t) ** 2)[i, :, :n, :n].mean() if n else 0 for i, n in enumerate([4, 2, 3, 0, 1, 4])]
    np.testing.assert_allclose(mean.value(), np.average(each, weights=weights.sum(1)), rtol=1e-5)
    np.testing.assert_allclose(mean.count, weights.sum())


def test_relations_leave_padded_positions_out():
    s, t = RNG.normal(size=(2, B, 4, 3)).astype(np.float32)
    weights = (np.arange(4)[None] < np.array([4, 2, 3, 0, 2, 4])[:, None]).astype(np.float32)
    batch = {"weights": jnp.asarray(weights)}
    term, _ = hint_term(s, t, distill.similarity, project=None)
    want = distill.similarity(s * weights[..., None], t * weights[..., None], weights.mean(1))
    found = term.apply(context({}), outputs(s=s), outputs(t=t), batch).value()
    np.testing.assert_allclose(found, want, rtol=1e-5)
    spoilt = np.where(weights[..., None] > 0, s, 99)
    np.testing.assert_array_equal(term.apply(context({}), outputs(s=spoilt), outputs(t=t), batch).value(), found)


def test_several_layers_add_up_and_widths_are_projected_where_they_differ():
    a, b, c = (RNG.normal(size=(B, n)).astype(np.float32) for n in (3, 3, 5))
    term = losses.on_features(distill.hint, {"a": "b", "b": "c"}, project="auto", weight=2.0)
    student, teacher = outputs(a=a, b=b), outputs(b=b, c=c)
    params, _ = term.init(jax.random.key(0), student, teacher)
    assert list(params["project"]) == ["1"]
    linear = params["project"]["1"]
    want = ((a - b) ** 2).mean(-1) + ((b @ np.asarray(linear["kernel"]) - c) ** 2).mean(-1)
    found = term.apply(context(params), student, teacher, BATCH)
    np.testing.assert_allclose(found.value(), 2 * np.average(want, weights=WEIGHTS), rtol=1e-5)
    np.testing.assert_allclose(found.count, WEIGHTS.sum())


def test_what_a_loss_trains_is_the_terms_own():
    s, t = RNG.normal(size=(B, 3)).astype(np.float32), RNG.normal(size=(B, 7)).astype(np.float32)
    term, params = hint_term(s, t, distill.vid, trained={"log_variance": distill.vid_variance})
    own = params["trained"]["0"]["log_variance"]
    np.testing.assert_allclose(jax.nn.softplus(own), np.full(7, 5.0), rtol=1e-5)
    one = {"weights": jnp.ones(B)}
    projected = s @ np.asarray(params["project"]["0"]["kernel"])
    found = term.apply(context(params), outputs(s=s), outputs(t=t), one).value()
    np.testing.assert_allclose(found, distill.vid(projected, t, own), rtol=1e-5)


def test_several_maps_go_together():
    a, b = (RNG.normal(size=(B, 4, 4, n)).astype(np.float32) for n in (2, 3))
    student, teacher = outputs(a=a, b=b), outputs(c=a + 1, d=b)
    for fn, kw in ((distill.fsp, {}), (distill.review_kd, {"trained": {"fusion": distill.review_fusion}})):
        term = losses.on_features(fn, {"a": "c", "b": "d"}, together=True, **kw)
        params, _ = term.init(jax.random.key(0), student, teacher)
        own = params["trained"]["0"] if kw else {}
        found = term.apply(context(params), student, teacher, {"weights": jnp.ones(B)}).value()
        np.testing.assert_allclose(found, fn([a, b], [a + 1, b], **own), rtol=1e-4)


def test_the_hint_starts_as_the_identity_where_widths_agree():
    feature = RNG.normal(size=(B, 4, 3)).astype(np.float32)
    term, params = hint_term(feature, feature)
    np.testing.assert_array_equal(params["project"]["0"]["kernel"], np.eye(3))
    assert float(term.apply(context(params), outputs(s=feature), outputs(t=feature), BATCH).value()) == 0.0


def test_the_hints_projector_takes_another_batch_size():
    one, many = (RNG.normal(size=(n, 4, 3)).astype(np.float32) for n in (1, 9))
    term, params = hint_term(one, one)
    shifted = term.apply(context(params), outputs(s=many), outputs(t=many + 2), {"weights": jnp.ones(9)})
    np.testing.assert_allclose(shifted.value(), 4.0, rtol=1e-5)


def kd_term(**kw):
    return losses.on_logits(distill.kd, **kw)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: kd_term(temperature=0.0), "the distillation temperature is 0.0; expected a number above 0"),
        (lambda: kd_term(temperature=-1.0), "the distillation temperature is -1.0"),
        (lambda: kd_term(temperature=float("nan")), "the distillation temperature is nan"),
        (lambda: kd_term(temperature=float("inf")), "the distillation temperature is inf"),
        (lambda: kd_term(temprature=2.0), "kd takes no argument 'temprature'; it takes temperature, t_squared"),
        (lambda: kd_term(weight=float("nan")), "the weight of kd is nan"),
        (lambda: applied(kd_term(), outputs(STUDENT), None), "kd needs a teacher"),
        (
            lambda: applied(kd_term(), outputs(STUDENT), outputs(TEACHER[:, :4])),
            "the student has 5 classes and the teacher 4; kd needs the same classes",
        ),
        (
            lambda: applied(kd_term(), outputs(STUDENT), outputs(TEACHER[:1])),
            r"the student's logits are \[6, 5\] and the teacher's \[1, 5\]",
        ),
        (
            lambda: applied(losses.on_logits(lambda s, t: jnp.mean(s - t)), outputs(STUDENT), outputs(TEACHER)),
            r"returned \[\] for logits \[6, 5\]; return a value for each item",
        ),
        (
            lambda: applied(losses.on_logits(lambda s, t, weights: s[:, 0]), outputs(STUDENT), outputs(TEACHER)),
            r"takes `weights` and returned \[6\]; it must return one number",
        ),
        (lambda: losses.on_features(distill.hint, {}), "hint was given no layers"),
        (lambda: losses.on_features(distill.hint, {"a": "b"}, project="mlp"), "project is 'mlp'; expected 'linear'"),
        (lambda: hint_term(STUDENT, TEACHER, margin=1.0), "hint takes no argument 'margin'; it takes none"),
        (
            lambda: losses.on_features(distill.hint, {"s": "t"}).init(jax.random.key(0), outputs(s=STUDENT), None),
            "hint needs a teacher",
        ),
        (
            lambda: hint_term(STUDENT, TEACHER[:3]),
            r"hint: the student's feature is \[6, 5\] and the teacher's \[3, 5\]; all axes but the last must agree \(s -> t\)",
        ),
        (lambda: hint_term(STUDENT, TEACHER[:, :3], project=None), 'give losses.on_features project="linear".*s -> t'),
        (lambda: config.validate(distill.Distill(share=1.5)), "share"),
        (lambda: config.validate(distill.Distill(temperature=0.0)), "temperature"),
        (lambda: config.validate(distill.Distill(hint_weight=-1.0)), "hint_weight"),
        (lambda: config.validate(distill.Distill(loss="kdd")), "loss"),
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
        (distill.Distill(loss="jsd"), {"ce": 0.1, "jsd": 0.9}),
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
    found = applied(terms["kd"][1], outputs(STUDENT), outputs(TEACHER)).value()
    np.testing.assert_allclose(found, 9 * np.average(kl(STUDENT, TEACHER, 3.0), weights=WEIGHTS), rtol=1e-5)


def test_every_loss_of_the_config_takes_its_temperature():
    for name in ("kd", "dkd", "logit_standardized_kd", "dist", "soft_cross_entropy", "reverse_kl", "jsd", "tvd"):
        term = distill.Distill(loss=name, temperature=3.0).terms(losses.cross_entropy_term())[name][1]
        more = {"dkd": {"labels": BATCH["targets"]}, "dist": {"weights": WEIGHTS}}.get(name, {})
        values = getattr(distill, name)(STUDENT, TEACHER, temperature=3.0, **more)
        found = applied(term, outputs(STUDENT), outputs(TEACHER)).value()
        np.testing.assert_allclose(found, np.average(np.broadcast_to(values, B), weights=WEIGHTS), rtol=1e-5)
