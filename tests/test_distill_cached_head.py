"""Losses on a teacher's cached outputs, fused with the student's head: those on its logits, which never exist as a whole."""

import dataclasses
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

from bmjax import data, distill, losses, parallel
from bmjax.data.teacher_record import BATCH_KEY
from bmjax.distill.cached import HEAD_LOSSES, LOSSES
from bmjax.losses import Chunks
from bmjax.models.linen import LinenModel, classified
from bmjax.train import Problem, init_state, make_step
from bmjax.types import Context, Outputs

V, N, D, T = 37, 13, 6, 2.0  # 37 and 13 are prime: no size of a tile divides them
ODD = Chunks(4, 7)


def head(seed, scale=1.0, masked=()):
    rng = np.random.default_rng(seed)
    bias = rng.normal(size=V)
    bias[list(masked)] = -np.inf
    shapes = rng.normal(size=(N, D)), scale * rng.normal(size=(D, V)), bias
    return tuple(jnp.asarray(x, jnp.float32) for x in shapes)


def logits(head):
    hidden, kernel, bias = head
    return jnp.matmul(hidden, kernel, precision="highest") + (0 if bias is None else bias)


def weights():
    return jnp.asarray(np.random.default_rng(5).uniform(0.1, 1, N), jnp.float32).at[0].set(0)


def teacher_of(head, k):
    """(classes, log-probabilities, tail) at T, as a cache of float32 has them."""
    layout = data.RecordLayout(k, V, "float32", (T,))
    return layout.unpack(layout.pack(logits(head)), T)


CASES = {  # (student, teacher)
    "ordinary": (head(0), head(1)),
    "masked by -inf": (head(2, masked=(3, 35, 36)), head(3, masked=(3, 35, 36))),
    "1e4": (head(4, 5e3), head(5, 5e3)),
    "a tile all masked": (head(6, masked=range(7, 14)), head(7, masked=range(7, 14))),
    "sure of one class": (head(8, 60.0), head(8, 60.0)),
}


KEPT = {"kd": (1, V), "jsd": (V,), "tvd": (1,)}


@pytest.mark.parametrize(("name", "k"), [(name, k) for name in HEAD_LOSSES for k in KEPT.get(name, (5,))])
def test_values_and_gradients_are_those_on_logits(name, k):
    def by(fn):
        def total(student, *teacher):
            values = fn(student, *teacher)
            return jnp.sum(jnp.where(weights() > 0, weights() * values, 0)), values

        return jax.jit(jax.value_and_grad(total, has_aux=True))

    one = by(lambda s, *t: LOSSES[name](logits(s), *t, temperature=T))
    other = by(lambda s, *t: HEAD_LOSSES[name](s, *t, temperature=T, chunks=ODD))
    for case, (student, teacher) in CASES.items():
        cached = teacher_of(teacher, k)
        ((_, want), slopes), ((_, got), found) = one(student, *cached), other(student, *cached)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=case)
        assert np.isfinite(want).all(), case
        # A logit of 1e4 is known to 1e-3, and the backward pass, compiled for itself, may round it to the neighbour.
        tolerance = 2e-3 if case == "1e4" else 1e-5
        for a, b in zip(slopes, found):
            assert b.dtype == a.dtype and np.isfinite(b).all()
            np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance * max(1, np.abs(a).max()), err_msg=case)


def test_all_classes_are_the_whole_divergence():
    student, teacher = CASES["ordinary"]
    cached = teacher_of(teacher, V)
    want, got = jax.jit(
        lambda: (
            distill.vocabulary.kd(student, teacher, T, chunks=ODD),
            HEAD_LOSSES["kd"](student, *cached, temperature=T, chunks=ODD),
        )
    )()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_what_is_left_is_right_however_little_it_is():
    """In float64, with k classes that hold all but e^-20 of the mass; the whole less the k would be 0 in float32."""
    hidden, kernel, _ = head(0)
    z = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    classes = np.argsort(-z, -1)[:, :3]
    raised = np.zeros((N, V))
    np.put_along_axis(raised, classes, 25.0, -1)
    wide = (jnp.concatenate([hidden, jnp.asarray(raised, jnp.float32)], -1), jnp.concatenate([kernel, jnp.eye(V)]), None)
    found = jax.nn.log_softmax(losses.head_coarse(wide, jnp.asarray(classes), chunks=ODD))
    p = np.exp(z + raised - (z + raised).max(-1, keepdims=True))
    np.put_along_axis(rest := p.copy(), classes, 0, -1)
    np.testing.assert_allclose(found[:, -1], np.log(rest.sum(-1) / p.sum(-1)), rtol=1e-5)
    np.testing.assert_allclose(np.exp(found[:, :-1]), np.take_along_axis(p, classes, -1) / p.sum(-1, keepdims=True), rtol=1e-4)


def test_bfloat16_no_bias_and_no_such_class():
    student = (*(x.astype(jnp.bfloat16) for x in CASES["ordinary"][0][:2]), None)
    cached = teacher_of(CASES["ordinary"][1], 4)
    plain = lambda s: distill.cached_kd(logits(jax.tree.map(jnp.float32, s)), *cached, T)
    fused = lambda s: HEAD_LOSSES["kd"](s, *cached, T, chunks=ODD)
    slopes = lambda fn, s: jax.value_and_grad(lambda s: jnp.sum(weights() * fn(s)))(s)
    want, got = jax.jit(lambda s: (slopes(plain, s), slopes(fused, s)))(student)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(want[1][:2], got[1][:2]):
        assert b.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(b), np.float32(a), atol=0.01 * np.abs(np.float32(a)).max())
    wrong = losses.head_coarse(student, jnp.tile(jnp.array([V, -1, 5]), (N, 1)), chunks=ODD)
    assert np.isnan(wrong[:, :2]).all()


def largest(jaxpr):
    """Elements of the largest array that is computed, wherever in the program."""
    found = [math.prod(var.aval.shape) for eqn in jaxpr.eqns for var in eqn.outvars if hasattr(var.aval, "shape")]
    inner = [largest(sub) for eqn in jaxpr.eqns for sub in jax.core.jaxprs_in_params(eqn.params)]
    return max([0, *found, *inner])


def test_no_array_of_tokens_by_classes_is_computed():
    shape = lambda *axes, kind="float32": jax.ShapeDtypeStruct(axes, kind)
    given = (shape(8, 512, 16), shape(16, 50257), shape(50257))
    cached = (shape(8, 512, 64, kind="int32"), shape(8, 512, 64), shape(8, 512))
    size = lambda fn: largest(jax.make_jaxpr(jax.grad(lambda s, *t: fn(s, *t, 2.0).sum()))(given, *cached).jaxpr)
    assert size(lambda s, *t: distill.cached_kd(logits(s), *t)) >= 8 * 512 * 50257
    assert size(HEAD_LOSSES["kd"]) <= 8192 * 1024


def test_a_partitioned_vocabulary_stays_where_it_is():
    mesh, rng, classes = parallel.make_mesh("data=2,tensor=4"), np.random.default_rng(0), 512
    student = tuple(rng.normal(size=shape).astype(np.float32) for shape in ((8, 12, 16), (16, classes), (classes,)))
    layout = data.RecordLayout(9, classes, "float32", (T,))
    cached = layout.unpack(layout.pack(rng.normal(size=(8, 12, classes)).astype(np.float32)), T)
    place = lambda *spec: NamedSharding(mesh, P(*spec))
    heads, rows = (place("data"), place(None, "tensor"), place("tensor")), (place("data"),) * 3
    fused = lambda s, t: HEAD_LOSSES["kd"](s, *t, T, chunks=Chunks(24, 128, 4)).mean()
    fn = jax.jit(jax.value_and_grad(fused), in_shardings=(heads, rows), out_shardings=(place(), heads))
    compiled = fn.lower(student, cached).compile()
    moved = re.findall(r"= \(?\w+\[([\d,]+)\][^=]* (?:all-gather|all-to-all|collective-permute)", compiled.as_text())
    assert moved == []
    want = jax.jit(jax.value_and_grad(lambda s, t: distill.cached_kd(logits(s), *t, T).mean()))(student, cached)
    got = compiled(*jax.device_put((student, cached), (heads, rows)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6), want, got)


# In the step

ROWS, LENGTH, CLASSES = 8, 6, 224
LAYOUT = data.RecordLayout(5, CLASSES, "float32", (1.0, T))
TILES = Chunks(5, 50)
TASK = losses.cross_entropy_term(chunks=TILES)
PLACES = [("data=8", "replicated"), ("data=2,fsdp=2,tensor=2", "partitioned"), ("data=4,tensor=2", "hybrid")]


class Small(nn.Module):
    """inputs [B, T] int -> logits [B, T, CLASSES]."""

    features, axes, rules = (), {}, (("head/kernel", ("fsdp", "tensor")), ("embed/embedding", (None, "tensor")), (".*", ()))

    @nn.compact
    def __call__(self, batch, train=False, capture=()):
        x = nn.tanh(nn.Dense(8, name="up")(nn.Embed(CLASSES, 8, name="embed")(batch["inputs"])))
        return classified(self, x, CLASSES, {}, ())


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CLASSES, (2, ROWS, LENGTH)).astype(np.int32)
    weights = (rng.uniform(size=(ROWS, LENGTH)) < 0.7).astype(np.float32)
    weights[2:4] = 0  # devices of padding alone
    records = LAYOUT.pack(jnp.asarray(3 * rng.normal(size=(ROWS, LENGTH, CLASSES)), jnp.float32))
    names = ("inputs", "targets", "weights", "id", BATCH_KEY)
    return dict(zip(names, (*tokens, weights, np.arange(ROWS, dtype=np.int32), np.asarray(records))))


def stepped(chunked, spec, executor):
    """(compiled step, metrics and parameters after it was taken twice)."""
    mesh, model = parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None), LinenModel(Small())
    soft = losses.on_cached(distill.cached_kd, LAYOUT, temperature=T)
    if chunked:
        soft = losses.on_cached_head(HEAD_LOSSES["kd"], LAYOUT, temperature=T, chunks=TILES)
    terms = {"ce": (0.4, TASK), "kd": (0.6, soft)}
    problem = Problem(model, terms, optax.sgd(0.5))
    state = init_state(problem, mesh, model.rules, jax.random.key(0), batch())
    placed = parallel.put_batch(batch(), mesh)
    step = make_step(problem, mesh, state, executor).lower(state, None, placed).compile()
    for _ in range(2):
        state, metrics = step(state, None, placed)
    return step, jax.device_get((metrics, state.params["model"]))


def whole_logits(step, rows, classes):
    """Arrays of a device's logits in the program that it runs."""
    return re.findall(rf"f32\[(?:{rows},{LENGTH}|{rows * LENGTH}),{classes}\]", step.as_text())


@functools.cache
def alone():
    step, found = stepped(False, "data=1", "partitioned")
    assert whole_logits(step, ROWS, CLASSES)
    return found


@pytest.mark.parametrize(("spec", "executor"), PLACES)
def test_a_step_on_the_head_is_the_step_on_logits(spec, executor):
    step, found = stepped(True, spec, executor)
    parts = parallel.make_mesh(spec).shape
    rows, classes = ROWS // (parts["data"] * parts["fsdp"]), CLASSES // parts["tensor"]
    assert not whole_logits(step, rows, classes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5), alone(), found)


def test_chunked_beside_a_cache_reads_the_head_alone():
    """Which logits there are does not matter with `distill.chunked`, and without it the head does not."""
    student, context = CASES["ordinary"][0], Context({}, None, jnp.int32(0), jax.random.key(0), lambda x: x, lambda x: x)
    layout = data.RecordLayout(3, V, temperatures=(T,))
    one = {"weights": weights(), BATCH_KEY: layout.pack(logits(CASES["ordinary"][1]))}
    found = []
    for chunked, given in ((False, Outputs(logits(student), {})), (True, Outputs(jnp.full((N, V), jnp.nan), {}, student))):
        _, term = distill.cached_terms(distill.Distill(temperature=T, chunked=chunked), TASK, layout)["kd"]
        found.append(jax.jit(lambda term=term, given=given: term.apply(context, given, None, one))())
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    assert found[0].total > 0


def test_the_vocabulary_beside_a_cache():
    settings = distill.Distill(temperature=T)
    for chunked in (False, True):
        with pytest.raises(
            ValueError, match=r"^distill.vocabulary is 200 and the cached outputs are of 224 classes, .* leave it out$"
        ):
            distill.cached_terms(dataclasses.replace(settings, vocabulary=200, chunked=chunked), TASK, LAYOUT)
        assert "kd" in distill.cached_terms(dataclasses.replace(settings, vocabulary=CLASSES, chunked=chunked), TASK, LAYOUT)


def test_what_cannot_be_is_one_clear_line():
    context = Context({}, None, jnp.int32(0), jax.random.key(0), lambda x: x, lambda x: x)
    one = {"weights": jnp.ones(N), BATCH_KEY: data.RecordLayout(3, V).pack(jnp.zeros((N, V)))}
    student, cached = CASES["ordinary"][0], teacher_of(CASES["ordinary"][1], 3)
    fn = HEAD_LOSSES["kd"]
    term = losses.on_cached_head(fn, data.RecordLayout(3, V))
    assert term.apply(context, Outputs(logits(student), {}, student), None, one).count == N
    for make, message in [
        (lambda: losses.on_cached_head(distill.cached_kd, data.RecordLayout(3, V)), "cached_kd takes no chunks"),
        (lambda: losses.on_cached_head(fn, data.RecordLayout(3, V), temperature=2.0), "have the tail of 1;"),
        (lambda: term.apply(context, Outputs(logits(student), {}), None, one), "kd works on heads, and the student gives none"),
        (lambda: fn(student, cached[0][:5], *cached[1:]), "log-probabilities are [13, 3]"),
        (lambda: fn(student, *(x[:5] for x in cached)), "the teacher's classes are [5, 3] for hidden [13, 6] and 37 classes"),
        (lambda: fn(student[:1] * 2 + (None,), *cached), "a head has hidden [13, 6], kernel [13, 6]"),
        (lambda: fn(student, *cached, temperature=0.0), "temperature is 0.0"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            make()
