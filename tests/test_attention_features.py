"""What attention is made of, captured: scores with their masks, beside a fused implementation too, and losses that learn from it.

That every captured array is the one of the float64 arithmetic, on every mesh, `check_outputs` shows for each network.
"""

import functools

import jax
import numpy as np
import optax
import pytest
from formulas import random_params
from scipy.special import log_softmax, softmax

from bmjax import distill, losses, parallel
from bmjax.models import Decoder, Encoder, Transformer
from bmjax.models import attention as attend
from bmjax.train import Problem, init_state, make_step

B, T, V = 16, 6, 9
CAUSAL = np.tril(np.ones((T, T), bool))


def decoder(layers, width, **more):
    sizes = {"heads": 4, "kv_heads": 2, "neurons": 8} | more
    return Decoder(layers=layers, width=width, **sizes).build((T,), V)


def tokens():
    return np.random.default_rng(0).integers(1, V, (B, T)).astype(np.int32)


def inside(layer, *parts):
    return tuple(f"layers/{layer}/attention/{part}" for part in parts)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scores_are_masked_by_causality_and_segments_and_make_the_layers_output(remat):
    model = decoder(2, 8, remat=remat)
    segments = np.repeat([[1, 1, 1, 2, 2, 0]], B, axis=0).astype(np.int32)
    batch = {"inputs": tokens(), "segments": segments}
    params = random_params(model, batch)
    names = (*inside(1, "scores", "query", "key", "value"), "layers/1/attention")
    found = jax.jit(lambda p, b: model.apply(p, {}, b, capture=names)[0].features)(params, batch)
    scores, q, k, v, out = (np.asarray(found[name], np.float64) for name in names)
    assert (scores.shape, q.shape, k.shape, v.shape) == ((B, 4, T, T), (B, T, 4, 2), (B, T, 2, 2), (B, T, 2, 2))
    seen = CAUSAL & (segments[:, :, None] == segments[:, None])
    np.testing.assert_array_equal(np.isfinite(scores), np.broadcast_to(seen[:, None], scores.shape))
    k, v = (np.repeat(x, 2, axis=2) for x in (k, v))
    products = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(2)
    np.testing.assert_allclose(scores[scores > -np.inf], products[scores > -np.inf], rtol=1e-4, atol=1e-5)
    mixed = np.einsum("bhts,bshd->bthd", softmax(scores, -1), v)
    kernel = params["layers"]["attention"]["out"]["kernel"][1]
    np.testing.assert_allclose(np.einsum("bthd,hdw->btw", mixed, kernel), out, rtol=1e-4, atol=1e-5)


def test_nothing_is_computed_for_what_nobody_asks():
    model, batch = decoder(1, 8), {"inputs": tokens()}
    params = random_params(model, batch)
    text = lambda *capture: str(jax.make_jaxpr(lambda p: model.apply(p, {}, batch, capture=capture)[0])(params))
    products = lambda text: text.count("dot_general")
    assert text("layers/0/attention") != text("layers/0/mlp")
    assert products(text("layers/0/attention/query", "layers/0/attention/value")) == products(text())
    assert products(text("layers/0/attention/scores")) == products(text()) + 1


def test_a_fused_implementation_runs_untouched_and_scores_stand_beside_it(monkeypatch):
    """As on a GPU; the fused kernel itself is replaced by the plain one, which records how it was called."""
    calls, plain = [], jax.nn.dot_product_attention

    def fused(*args, implementation, **more):
        calls.append(implementation)
        return plain(*args, implementation="xla", **more)

    monkeypatch.setattr(attend, "check_cudnn", lambda dtype, head_dim: None)
    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    model, batch = decoder(1, 8, attention="cudnn"), {"inputs": tokens()}
    params = random_params(model, batch)
    found = model.apply(params, {}, batch, capture=inside(0, "scores"))[0].features["layers/0/attention/scores"]
    want = decoder(1, 8).apply(params, {}, batch, capture=inside(0, "scores"))[0].features["layers/0/attention/scores"]
    np.testing.assert_array_equal(found, want)
    assert calls[0] == "cudnn"


def kl(s, t):
    return (softmax(t, -1) * (log_softmax(t, -1) - log_softmax(s, -1))).sum(-1)


def relation(x):
    return np.einsum("qhd,khd->hqk", x, x) / np.sqrt(x.shape[-1])


def minilm(s, t, kept):
    """Wang et al. 2020, equations 6 to 10: attention and value relations of one example's positions that count, causal."""
    below = lambda x: np.where(CAUSAL[: kept.sum(), : kept.sum()], x, -1e30)
    scores = [below(x["scores"][:, kept][:, :, kept]) for x in (s, t)]
    return kl(*scores).mean() + kl(relation(s["value"][kept]), relation(t["value"][kept])).mean()


def tinybert(s, t, kept, projection):
    """Jiao et al. 2020, equations 7 and 8: scores of pairs that are seen, and hidden states of positions."""
    below = np.tril(np.ones((kept.sum(), kept.sum()), bool))
    mine, theirs = (x["scores"][:, kept][:, :, kept][:, below] for x in (s, t))
    gap = ((mine - theirs) ** 2).mean()
    hidden = ((s["end"] @ projection["kernel"] + projection["bias"] - t["end"]) ** 2).mean(-1)
    return gap, hidden


SPECS = {
    "decoder": (decoder(2, 8, kv_heads=4), decoder(3, 16, kv_heads=4)),
    "encoder": tuple(
        Encoder(layers=n, width=w, heads=4, neurons=8, vocabulary=V, pad=0).build((T,), 3) for n, w in ((2, 8), (3, 16))
    ),
    "vit": tuple(Transformer(layers=n, width=w, heads=4, neurons=8).build((4, 4, 1), 3) for n, w in ((2, 8), (3, 16))),
}


def data(name):
    rng = np.random.default_rng(1)
    batch = {"id": np.arange(B, dtype=np.int32)}
    if name == "decoder":
        lengths = np.where(np.arange(B) < 5, 0, rng.integers(2, T + 1, B))  # whole shards of padding
        weights = (np.arange(T) < lengths[:, None]).astype(np.float32)
        return batch | {"inputs": tokens(), "targets": tokens(), "weights": weights}
    weights = np.where(np.arange(B) < 5, 0.0, rng.uniform(0.5, 1.5, B)).astype(np.float32)
    inputs = (
        rng.normal(size=(B, 4, 4, 1)).astype(np.float32)
        if name == "vit"
        else tokens() * (np.arange(T) < rng.integers(2, T + 1, (B, 1)))
    )
    return batch | {
        "inputs": inputs.astype(inputs.dtype if name == "vit" else np.int32),
        "targets": np.zeros(B, np.int32),
        "weights": weights,
    }


TERMS = {
    "attention": (1.0, losses.on_features(distill.attention_relation, distill.last("attention/scores"))),
    "values": (1.0, losses.on_features(distill.value_relation, distill.last("attention/value"))),
    "scores": (0.1, losses.on_features(distill.attention_scores, distill.uniform("attention/scores"))),
    "hidden": (0.1, losses.on_features(distill.hidden_states, {"layers/1": "layers/2"}, project="linear")),
}


@functools.cache
def train(name, spec, steps=3):
    """(the states before and after, metrics of each step) of a student that learns from nothing but the teacher's insides."""
    student, teacher = SPECS[name]
    batch, mesh = data(name), parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None)
    terms = {key: TERMS[key] for key in TERMS if name == "decoder" or key != "hidden"}
    problem = Problem(student, terms, optax.sgd(0.1), teacher=teacher, loss_tx=optax.sgd(0.1))
    frozen = {"params": random_params(teacher, batch), "model_state": {}}
    start = jax.tree.map(lambda x: 0.5 * x, random_params(student, batch))
    state = init_state(problem, mesh, student.rules, jax.random.key(0), batch, params=start, frozen=frozen)
    before, step, history = jax.device_get(state), make_step(problem, mesh, state), []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        history.append(jax.device_get(metrics))
    return before, jax.device_get(state), history, frozen


def test_the_terms_are_minilm_and_tinybert_on_each_example():
    before, _, history, frozen = train("decoder", "data=1")
    batch, (student, teacher) = data("decoder"), SPECS["decoder"]
    features = lambda model, params, i: jax.jit(
        lambda p: model.apply(p, {}, batch, capture=(*inside(i, "scores", "value"), f"layers/{i}"))[0].features
    )(params)
    found = []
    for model, params, layers in ((student, before.params["model"], (0, 1)), (teacher, frozen["params"], (1, 2))):
        by_layer = {}
        for i in layers:
            raw = {key: np.asarray(x, np.float64) for key, x in features(model, params, i).items()}
            by_layer[i] = [
                {"scores": raw[inside(i, "scores")[0]][b], "value": raw[inside(i, "value")[0]][b], "end": raw[f"layers/{i}"][b]}
                for b in range(B)
            ]
        found.append(by_layer)
    s, t = found
    kept = batch["weights"] > 0
    counts, real = kept.sum(1), np.flatnonzero(kept.any(1))
    want = np.average([minilm(s[1][b], t[2][b], kept[b]) for b in real], weights=counts[real])
    np.testing.assert_allclose(history[0]["attention"] + history[0]["values"], want, rtol=1e-4)
    linear = jax.tree.map(lambda x: np.asarray(x, np.float64), before.params["loss"]["hidden"]["project"]["0"])
    gaps = [sum(tinybert(s[i][b], t[j][b], kept[b], linear)[0] for i, j in ((0, 1), (1, 2))) for b in real]
    np.testing.assert_allclose(history[0]["scores"], np.average(gaps, weights=counts[real]), rtol=1e-4)
    hidden = np.stack([tinybert(s[1][b], t[2][b], kept[b], linear)[1] for b in real])
    np.testing.assert_allclose(history[0]["hidden"], np.average(hidden, weights=kept[real]), rtol=1e-4)


def test_padding_that_a_model_masks_by_itself_does_not_count():
    """An encoder knows padding by its id, and weights [B] say nothing of it."""
    rng = np.random.default_rng(3)
    s, t = (rng.normal(size=(2, 3, T, T)).astype(np.float32) for _ in range(2))
    real = np.arange(T) < np.array([[4], [6]])
    s, t = (np.where(real[:, None, None], x, -np.inf).astype(np.float32) for x in (s, t))
    alone = [kl(s[b][:, kept][:, :, kept], t[b][:, kept][:, :, kept]).mean() for b, kept in enumerate(real)]
    np.testing.assert_allclose(distill.attention_relation(s, t), np.mean(alone), rtol=1e-5)
    inner = lambda x, kept: x[:, kept][:, :, kept]
    gaps = [((inner(s[b], kept) - inner(t[b], kept)) ** 2).mean() for b, kept in enumerate(real)]
    np.testing.assert_allclose(distill.attention_scores(s, t), np.mean(gaps), rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["decoder", pytest.param("encoder", marks=pytest.mark.slow), pytest.param("vit", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("spec", ["data=8", pytest.param("data=2,fsdp=2,tensor=2", marks=pytest.mark.slow)])
def test_a_student_learns_from_the_insides_of_a_deeper_wider_teacher_alike_on_every_mesh(name, spec):
    (_, one, here, _), (_, eight, there, _) = train(name, "data=1"), train(name, spec)
    for term in here[0]:
        np.testing.assert_allclose([m[term] for m in there], [m[term] for m in here], rtol=2e-4, err_msg=term)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), one.params, eight.params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(one.params))
    assert here[-1]["loss"] < here[0]["loss"]
