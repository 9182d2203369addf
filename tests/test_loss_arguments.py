"""What a loss is given, by the names of its arguments; and that what has weight 0 reaches no gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import softmax

from bmjax import distill, losses, parallel
from bmjax.models import Plain
from bmjax.train import Problem, init_state, make_step
from bmjax.types import Context, Mean, Outputs

B, T, C = 8, 3, 4
RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.normal(size=shape).astype(np.float32)
LOGITS, X = (normal(B, C), normal(B, C)), (normal(B, 5), normal(B, 5))
LABELS = RNG.integers(0, C, B)
WEIGHTS = np.array([1, 0, 2, 0.5, 1, 0, 1, 3], np.float32)
BATCH = {"targets": LABELS, "weights": WEIGHTS, "id": np.arange(B)}
TOKENS = {"targets": RNG.integers(0, C, (B, T)), "weights": (RNG.uniform(size=(B, T)) > 0.3).astype(np.float32)}
FEATURES = {"a": "a"}


def applied(term, x=X, logits=LOGITS, batch=BATCH):
    """The loss, and its slopes by the student's logits and feature."""

    def value(mine):
        student, teacher = Outputs(mine[0], {"a": mine[1]}), Outputs(jnp.asarray(logits[1]), {"a": jnp.asarray(x[1])})
        params, state = term.init(jax.random.key(0), student, teacher)
        same = lambda tree: tree
        found = term.apply(Context(params, state, jnp.int32(0), jax.random.key(1), same, same), student, teacher, batch)
        return (found if isinstance(found, Mean) else found[0]).value()

    return jax.value_and_grad(value)((jnp.asarray(logits[0]), jnp.asarray(x[0])))


def average(values, weights=WEIGHTS):
    return np.average(np.asarray(values, np.float64), weights=weights)


def test_labels_of_a_feature_loss_are_the_items():
    fn = lambda s, t, labels: jnp.mean(jnp.square(s - t) * (1 + labels[:, None]))
    gap = np.square(X[0] - X[1]).mean(-1)
    value, _ = applied(losses.on_features(fn, FEATURES))
    np.testing.assert_allclose(value, average(gap * (1 + LABELS)), rtol=1e-5)
    mix, other = np.linspace(0, 1, B, dtype=np.float32), (LABELS + 1) % C
    value, _ = applied(losses.on_features(fn, FEATURES), batch={**BATCH, "targets_b": other, "mix": mix})
    np.testing.assert_allclose(value, average(gap * (1 + mix * LABELS + (1 - mix) * other)), rtol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
def test_labels_of_positions_and_one_label_for_all_of_them(whole):
    fn = lambda s, t, labels: jnp.mean(jnp.square(s - t)) * (1 + jnp.squeeze(labels))
    x = normal(B, T, 2), normal(B, T, 2)
    batch = {**TOKENS, "targets": LABELS} if whole else TOKENS
    value, _ = applied(losses.on_features(fn, FEATURES), x, batch=batch)
    labels = np.broadcast_to(LABELS[:, None], (B, T)) if whole else TOKENS["targets"]
    np.testing.assert_allclose(value, average(np.square(x[0] - x[1]).mean(-1) * (1 + labels), TOKENS["weights"]), rtol=1e-5)


def supervised(s, t, labels, weights):
    """The mean of squared differences between cosines of pairs with one label."""
    s, t = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (s, t))
    same = (labels[:, None] == labels[None]) * weights[:, None] * weights[None]
    return jnp.sum(same * jnp.square(s @ s.T - t @ t.T)) / jnp.sum(same)


def test_a_loss_may_relate_examples_by_their_labels():
    want = supervised(*LOGITS, LABELS, WEIGHTS)
    np.testing.assert_allclose(applied(losses.on_logits(supervised))[0], want, rtol=1e-5)
    want = supervised(*X, LABELS, WEIGHTS)
    np.testing.assert_allclose(applied(losses.on_features(supervised, FEATURES))[0], want, rtol=1e-5)


@functools.cache
def stepped(spec):
    """The parameters after two steps of SGD on labelled relations."""
    model, mesh = Plain(hidden=(6,)).build((5,), C), parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None)
    batch = {"inputs": X[0], **BATCH, "targets": LABELS.astype(np.int32), "id": np.arange(B, dtype=np.int32)}
    terms = {
        "logits": (1.0, losses.on_logits(supervised)),
        "feature": (1.0, losses.on_features(supervised, {"hidden_0": "hidden_0"})),
        "items": (1.0, losses.on_features(lambda s, t, labels: jnp.mean((s - t) ** 2) * labels[0], {"hidden_0": "hidden_0"})),
    }
    problem = Problem(model, terms, optax.sgd(0.5), teacher=model)
    frozen = {"params": model.init(jax.random.key(1), batch)[0], "model_state": {}}
    state = init_state(problem, mesh, model.rules, jax.random.key(0), batch, frozen=frozen)
    step = make_step(problem, mesh, state)
    for _ in range(2):
        state, _ = step(state, frozen, batch)
    return jax.device_get(state.params)


def test_labels_follow_their_examples_over_eight_devices():
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), stepped("data=1"), stepped("data=8"))


def test_arguments_without_a_default_are_given_too():
    by_weight = lambda s, t, weights: jnp.sum(weights[:, None] * jnp.square(s - t)) / jnp.sum(weights)
    want = average(np.square(X[0] - X[1]).sum(-1))
    np.testing.assert_allclose(applied(losses.on_features(by_weight, FEATURES))[0], want, rtol=1e-5)

    def by_mask(s, t, mask):
        kept = jnp.ones(s.shape[:2]) if mask is None else mask
        return jnp.sum(kept[..., None] * jnp.square(s - t)) / jnp.sum(kept)

    x, kept = (normal(B, T, 2), normal(B, T, 2)), TOKENS["weights"] > 0
    each = [np.square(a - b)[k].sum() / max(k.sum(), 1) for a, b, k in zip(*x, kept)]
    found = applied(losses.on_features(by_mask, FEATURES), x, batch=TOKENS)[0]
    np.testing.assert_allclose(found, average(each, TOKENS["weights"].sum(-1)), rtol=1e-5)
    found = applied(losses.on_features(by_mask, FEATURES), x)[0]  # a weight for each example: all positions count
    np.testing.assert_allclose(found, average(np.square(x[0] - x[1]).sum((1, 2)) / T), rtol=1e-5)


class Named:
    features = ("a",)


def test_what_a_partial_has_bound_stays():
    fn = lambda s, t, labels: jnp.sum(jnp.square(s - t), axis=-1) * labels
    bound = functools.partial(fn, labels=jnp.full(B, 100))
    gap = np.square(LOGITS[0] - LOGITS[1]).sum(-1)
    np.testing.assert_allclose(applied(losses.on_logits(bound))[0], 100 * average(gap), rtol=1e-5)
    np.testing.assert_allclose(applied(losses.on_logits(fn))[0], average(gap * LABELS), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: losses.on_features(distill.vid, FEATURES), "vid cannot be called .* 'log_variance'; give arguments by name"),
        (lambda: losses.on_features(distill.review_kd, FEATURES, together=True), "review_kd cannot be called .* 'fusion'"),
        (lambda: losses.on_logits(lambda s: s), "cannot be called with what student and teacher give: too many"),
        (lambda: losses.on_features(distill.hint, {1: 2}), r"hint was given the layers {1: 2}; name them as"),
        (
            lambda: losses.on_features(distill.vid, FEATURES, trained={"log_variance": 3}),
            "'log_variance' as 3; give a",
        ),
        (
            lambda: losses.on_features(distill.vid, FEATURES, trained={"log_variance": distill.vid_variance}, log_variance=X[0]),
            "vid was given 'log_variance' twice",
        ),
        (
            lambda: applied(losses.on_features(distill.rkd, FEATURES), (normal(B, 2, T, T),) * 2, batch=TOKENS),
            r"rkd compares items with the weights \[8, 3\], and a feature is \[8, 2, 3, 3\]",
        ),
        (
            lambda: distill.vocabulary.dkd((X[0], X[0][:5, :1], None), (X[1], X[1][:5, :1], None), LABELS),
            "heads have 1 class",
        ),
        (lambda: losses.on_features(distill.hint, ["a"]), r"hint was given the layers \['a'\]; name them as"),
        (lambda: losses.on_features(distill.hint, distill.auto).bind(Named, Named), "the layers of hint are no map of"),
        (lambda: losses.on_features(distill.hint, lambda s, t: None).bind(Named, Named), "the layers of hint are no map of"),
        (lambda: distill.crd_term({"a": "a"}, examples=9), "crd: a feature is {'a': 'a'}; give the names"),
        (lambda: distill.crd_term("b", "a", examples=9).bind(Named, Named), "the student has no feature 'b'; the nearest are a"),
        (lambda: applied(losses.on_logits(lambda s, t: None)), "returned NoneType; expected an array"),
        (lambda: losses.on_logits(lambda s, t, mask: s), "takes an argument 'mask', and here there is none"),
        (lambda: losses.on_head(lambda s, t, weights, chunks: s), "takes an argument 'weights', and here there is none"),
        (lambda: losses.on_features(lambda s, t, weights, mask: s, FEATURES), "takes weights and mask"),
        (lambda: losses.on_features(lambda s, labels: s, FEATURES), "put them behind both networks'"),
        (lambda: losses.on_features(distill.rkd, FEATURES, distance=float("nan")), "distance of rkd is nan"),
        (lambda: losses.on_logits(distill.dkd, alpha=float("inf")), "alpha of dkd is inf; expected a finite number"),
        (
            lambda: applied(losses.on_logits(supervised), batch={**BATCH, "mix": WEIGHTS, "targets_b": LABELS}),
            "supervised relates examples by their labels, and each has two mixed ones",
        ),
    ],
)
def test_what_is_not_given_is_refused(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def with_nan(x, weights=WEIGHTS):
    return np.where((weights > 0).reshape(weights.shape + (1,) * (x.ndim - weights.ndim)), x, np.nan)


ON_LOGITS = (
    *(distill.kd, distill.soft_cross_entropy, distill.reverse_kl, distill.jsd, distill.skew_kl, distill.skew_reverse_kl),
    *(distill.tvd, distill.dkd, distill.dist, distill.logit_standardized_kd, distill.consistency),
)
ON_FEATURES = (distill.hint, distill.cosine, distill.similarity, distill.correlation, distill.rkd, distill.pkt, distill.crd)
TERMS = {
    **{fn.__name__: losses.on_logits(fn) for fn in ON_LOGITS},
    **{fn.__name__: losses.on_features(fn, FEATURES) for fn in ON_FEATURES},
    "bank": distill.crd_term("a", "a", examples=B, negatives=6, width=3),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_teacher_that_is_nan_on_padding_changes_neither_loss_nor_gradient(name):
    want, slopes = applied(TERMS[name])
    value, found = applied(TERMS[name], (X[0], with_nan(X[1])), (LOGITS[0], with_nan(LOGITS[1])))
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for a, b in zip(slopes, found):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)
        assert not b[WEIGHTS == 0].any()


@pytest.mark.parametrize(
    "fn", [distill.attention_relation, distill.value_relation, distill.attention_scores, distill.attention_transfer]
)
def test_positions_that_are_masked_may_be_nan(fn):
    mask = np.array([[1, 1, 0], [1, 1, 1]], bool)
    if fn is distill.attention_transfer:
        s, t = normal(2, T, 4), normal(2, T, 4)
        spoilt = lambda x: np.where(mask[..., None], x, np.nan)
    elif fn is distill.value_relation:
        s, t = normal(2, T, 2, 4), normal(2, T, 2, 4)
        spoilt = lambda x: np.where(mask[..., None, None], x, np.nan)
    else:
        s, t = normal(2, 2, T, T), normal(2, 2, T, T)
        spoilt = lambda x: np.where(mask[:, None, None] & mask[:, None, :, None], x, np.nan)
    by = jax.value_and_grad(lambda s, t: fn(s, t, mask), argnums=0)
    (want, slope), (value, found) = by(s, t), by(spoilt(s), spoilt(t))
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("fn", [distill.attention_relation, distill.value_relation, distill.attention_scores])
def test_a_teacher_that_is_nan_where_it_counts_is_no_lesson_learned(fn):
    shape = (2, T, 2, 4) if fn is distill.value_relation else (2, 2, T, T)
    assert np.isnan(fn(normal(*shape), np.full(shape, np.nan, np.float32)))


def test_labels_beyond_the_classes_have_no_virtual_teacher():
    found = distill.label_smoothing_teacher(LOGITS[0], np.array([-1, C, 0, 1, 2, 3, 0, -100]))
    np.testing.assert_array_equal(np.isnan(found), [True, True, *[False] * 5, True])


def test_classes_that_both_mask_take_no_part_in_dist():
    masked = [np.concatenate([x, np.full((B, 3), -np.inf, np.float32)], -1) for x in LOGITS]
    np.testing.assert_allclose(distill.dist(*masked, temperature=2.0), distill.dist(*LOGITS, temperature=2.0), rtol=1e-5)
    q, p = (softmax(x.astype(np.float64) / 2, -1) for x in LOGITS)
    r = lambda a, b: np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b)])
    np.testing.assert_allclose(distill.dist(*masked, temperature=2.0), 4 * (2 - r(q, p) - r(q.T, p.T)), rtol=1e-4)
