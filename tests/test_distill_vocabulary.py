"""Losses fused with the head give what the plain ones give on logits, and whole logits never exist: on one device and on many."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.special import softmax

from benchmarks import distill_memory
from bmjax import distill, losses, parallel
from bmjax.distill import Distill
from bmjax.jobs import train as jobs
from bmjax.jobs.teachers import Teacher
from bmjax.losses import Chunks
from bmjax.models import Decoder
from bmjax.models.linen import LinenModel, classified
from bmjax.train import Problem, gradients, init_state, make_step
from bmjax.types import Context, Outputs

V, ITEMS = 37, (13,)  # both prime: no size of a tile divides them
ODD = Chunks(4, 7)
KD = distill.vocabulary.kd
LABELS = jnp.asarray(np.random.default_rng(7).integers(0, V, ITEMS)).at[:3].set(jnp.array([5, 20, 36]))
FUSED = {
    "kd": {"temperature": 3.0},
    "soft_cross_entropy": {"temperature": 2.0, "t_squared": False},
    "reverse_kl": {"temperature": 2.0},
    "jsd": {"beta": 0.3, "temperature": 2.0},
    "skew_kl": {"alpha": 0.2},
    "skew_reverse_kl": {"alpha": 0.2},
    "tvd": {},
    "dkd": {"alpha": 0.5, "beta": 2.0, "temperature": 3.0},
    "logit_standardized_kd": {"temperature": 1.5},
}


def head(seed, width, scale=1.0, items=ITEMS, classes=V, masked=()):
    rng = np.random.default_rng(seed)
    bias = rng.normal(size=classes)
    bias[list(masked)] = -np.inf
    shapes = rng.normal(size=(*items, width)), scale * rng.normal(size=(width, classes)), bias
    return tuple(jnp.asarray(x, jnp.float32) for x in shapes)


def whole(head):
    """In halves, whose products float32 sums exactly in any order: at 1e4 the order alone would move logits by .001."""
    return tuple(jnp.round(2 * x) / 2 for x in head)


def logits(head):
    hidden, kernel, bias = head
    return jnp.matmul(hidden, kernel, precision="highest") + (0 if bias is None else bias)


def weights(items=ITEMS):
    return jnp.asarray(np.random.default_rng(5).uniform(0.1, 1, items), jnp.float32).at[0].set(0)


PAIRS = {  # (student, teacher), of other widths
    "ordinary": (head(0, 6), head(1, 4)),
    "masked by -inf": (head(2, 6, masked=(3, 35, 36)), head(3, 4, masked=(3, 35, 36))),
    "the student alone masks": (head(2, 6, masked=(3, 20, 36)), head(3, 4)),
    "the student has one class": (head(2, 6, masked=set(range(V)) - {5}), head(3, 4)),
    "the teacher has one class": (head(2, 6), head(3, 4, masked=set(range(V)) - {5})),
    "1e4": (whole(head(4, 6, 5e3)), whole(head(5, 4, 5e3))),
    "a tile of the teacher all masked": (head(6, 6), head(7, 4, masked=range(7, 15))),
}


@pytest.mark.parametrize("name", FUSED)
def test_values_and_gradients_are_those_of_the_plain_function(name):
    plain, fused, kw = getattr(distill, name), getattr(distill.vocabulary, name), FUSED[name]

    def by(fn):
        def total(student, teacher):
            values = fn(student, teacher)
            return jnp.sum(jnp.where(weights() > 0, weights() * values, 0)), values

        return jax.jit(jax.value_and_grad(total, has_aux=True))

    more = {"labels": LABELS} if name == "dkd" else {}
    one = by(lambda s, t: plain(logits(s), logits(t), **more, **kw))
    other = by(lambda s, t: fused(s, t, chunks=ODD, **more, **kw))
    for case, pair in PAIRS.items():
        ((_, want), slopes), ((_, got), found) = one(*pair), other(*pair)
        assert np.isfinite(want).all(), case
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=case)
        for a, b in zip(slopes, found):
            assert b.dtype == a.dtype and np.isfinite(b).all()
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * max(1, np.abs(a).max()), err_msg=case)


def test_logits_that_are_all_alike_are_divided_by_1():
    hidden, kernel, bias = head(0, 6)
    flat, teacher = (0 * hidden, kernel, 0 * bias + 5.3), head(1, 4)
    np.testing.assert_array_equal(losses.head_deviation(flat, ODD), np.float32(1))
    slopes = [
        jax.jit(jax.grad(lambda s, fn=fn: fn(s).sum()))(flat)
        for fn in (
            lambda s: distill.logit_standardized_kd(logits(s), logits(teacher)),
            lambda s: distill.vocabulary.logit_standardized_kd(s, teacher, chunks=ODD),
        )
    ]
    for want, got in zip(*slopes):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6 * np.abs(want).max())


def test_the_deviation_in_numpy():
    masked = head(2, 6, masked=(3, 35, 36))
    hidden, kernel, bias = (np.asarray(x, np.float64) for x in masked)
    keep = np.isfinite(bias)
    z = hidden @ kernel[:, keep] + bias[keep]
    fn = lambda h: losses.head_deviation(h, ODD)
    value, pull = jax.vjp(fn, masked)
    np.testing.assert_allclose(value, z.std(-1), rtol=1e-5)
    dz = (z - z.mean(-1, keepdims=True)) / (z.std(-1, keepdims=True) * keep.sum()) * np.asarray(weights(), np.float64)[:, None]
    (dh, dk, db) = pull(weights())[0]
    np.testing.assert_allclose(dh, dz @ kernel[:, keep].T, atol=1e-5)
    np.testing.assert_allclose(dk[:, keep], hidden.T @ dz, atol=1e-5)
    np.testing.assert_allclose(db[keep], dz.sum(0), atol=1e-5)
    assert (np.asarray(dk)[:, ~keep] == 0).all()


@pytest.mark.parametrize("name", ["dkd", "logit_standardized_kd"])
def test_what_an_ignored_token_holds_reaches_no_gradient(name):
    fused, more = getattr(distill.vocabulary, name), {"labels": LABELS.at[0].set(-100)} if name == "dkd" else {}
    student, teacher = PAIRS["ordinary"]

    def slopes(student):
        values = lambda s: losses.on_head(fused, chunks=ODD).apply(
            CTX, outputs(s), outputs(teacher), {"weights": weights(), "targets": more.get("labels", LABELS)}
        )
        return jax.jit(jax.grad(lambda s: values(s).total))(student)

    want, got = slopes(student), slopes((student[0].at[0].set(jnp.nan), *student[1:]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6), want, got)
    assert all(np.isfinite(x).all() for x in want)


def test_dkd_without_other_classes_is_zero():
    student, teacher = (head(seed, 3, masked=tuple(set(range(V)) - {5})) for seed in (0, 1))
    labels = jnp.full(ITEMS, 5)
    values, pull = jax.vjp(lambda s: distill.vocabulary.dkd(s, teacher, labels, chunks=ODD), student)
    np.testing.assert_allclose(values, 0, atol=1e-6)
    assert all(np.abs(np.asarray(x)).max() < 1e-5 for x in pull(jnp.ones(ITEMS))[0])


def test_kd_and_its_gradient_in_numpy():
    student, teacher = PAIRS["ordinary"]
    h, k, b = (np.asarray(x, np.float64) for x in student)
    p, q = (softmax(np.asarray(z, np.float64) / 2, -1) for z in (logits(teacher), h @ k + b))
    w = np.asarray(weights(), np.float64)
    fn = lambda s: jnp.sum(weights() * distill.vocabulary.kd(s, teacher, 2.0, chunks=ODD))
    value, (dh, dk, db) = jax.jit(jax.value_and_grad(fn))(student)
    np.testing.assert_allclose(value, 4 * (w * (p * np.log(p / q)).sum(-1)).sum(), rtol=1e-5)
    dz = w[:, None] * 2 * (q - p)
    np.testing.assert_allclose(dh, dz @ k.T, atol=1e-5)
    np.testing.assert_allclose(dk, h.T @ dz, atol=1e-5)
    np.testing.assert_allclose(db, dz.sum(0), atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_plain_one(smoothing):
    labels = jnp.asarray(np.random.default_rng(0).integers(0, V, ITEMS))

    def by(fn):
        return jax.jit(jax.value_and_grad(lambda s: jnp.sum(weights() * fn(s))))

    one = by(lambda s: losses.cross_entropy(logits(s), labels, smoothing))
    other = by(lambda s: losses.head_cross_entropy(s, labels, smoothing, ODD))
    for case in ("ordinary", "1e4"):
        student = PAIRS[case][0]
        (want, slopes), (got, found) = one(student), other(student)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        for a, b in zip(slopes, found):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * max(1, np.abs(a).max()), err_msg=case)


def test_a_masked_class_is_no_target_and_changes_nothing():
    open_, masked = head(2, 6), head(2, 6, masked=(3, 35, 36))
    labels = jnp.full(ITEMS, 36).at[1:].set(5)
    values, wrong = jax.jit(
        lambda: (
            losses.head_cross_entropy(masked, labels, chunks=ODD),
            losses.head_cross_entropy(open_, jnp.array([-1, V] + [0] * 11), chunks=ODD),
        )
    )()
    assert values[0] == math.inf and np.isfinite(values[1:]).all()
    kept = np.delete(np.asarray(logits(open_)), (3, 35, 36), -1)
    np.testing.assert_allclose(values[1:], losses.cross_entropy(kept, labels - 1)[1:], rtol=1e-5)
    assert np.isnan(wrong[:2]).all() and np.isfinite(wrong[2:]).all()


@pytest.mark.parametrize(
    ("items", "chunks"),
    [
        ((2, 3), Chunks(1, 1)),
        ((), Chunks(1, 1)),
        ((2, 3), Chunks(4, 12, 4)),
        ((12,), Chunks(5, 9, 9)),
        ((1, 5), Chunks(2, 300, 7)),
    ],
)
def test_any_number_of_tokens_classes_and_partitions(items, chunks):
    classes = 300 if chunks.classes == 300 else 36
    student, teacher = head(0, 3, items=items, classes=classes), head(1, 2, items=items, classes=classes)
    loss = lambda fn: jax.value_and_grad(lambda s: fn(s).sum())(student)
    want, got = (
        jax.jit(lambda fn=fn: loss(fn))()
        for fn in (
            lambda s: distill.tvd(logits(s), logits(teacher)),
            lambda s: distill.vocabulary.tvd(s, teacher, chunks=chunks),
        )
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6), want, got)


def test_tiles_cover_every_token_and_class_once_and_are_few():
    sizes = losses.tiles.plan(4096, 50257, Chunks())
    assert (sizes.rounds, sizes.steps, sizes.size) == (4, 7, 7296)  # 7 of 7180 would do; rounded up to whole lanes of 128
    assert losses.tiles.plan(8 * 509, 128000, Chunks(1024, 8192, 8))[1:4] == (4, 8, 16000)
    seen = np.zeros(50257, int)
    for i in range(sizes.steps):
        tile = losses.tiles._where(sizes, i)
        np.add.at(seen, np.asarray(tile.classes[0])[np.asarray(tile.fresh)], 1)
    assert (seen == 1).all()
    x = jnp.arange(13.0)
    uneven = losses.tiles.plan(13, 7, Chunks(4, 7))
    assert losses.tiles.split(uneven, x).shape == (4, 4)
    np.testing.assert_array_equal(losses.tiles.join(uneven, losses.tiles.split(uneven, x)), x)
    with pytest.raises(ValueError, match="expected numbers above 0"):
        losses.tiles.plan(13, 7, Chunks(0, 7))


def test_no_bias_bfloat16_and_a_divergence_of_ones_own():
    student, teacher = ((*(x.astype(jnp.bfloat16) for x in head(seed, 4)[:2]), None) for seed in (0, 1))
    square = lambda log_s, log_t: jnp.exp(log_t) * (log_s - log_t) ** 2

    def plain(student):
        s, t = (jax.nn.log_softmax(logits(jax.tree.map(jnp.float32, h)) / 2) for h in (student, teacher))
        return jnp.sum(weights() * square(s, t).sum(-1))

    fused = lambda s: jnp.sum(weights() * losses.head_divergence(square, s, teacher, 2.0, ODD))
    want, got = jax.jit(lambda s: (jax.value_and_grad(plain)(s), jax.value_and_grad(fused)(s)))(student)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)  # the logits are float32 in both
    for a, b in zip(want[1][:2], got[1][:2]):
        assert a.dtype == b.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(b), np.float32(a), atol=0.01 * np.abs(np.float32(a)).max())
    assert got[1][2] is None


@pytest.mark.parametrize("sizes", [(128, 16, 256), (2048, 128, 300), (13, 7, 43)])
def test_the_kernels_gradient_alone_in_bfloat16(sizes):
    """The CPU's compiler has no kernel for some products of bfloat16 with a sum in float32."""
    n, d, v = sizes
    rng = np.random.default_rng(0)
    low = lambda *shape: jnp.asarray(rng.normal(size=shape) / d**0.5, jnp.bfloat16)
    hidden, kernel, teacher = low(n, d), low(d, v), (low(n, d), low(d, v), None)
    full = jax.tree.map(jnp.float32, (hidden, kernel, teacher))
    labels = jnp.asarray(rng.integers(0, v, n))
    for fused, plain in (
        (lambda k, h, t: distill.vocabulary.kd((h, k, None), t), lambda k, h, t: distill.kd(h @ k, t[0] @ t[1])),
        (lambda k, h, t: losses.head_cross_entropy((h, k, None), labels), lambda k, h, t: losses.cross_entropy(h @ k, labels)),
    ):
        found = jax.jit(jax.grad(lambda k, fused=fused: fused(k, hidden, teacher).mean()))(kernel)
        want = jax.grad(lambda k, plain=plain: plain(k, full[0], full[2]).mean())(full[1])
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(found), want, atol=0.02 * np.abs(want).max())


def test_the_teacher_has_no_gradient_and_padding_may_hold_nan():
    student, teacher = PAIRS["ordinary"]
    poisoned = (student[0].at[0].set(jnp.nan), *student[1:])
    loss = lambda s, t: jnp.sum(jnp.where(weights() > 0, weights() * KD(s, t, chunks=ODD), 0))
    slopes = jax.jit(jax.grad(loss, (0, 1)))
    grads, nothing = slopes(poisoned, teacher)
    assert all(np.isfinite(x).all() for x in grads) and any(np.abs(x).max() > 0 for x in grads)
    assert all((np.asarray(x) == 0).all() for x in nothing)
    want, _ = slopes((student[0].at[0].set(1.0), *student[1:]), teacher)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-6), want, grads)


def largest(jaxpr):
    """Elements of the largest array that is computed, wherever in the program."""
    found = [math.prod(var.aval.shape) for eqn in jaxpr.eqns for var in eqn.outvars if hasattr(var.aval, "shape")]
    inner = [largest(sub) for eqn in jaxpr.eqns for sub in jax.core.jaxprs_in_params(eqn.params)]
    return max([0, *found, *inner])


@pytest.mark.parametrize("name", [*FUSED, "cross_entropy"])
def test_no_array_of_tokens_by_classes_is_computed(name):
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    given = (shape(8, 512, 16), shape(16, 50257), shape(50257))
    targets = jax.ShapeDtypeStruct((8, 512), jnp.int32)
    size = lambda fn: largest(jax.make_jaxpr(jax.grad(lambda s, t, y: fn(s, t, y).sum()))(given, given, targets).jaxpr)
    assert size(distill_memory.plain(name)) == 8 * 512 * 50257
    assert size(distill_memory.fused(name, Chunks())) <= 8192 * 1024


@pytest.mark.parametrize("name", ["kd", "cross_entropy"])
def test_temporaries_are_below_an_eighth(name):
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    given = (shape(8, 512, 512), shape(512, 131072), shape(131072))
    targets = jax.ShapeDtypeStruct((8, 512), jnp.int32)
    forms = (distill_memory.plain(name), distill_memory.fused(name, Chunks()))
    plain, fused = (distill_memory.temporaries(fn, False, given, targets) for fn in forms)
    assert fused < plain / 8


def test_a_partitioned_vocabulary_stays_where_it_is():
    mesh, classes = parallel.make_mesh("data=2,tensor=4"), 512
    student, teacher = (head(seed, 16, items=(8, 12), classes=classes) for seed in (0, 1))
    labels = np.random.default_rng(0).integers(0, classes, (8, 12))

    def loss(chunks, student, teacher, labels):
        if chunks is None:
            s, t = logits(student), logits(teacher)
            values = (distill.kd(s, t), distill.dkd(s, t, labels), distill.logit_standardized_kd(s, t))
            return jnp.mean(sum(values) + losses.cross_entropy(s, labels))
        fused, how = distill.vocabulary, {"chunks": chunks}
        values = KD(student, teacher, **how), fused.dkd(student, teacher, labels, **how)
        values += (fused.logit_standardized_kd(student, teacher, **how),)
        return jnp.mean(sum(values) + losses.head_cross_entropy(student, labels, **how))

    place = lambda *spec: NamedSharding(mesh, P(*spec))
    layout = (place("data"), place(None, "tensor"), place("tensor"))

    def compiled(parts):
        fn = jax.value_and_grad(functools.partial(loss, Chunks(24, 128, parts)))
        given = (layout, layout, place("data"))
        return jax.jit(fn, in_shardings=given, out_shardings=(place(), layout)).lower(student, teacher, labels).compile()

    moved = lambda text: re.findall(r"= \(?(?:f32|bf16)\[([\d,]+)\][^=]* (?:all-gather|all-to-all|collective-permute)", text)
    stays = compiled(4)
    assert moved(stays.as_text()) == []
    assert any(
        shape.startswith("16,") for shape in moved(compiled(1).as_text())
    )  # where the partition is not known it is gathered
    want = jax.jit(jax.value_and_grad(functools.partial(loss, None)))(student, teacher, labels)
    got = stays(*jax.device_put((student, teacher, labels), (layout, layout, place("data"))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6), want, got)


# In the step

B, T, CLASSES = 8, 6, 224
PLAIN = {
    "ce": (0.5, losses.cross_entropy_term(0.1)),
    "kd": (0.5, losses.on_logits(distill.kd, temperature=2.0)),
    "dkd": (0.1, losses.on_logits(distill.dkd, beta=2.0)),
    "standardised": (0.1, losses.on_logits(distill.logit_standardized_kd)),
}
TILES = Chunks(5, 50)
CHUNKED = {
    "ce": (0.5, losses.cross_entropy_term(0.1, chunks=TILES)),
    "kd": (0.5, losses.on_head(KD, chunks=TILES, temperature=2.0)),
    "dkd": (0.1, losses.on_head(distill.vocabulary.dkd, chunks=TILES, beta=2.0)),
    "standardised": (0.1, losses.on_head(distill.vocabulary.logit_standardized_kd, chunks=TILES)),
}
PLACES = [("data=8", "replicated"), ("data=2,fsdp=2,tensor=2", "partitioned"), ("data=4,tensor=2", "hybrid")]


class Small(nn.Module):
    """inputs [B, T] int -> logits [B, T, CLASSES]."""

    width: int
    features, axes, rules = (), {}, (("head/kernel", ("fsdp", "tensor")), ("embed/embedding", (None, "tensor")), (".*", ()))

    @nn.compact
    def __call__(self, batch, train=False, capture=()):
        x = nn.tanh(nn.Dense(self.width, name="up")(nn.Embed(CLASSES, self.width, name="embed")(batch["inputs"])))
        return classified(self, x, CLASSES, {}, ())


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CLASSES, (2, B, T)).astype(np.int32)
    weights = (rng.uniform(size=(B, T)) < 0.7).astype(np.float32)
    weights[2:4] = 0  # a device of padding alone
    return {"inputs": tokens[0], "targets": tokens[1], "weights": weights, "id": np.arange(B, dtype=np.int32)}


NETWORKS = LinenModel(Small(8)), LinenModel(Small(10))


def two_steps(terms, spec, executor, models=NETWORKS, **more):
    """(compiled step, metrics and parameters after it was taken twice)."""
    mesh, (student, teacher) = parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None), models
    problem = Problem(student, terms, optax.sgd(0.5), teacher=teacher, **more)
    params, kept = teacher.init(jax.random.key(1), batch())
    partner = jax.device_put({"params": params, "model_state": kept}, parallel.replicated(mesh))
    state = init_state(problem, mesh, student.rules, jax.random.key(0), batch(), frozen=partner)
    placed = parallel.put_batch(batch(), mesh)
    step = make_step(problem, mesh, state, executor).lower(state, partner, placed).compile()
    for _ in range(2):
        state, metrics = step(state, partner, placed)
    return step, jax.device_get((metrics, state.params["model"]))


def whole_logits(step, rows, classes):
    """Arrays of a device's logits in the program that it runs."""
    return re.findall(rf"f32\[(?:{rows},{T}|{rows * T}),{classes}\]", step.as_text())


@functools.cache
def alone():
    step, found = two_steps(PLAIN, "data=1", "partitioned")
    assert whole_logits(step, B, CLASSES)
    return found


@pytest.mark.parametrize(("spec", "executor"), PLACES)
def test_a_step_on_heads_is_the_step_on_logits(spec, executor):
    step, found = two_steps(CHUNKED, spec, executor)
    parts = parallel.make_mesh(spec).shape
    rows, classes = B // (parts["data"] * parts["fsdp"]), CLASSES // parts["tensor"]
    assert not whole_logits(step, rows, classes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5), alone(), found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "executor", "more"),
    [
        ("data=2,fsdp=2,tensor=2", "partitioned", {}),
        ("data=2,fsdp=2,tensor=2", "hybrid", {}),
        ("data=8", "pmap", {}),
        ("data=2,fsdp=2,tensor=2", "partitioned", {"accumulate": 2}),
        ("data=8", "replicated", {"gradient": gradients.clipped_per_example(1e6)}),
        ("data=4,tensor=2", "partitioned", {"gradient": gradients.clipped_per_example(1e6)}),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_decoders_in_every_executor(tied, spec, executor, more):
    config = functools.partial(Decoder, layers=2, heads=2, neurons=8, tied=tied, bias=True)
    models = [config(width=width).build((T,), CLASSES) for width in (8, 12)]
    (_, want), (_, got) = two_steps(PLAIN, "data=1", "auto", models), two_steps(CHUNKED, spec, executor, models, **more)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5), want, got)


# Terms

CTX = Context({}, None, jnp.int32(0), jax.random.key(0), lambda x: x, lambda x: x)


def outputs(head):
    return Outputs(logits(head), {}, head)


def values_of(term, student, teacher, batch):
    return losses.as_term(term).apply(CTX, student, teacher, batch)


def test_terms_weigh_items_and_mix_targets_as_those_on_logits():
    rng = np.random.default_rng(0)
    shape, class_weights = (4, 5), tuple(rng.uniform(size=V))
    student, teacher = (outputs(head(seed, 3, items=shape)) for seed in (0, 1))
    one = {"targets": rng.integers(0, V, shape), "targets_b": rng.integers(0, V, shape)}
    pairs = [
        (losses.on_logits(distill.kd, 0.5, temperature=2.0), losses.on_head(KD, 0.5, temperature=2.0, chunks=ODD)),
        (losses.on_logits(distill.dkd), losses.on_head(distill.vocabulary.dkd, chunks=ODD)),
        (losses.on_logits(in_words, 2.0), losses.on_head(losses.head_cross_entropy, 2.0, chunks=ODD)),
        tuple(losses.cross_entropy_term(0.1, class_weights, chunks) for chunks in (None, ODD)),
    ]

    @jax.jit
    def found(weights, mix):
        return [[values_of(term, student, teacher, {**one, "weights": weights, "mix": mix}) for term in pair] for pair in pairs]

    weights, mix = (jnp.asarray(rng.uniform(size=size), jnp.float32) for size in (shape, (4, 1)))
    for want, got in found(weights.at[0].set(0), mix):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    by_example = jnp.array([0.0, 1.0, 0.5, 2.0])  # counts for each position
    want, got = (values_of(term, student, teacher, {**one, "weights": by_example}) for term in pairs[0])
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert got.count == 5 * 3.5


def in_words(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]


def test_padding_at_the_end_of_a_vocabulary_is_cut_when_asked():
    student, teacher = head(0, 3, classes=30), head(1, 3, classes=V)
    one = {"weights": jnp.ones(ITEMS), "targets": jnp.zeros(ITEMS, int)}
    for maker, fn in ((losses.on_logits, distill.kd), (losses.on_head, KD)):
        with pytest.raises(ValueError, match=r"student has 30 classes and the teacher 37.*vocabulary=30 leaves that out"):
            values_of(maker(fn), outputs(student), outputs(teacher), one)
        with pytest.raises(ValueError, match="vocabulary is 31, and there are 30 classes; expected 1 to 30"):
            values_of(maker(fn, vocabulary=31), outputs(student), outputs(teacher), one)
        got = values_of(maker(fn, vocabulary=29), outputs(student), outputs(teacher), one)
        want = distill.kd(logits(student)[:, :29], logits(teacher)[:, :29]).sum()
        np.testing.assert_allclose(got.total, want, rtol=1e-5)
    s, t = distill.same_vocabulary(logits(student), logits(teacher), 30)
    np.testing.assert_array_equal(s, logits(student))
    np.testing.assert_array_equal(t, logits(teacher)[:, :30])
    with pytest.raises(ValueError, match="vocabulary is 37, and the student has 30 classes and the teacher 37"):
        distill.same_vocabulary(logits(student), logits(teacher), V)


def test_what_cannot_be_is_one_clear_line():
    student, teacher = PAIRS["ordinary"]
    one = {"weights": jnp.ones(ITEMS), "targets": jnp.zeros(ITEMS, int)}
    headless = Outputs(logits(student), {})
    for term in (losses.on_head(KD), losses.on_head(losses.head_cross_entropy), losses.cross_entropy_term(chunks=ODD)):
        with pytest.raises(ValueError, match=r"works on heads, and the student gives none; fill Outputs\.head"):
            values_of(term, headless, outputs(teacher), one)
    with pytest.raises(ValueError, match="works on heads, and the teacher gives none"):
        values_of(losses.on_head(KD), outputs(student), headless, one)
    with pytest.raises(ValueError, match="the term kd needs a teacher"):
        values_of(losses.on_head(KD), outputs(student), None, one)
    with pytest.raises(ValueError, match=r"kd takes no chunks.*take one such as distill\.vocabulary\.kd, or on_logits"):
        losses.on_head(distill.kd)
    with pytest.raises(ValueError, match="kd takes no argument 'beta'"):
        losses.on_head(KD, beta=0.5)
    for bad in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="temperature is"):
            losses.on_head(KD, temperature=bad)
        with pytest.raises(ValueError, match="temperature is"):
            KD(student, teacher, bad)
    with pytest.raises(ValueError, match="student has 37 classes and the teacher 30"):
        KD(student, head(0, 3, classes=30))
    with pytest.raises(ValueError, match=r"student's hidden is \[13, 6\] and the teacher's \[5, 3\]"):
        KD(student, head(0, 3, items=(5,)))
    with pytest.raises(ValueError, match=r"a head has hidden \[13, 6\], kernel \[4, 37\], bias \[37\]; expected"):
        KD((student[0], *teacher[1:]), teacher)
    with pytest.raises(ValueError, match=r"labels \[5\] for hidden \[13, 6\]"):
        losses.head_cross_entropy(student, jnp.zeros(5, int))
    with pytest.raises(ValueError, match=r"jsd: beta is 1\.5"):
        distill.vocabulary.jsd(student, teacher, beta=1.5)


def test_the_config_chooses_the_form():
    student, teacher = outputs(PAIRS["ordinary"][0]), outputs(PAIRS["ordinary"][1])
    one = {"weights": weights(), "targets": jnp.zeros(ITEMS, int)}
    blind = lambda found: found._replace(logits=jnp.full_like(found.logits, jnp.nan))
    plain, chunked = (Distill(loss="reverse_kl", chunked=on).terms(losses.Task(chunked=on).term()) for on in (False, True))
    assert plain.keys() == chunked.keys() == {"ce", "reverse_kl"}

    def found(student, teacher):
        pairs = ((plain, student, teacher), (chunked, blind(student), blind(teacher)))
        return [[values_of(term, s, t, one) for _, term in terms.values()] for terms, s, t in pairs]

    np.testing.assert_allclose(*found(student, teacher), rtol=1e-5)
    taught = Teacher(pretrained="a", distill=Distill(loss="reverse_kl", chunked=True))
    chunked = jobs.Config(teacher=taught).objective()[1]  # the one flag is enough
    np.testing.assert_allclose(*found(student, teacher), rtol=1e-5)
    with pytest.raises(ValueError, match="no chunked form of dist; set chunked to False, or take one of kd, dkd, logit_"):
        Distill(loss="dist", chunked=True).validate()
