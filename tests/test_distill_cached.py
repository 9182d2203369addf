"""Losses on a teacher's top k and tail against NumPy float64, records against another decoder, the term on many devices."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from formulas import close

from bmjax import data, distill, losses, parallel
from bmjax.data.teacher_record import BATCH_KEY
from bmjax.distill.cached import LOSSES
from bmjax.models import Decoder, Plain
from bmjax.train import Problem, abstract_state, init_state, make_step

CLASSES = 11


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def lumped(p, indices):
    """Probabilities [..., k + 1]: the chosen classes, and the sum of the others one by one."""
    others = np.ones(p.shape, bool)
    np.put_along_axis(others, indices, False, axis=-1)
    return np.concatenate([np.take_along_axis(p, indices, -1), np.sum(p, -1, where=others, keepdims=True)], -1)


def relative(p, q):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0).sum(-1)


FORMULAS = {
    "kd": lambda p, q: relative(p, q),
    "soft_cross_entropy": lambda p, q: -np.where(p > 0, p * np.log(np.where(p > 0, q, 1)), 0).sum(-1),
    "reverse_kl": lambda p, q: relative(q, p),
    "jsd": lambda p, q: 2 * relative(p, (p + q) / 2) + 2 * relative(q, (p + q) / 2),
    "skew_kl": lambda p, q: relative(p, 0.1 * p + 0.9 * q),
    "skew_reverse_kl": lambda p, q: relative(q, 0.9 * p + 0.1 * q),
    "tvd": lambda p, q: np.abs(p - q).sum(-1) / 2,
}


@functools.cache
def logits(shape=(3, 4, CLASSES), scale=3.0):
    rng = np.random.default_rng(0)
    return [(scale * rng.normal(size=shape)).astype(np.float32) for _ in range(2)]


def top(t, k, temperature):
    """(classes, log-probabilities at a temperature, log of the rest), from float64."""
    indices = np.argsort(-t, -1, kind="stable")[..., :k]
    whole = lumped(softmax(t.astype(np.float64) / temperature), indices)
    with np.errstate(divide="ignore"):
        whole = np.log(whole)
    return indices, whole[..., :-1].astype(np.float32), whole[..., -1].astype(np.float32)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (4, 2.5), (CLASSES, 4.0)])
def test_losses_are_those_of_the_coarse_distributions(name, k, temperature):
    s, t = logits()
    teacher = top(t, k, temperature)
    p, q = (lumped(softmax(z.astype(np.float64) / temperature), teacher[0]) for z in (t, s))
    want = FORMULAS[name](p, q)
    square = 1 if name == "tvd" else temperature**2
    close(LOSSES[name](s, *teacher, temperature=temperature), square * want)
    close(LOSSES[name](s, *teacher, temperature=temperature, t_squared=False), want)


def test_the_bound_and_its_end():
    s, t = logits()
    values = [distill.cached_kd(s, *top(t, k, 2.0), 2.0) for k in (1, 3, 6, CLASSES)]
    whole = distill.kd(s, t, 2.0)
    assert all((a <= b + 1e-6).all() for a, b in zip(values, [*values[1:], whole]))
    np.testing.assert_allclose(values[-1], whole, rtol=1e-5, atol=1e-6)


def test_mass_elsewhere_is_seen():
    """The teacher is sure of two classes; the student has 1% there. Renormalised over the two, the loss would be 0."""
    p = np.array([0.6, 0.4, 0, 0])
    s = np.log(np.array([0.006, 0.004, 0.5, 0.49], np.float32))
    with np.errstate(divide="ignore"):
        loss = distill.cached_kd(s[None], np.array([[0, 1]]), np.log(p[None, :2]).astype(np.float32), np.log(p[None, 2:].sum(-1)))
    np.testing.assert_allclose(loss, [math.log(100)], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_slopes(dtype, temperature):
    """T (q - r): r is the teacher on its classes, and its tail spread as the student spreads it elsewhere."""
    s, t = logits()
    s = np.asarray(jnp.asarray(s, dtype).astype(jnp.float32))
    indices, *teacher = top(t, 4, temperature)
    q = softmax(s.astype(np.float64) / temperature)
    p, tail = np.exp(np.float64(teacher[0])), np.exp(np.float64(teacher[1]))
    r = q * (tail / lumped(q, indices)[..., -1])[..., None]
    np.put_along_axis(r, indices, p, -1)
    total = lambda s: distill.cached_kd(s, indices, *teacher, temperature).sum()
    found = jax.grad(total)(jnp.asarray(s, dtype))
    assert found.dtype == dtype
    close(np.asarray(found, np.float32), temperature * (q - r), rtol=1e-5 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize(("name", "k"), [("kd", 2), ("kd", 5), ("jsd", 2), ("soft_cross_entropy", 5)])
def test_extreme_logits(name, k):
    rows = [[1e4, -1e4, 0, 1, 2], [-1e4, 1e4, 1e4, -1e4, 0], [0, 0, 0, 0, 0], [1, -np.inf, 2, -np.inf, 3]]
    s = np.array(rows, np.float32)
    t = s[[1, 0, 0, 3]]
    layout = data.RecordLayout(k, 5, "float32", (1.0, 4.0))
    teacher = layout.unpack(layout.pack(jnp.asarray(t)), 4.0)
    values, slopes = jax.value_and_grad(lambda s: LOSSES[name](s, *teacher, temperature=4.0).sum())(s)
    assert np.isfinite(values)
    assert np.isfinite(slopes).all()
    one_by_one = LOSSES[name](s, *teacher, temperature=4.0)
    p, q = (lumped(softmax(z.astype(np.float64) / 4), np.asarray(teacher[0])) for z in (t, s))
    if name == "kd":
        want = relative(p, q)
        kept = np.isfinite(want)  # an underflow of float64, not of the loss
        close(one_by_one[kept], 16 * want[kept])


def test_items_do_not_touch_each_other():
    s, t = logits()
    teacher = top(t, 3, 1.0)
    other = np.concatenate([s[:1] + np.arange(CLASSES), s[1:]])
    a, b = (distill.cached_kd(x, *teacher) for x in (s, other))
    np.testing.assert_array_equal(a[1:], b[1:])
    np.testing.assert_allclose(distill.cached_kd(s[:1], *(x[:1] for x in teacher)), a[:1], rtol=1e-6)
    assert (a[0] != b[0]).all()


def test_no_float32_copy_of_the_logits():
    n, c, k = 64, 8192, 16
    shapes = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (((n, c), "float32"), ((n, k), "int32"), ((n, k), "float32"), ((n,), "float32"))
    ]
    compiled = jax.jit(jax.grad(lambda *x: distill.cached_kd(*x, 2.0).sum())).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * 4 * n * c


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": np.zeros((3, 4), int)}, "classes are [3, 4] for logits [3, 4, 11]"),
        ({"tail": np.zeros((3, 1))}, "its tail [3, 1]"),
        ({"log_probs": np.zeros((3, 4, 1))}, "log-probabilities are [3, 4, 1]"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
    ],
)
def test_refusals(change, message):
    s, t = logits()
    indices, log_probs, tail = top(t, 3, 1.0)
    given = {"indices": indices, "log_probs": log_probs, "tail": tail, **change}
    if "indices" in change:
        given |= {"log_probs": np.zeros((3, 4)), "tail": np.zeros(3)}
    with pytest.raises(ValueError, match=re.escape(message)):
        distill.cached_kd(s, **given)


# Records


def decoded(layout, records):
    """A record's (values, tails, classes) by NumPy alone, from the bytes."""
    records = np.asarray(records)
    raw = records.reshape(-1, layout.words).astype("<i4").view(np.uint8)
    size = 2 if layout.values == "bfloat16" else 4
    values = raw[:, : layout.k * size].copy()
    wide = values.view("<f4") if size == 4 else (values.view("<u2").astype(np.uint32) << 16).view("<f4")
    first = -(-layout.k * size // 4) * 4
    tails = raw[:, first : first + 4 * len(layout.temperatures)].copy().view("<f4")
    bits = np.unpackbits(raw[:, first + tails.shape[1] * 4 :], axis=1, bitorder="little")[:, : layout.k * layout.bits]
    classes = bits.reshape(len(raw), layout.k, layout.bits).astype(np.int64) @ (1 << np.arange(layout.bits))
    return [part.reshape(*records.shape[:-1], -1) for part in (wide, tails, classes)]


@pytest.mark.parametrize(("vocabulary", "k", "values"), [(2, 1, "float32"), (11, 11, "bfloat16"), (1000, 7, "bfloat16")])
def test_records(vocabulary, k, values):
    rng = np.random.default_rng(1)
    t = (4 * rng.normal(size=(2, 5, vocabulary))).astype(np.float32)
    t[0, 0] = 0  # ties go to the lower class
    layout = data.RecordLayout(k, vocabulary, values, (1.0, 3.0))
    records = jax.jit(layout.pack)(t)
    assert records.shape == (2, 5, layout.words)
    found, tails, classes = decoded(layout, records)
    indices = np.argsort(-t, -1, kind="stable")[..., :k]
    np.testing.assert_array_equal(classes, indices)
    log_p = np.log(softmax(t.astype(np.float64)))
    np.testing.assert_allclose(
        found, np.take_along_axis(log_p, indices, -1), rtol=2**-8 if values == "bfloat16" else 1e-5, atol=1e-5
    )
    others = np.ones(t.shape, bool)
    np.put_along_axis(others, indices, False, axis=-1)
    for place, temperature in enumerate((1.0, 3.0)):
        rest = np.sum(np.exp(log_p / temperature), -1, where=others)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(tails[..., place], np.log(rest), rtol=1e-4, atol=1e-5)
        mine = layout.unpack(records, temperature)
        np.testing.assert_array_equal(mine[0], indices)
        unnormalised = np.concatenate([np.exp(found.astype(np.float64) / temperature), np.exp(tails[..., place : place + 1])], -1)
        want = unnormalised / unnormalised.sum(-1, keepdims=True)
        np.testing.assert_allclose(np.exp(np.concatenate([mine[1], mine[2][..., None]], -1)), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("values", "rtol"), [("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_classes_cached_are_kd(values, rtol, temperature):
    s, t = logits()
    layout = data.RecordLayout(CLASSES, CLASSES, values, (1.0, 3.0))
    teacher = layout.unpack(layout.pack(jnp.asarray(t)), temperature)
    want = distill.kd(s, t, temperature)
    np.testing.assert_allclose(distill.cached_kd(s, *teacher, temperature), want, rtol=rtol, atol=rtol * float(want.max()))


def test_a_record_is_small():
    """k = 64 of 128k classes: 128 bytes of values, 136 of classes, 4 for each temperature; the limit is 300."""
    assert data.RecordLayout(64, 1 << 17, temperatures=(1.0, 2.0, 4.0)).words * 4 == 128 + 136 + 12
    assert data.RecordLayout(64, 1 << 17).bits == 17
    assert data.RecordLayout(64, (1 << 17) + 1).bits == 18


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.RecordLayout(12, 11), "k is 12; expected 1 to 11"),
        (lambda: data.RecordLayout(0, 11), "k is 0"),
        (lambda: data.RecordLayout(1, 11, "float16"), "values is 'float16'"),
        (lambda: data.RecordLayout(1, 11, temperatures=()), "temperatures is ()"),
        (lambda: data.RecordLayout(1, 11, temperatures=(1.0, 1.0)), "each once"),
        (lambda: data.RecordLayout(1, 11, temperatures=(-1.0,)), "temperature is -1.0"),
        (lambda: data.RecordLayout(1, 11).pack(jnp.zeros((2, 12))), "12 classes and the records are of 11"),
        (lambda: data.RecordLayout(1, 11).unpack(jnp.zeros((2, 9), jnp.int32)), "9 words wide"),
        (
            lambda: losses.on_cached(distill.cached_kd, data.RecordLayout(1, 11), temperature=2.0),
            "2 and the cached outputs have the tail of 1;",
        ),
        (lambda: losses.on_cached(distill.cached_kd, data.RecordLayout(1, 11), t_sqared=False), "takes no argument 't_sqared'"),
        (lambda: losses.on_cached(distill.cached_kd, data.RecordLayout(1, 11), math.inf), "weight of cached_kd is inf"),
    ],
)
def test_what_cannot_be_cached(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# Terms


def objective(layout, temperature=2.0):
    return {
        "ce": (0.3, losses.cross_entropy_term()),
        "kd": (0.7, losses.on_cached(distill.cached_kd, layout, temperature=temperature)),
    }


@functools.cache
def example(kind):
    """(model, batch of 16 with uneven weights, the teacher's logits, the layout)."""
    rng = np.random.default_rng(2)
    if kind == "tokens":
        layout, model = (
            data.RecordLayout(5, 32, "float32", (1.0, 2.0)),
            Decoder(layers=1, width=16, heads=2, neurons=16).build((6,), 32),
        )
        inputs, shape = rng.integers(0, 32, (16, 6)).astype(np.int32), (16, 6)
        weights = (rng.random(shape) < np.linspace(0.1, 1, 16)[:, None]).astype(np.float32)
    else:
        layout, model = data.RecordLayout(3, CLASSES, "float32", (1.0, 2.0)), Plain(hidden=(8,)).build((6,), CLASSES)
        inputs, shape = rng.normal(size=(16, 6)).astype(np.float32), (16,)
        weights = np.where(np.arange(16) < 5, 0, 1 + np.arange(16) % 3).astype(np.float32)
    t = (3 * rng.normal(size=(*shape, layout.vocabulary))).astype(np.float32)
    batch = {
        "inputs": inputs,
        "targets": rng.integers(0, layout.vocabulary, shape).astype(np.int32),
        "weights": weights,
        "id": np.arange(16, dtype=np.int32),
        BATCH_KEY: np.asarray(layout.pack(jnp.asarray(t))),
    }
    return model, batch, t, layout


def updated(kind, mesh, devices):
    """(the loss, parameters before and after a step of SGD)."""
    model, batch, _, layout = example(kind)
    problem = Problem(model, objective(layout), optax.sgd(1.0))
    mesh = parallel.make_mesh(mesh, jax.devices()[:devices])
    state = init_state(problem, mesh, model.rules, jax.random.key(0), batch)
    before = jax.tree.map(np.array, jax.device_get(state.params["model"]))
    state, metrics = make_step(problem, mesh, state)(state, None, batch)
    return float(metrics["loss"]), before, jax.device_get(state.params["model"])


@functools.cache
def alone(kind):
    return updated(kind, "data=1", 1)


@pytest.mark.parametrize(("kind", "mesh"), [("classes", "data=8"), ("tokens", "data=4,tensor=2")])
def test_devices_agree(kind, mesh):
    loss, _, params = updated(kind, mesh, 8)
    expected, _, one = alone(kind)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params, one)


@pytest.mark.parametrize("kind", ["classes", "tokens"])
def test_the_term_is_the_weighted_mean(kind):
    model, batch, t, layout = example(kind)
    found, params, _ = alone(kind)
    s = np.asarray(model.apply(params, {}, batch)[0].logits, np.float64)
    indices = np.argsort(-t, -1, kind="stable")[..., : layout.k]
    p, q = (lumped(softmax(z.astype(np.float64) / 2), indices) for z in (t, s))
    hard = -np.log(np.take_along_axis(softmax(s), batch["targets"][..., None], -1))[..., 0]
    want = np.average(0.3 * hard + 0.7 * 4 * relative(p, q), weights=batch["weights"])
    np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({BATCH_KEY: None}, "the batch has none; take the split from TeacherCache.beside(split)"),
        ({BATCH_KEY: np.zeros((16, 3), np.int32)}, "cached outputs are [16, 3], of 11 classes, for logits [16, 11]"),
    ],
)
def test_batches_that_do_not_fit(change, message):
    model, batch, _, layout = example("classes")
    batch = {key: value for key, value in {**batch, **change}.items() if value is not None}
    problem = Problem(model, objective(layout), optax.sgd(1.0))
    mesh = parallel.make_mesh("data=1", jax.devices()[:1])
    state = abstract_state(problem, mesh, model.rules, jax.random.key(0), batch)
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(make_step(problem, mesh, state), state, None, batch)


def test_the_objective_of_a_config():
    layout = data.RecordLayout(3, CLASSES, temperatures=(1.0, 2.0))
    settings = distill.Distill(share=0.75, temperature=2.0)
    terms = distill.cached_terms(settings, losses.cross_entropy_term(), layout)
    assert {name: weight for name, (weight, _) in terms.items()} == {"ce": 0.25, "kd": 0.75}
    changes = {
        "hint_weight": (1.0, "hint_weight is above 0"),
        "loss": ("dkd", "the loss dkd needs all of the teacher's logits"),
        "temperature": (3.0, "temperature is 3"),
        "temperature_end": (1.0, "temperature_end changes"),
    }
    for name, (value, message) in changes.items():
        with pytest.raises(ValueError, match=message):
            distill.cached_terms(dataclasses.replace(settings, **{name: value}), losses.cross_entropy_term(), layout, 10)
