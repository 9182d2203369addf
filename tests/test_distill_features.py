"""Losses on features, maps and the insides of transformers against NumPy in float64, written from the papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d
from scipy.special import expit, log_softmax, softmax

from bmjax import distill

B = 3
RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.normal(size=shape).astype(np.float32)
S, T = normal(B, 4, 5, 3), normal(B, 4, 5, 3)
WIDER = normal(B, 4, 5, 6)
LARGE = normal(B, 8, 10, 3)
SCORES = 2 * normal(2, B, 2, 4, 4)
VALUES = normal(B, 4, 2, 3), normal(B, 4, 2, 5)
MASK = np.arange(4)[None] < np.array([4, 2, 3])[:, None]
LOG_VARIANCE = normal(3)


def wide(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def halved(x):
    n, h, w, c = x.shape
    return x.astype(np.float64).reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


def cosine(s, t):
    s, t = (x.reshape(-1, 3) for x in wide(s, t))
    return np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(s, t)])


def energies(x, mask=None):
    """One vector over the positions for each example: Zagoruyko & Komodakis 2017, section 3.1."""
    q = [(a.reshape(-1, a.shape[-1]) ** 2).mean(-1) for a in wide(*x)]
    if mask is not None:
        q = [a[m] for a, m in zip(q, mask)]
    return [a / np.linalg.norm(a) for a in q]


def attention_transfer(s, t, mask=None):
    return np.mean([((a - b) ** 2).mean() for a, b in zip(energies(s, mask), energies(t, mask))])


def factor_transfer(s, t, mask=None):
    return np.mean([np.abs(a - b).mean() for a, b in zip(energies(s, mask), energies(t, mask))])


def nst(s, t):
    """Huang & Wang 2017, equation 8, with the polynomial kernel (x.y)^2."""
    total = 0.0
    for x, y in zip(*wide(s, t)):
        x, y = ([c / np.linalg.norm(c) for c in z.reshape(-1, z.shape[-1]).T] for z in (x, y))
        k = lambda u, v: np.mean([(a @ b) ** 2 for a in u for b in v])
        total += k(x, x) + k(y, y) - 2 * k(x, y)
    return total / len(s)


def fsp(s, t):
    """Yim et al. 2017, equations 1 and 2."""
    flows = []
    for a, b in (wide(*s), wide(*t)):
        h, w = a.shape[1:3]
        flow = sum(a[:, i, j, :, None] * b[:, i, j, None, :] for i in range(h) for j in range(w))
        flows.append(flow / (h * w))
    return ((flows[0] - flows[1]) ** 2).mean()


def activation_boundary(s, t, margin=1.0):
    """Heo et al. 2019, equation 5."""
    s, t = wide(s, t)
    rho, relu = (t > 0).astype(float), lambda x: np.maximum(x, 0)
    return ((rho * relu(margin - s) + (1 - rho) * relu(margin + s)) ** 2).mean()


def vid(s, t, raw):
    """Ahn et al. 2019, equations 5 and 6, without the constant."""
    s, t, raw = wide(s, t, raw)
    v = np.log1p(np.exp(raw)) + 1e-5
    return (0.5 * np.log(v) + (t - s) ** 2 / (2 * v)).mean()


def attention_relation(s, t, mask=None):
    """Wang et al. 2020, equation 7: over the queries of each example, then over heads and examples."""
    parts = []
    for a, b, m in zip(*wide(s, t), MASK if mask is not None else np.ones_like(MASK)):
        a, b = (x[:, m][:, :, m] for x in (a, b))
        parts.append((softmax(b, -1) * (log_softmax(b, -1) - log_softmax(a, -1))).sum(-1).mean())
    return np.mean(parts)


def value_relation(s, t, mask=None):
    """Wang et al. 2020, equations 8 to 10."""
    scores = [np.stack([[v[:, h] @ v[:, h].T / np.sqrt(v.shape[-1]) for h in range(v.shape[1])] for v in x]) for x in wide(s, t)]
    return attention_relation(*scores, mask)


def attention_scores(s, t, mask=None):
    """Jiao et al. 2020, equation 7."""
    kept = MASK if mask is not None else np.ones_like(MASK)
    return np.mean([((a - b)[:, m][:, :, m] ** 2).mean() for a, b, m in zip(*wide(s, t), kept)])


CASES = {
    "hint": (distill.hint, (S, T), lambda s, t: ((s.astype(np.float64) - t) ** 2).mean()),
    "hint of tokens": (distill.hint, (S[:, 0], T[:, 0]), lambda s, t: ((s.astype(np.float64) - t) ** 2).mean()),
    "hint pooled": (distill.hint, (LARGE, T), lambda s, t: ((halved(s) - t) ** 2).mean()),
    "cosine": (distill.cosine, (S, T), cosine),
    "cosine pooled": (distill.cosine, (S, LARGE), lambda s, t: cosine(s, halved(t))),
    "attention transfer": (distill.attention_transfer, (S, WIDER), attention_transfer),
    "attention transfer pooled": (distill.attention_transfer, (S, LARGE), lambda s, t: attention_transfer(s, halved(t))),
    "attention transfer masked": (
        lambda s, t: distill.attention_transfer(s, t, MASK),
        (S[:, :, 0], WIDER[:, :, 0]),
        lambda s, t: attention_transfer(s, t, MASK),
    ),
    "factor transfer": (distill.factor_transfer, (S, WIDER), factor_transfer),
    "factor transfer masked": (
        lambda s, t: distill.factor_transfer(s, t, MASK),
        (S[:, :, 0], WIDER[:, :, 0]),
        lambda s, t: factor_transfer(s, t, MASK),
    ),
    "nst": (distill.nst, (S, WIDER), nst),
    "fsp": (lambda s, t: distill.fsp([s, WIDER], [t, WIDER[::-1]]), (S, T), lambda s, t: fsp([s, WIDER], [t, WIDER[::-1]])),
    "fsp pooled": (
        lambda s, t: distill.fsp([LARGE, s], [LARGE[::-1], t]),
        (S, T),
        lambda s, t: fsp([halved(LARGE), s], [halved(LARGE[::-1]), t]),
    ),
    "activation boundary": (distill.activation_boundary, (S, T), activation_boundary),
    "activation boundary, another margin": (
        lambda s, t: distill.activation_boundary(s, t, 0.3),
        (S, T),
        lambda s, t: activation_boundary(s, t, 0.3),
    ),
    "vid": (lambda s, t: distill.vid(s, t, jnp.asarray(LOG_VARIANCE)), (S, T), lambda s, t: vid(s, t, LOG_VARIANCE)),
    "attention relation": (distill.attention_relation, SCORES, attention_relation),
    "attention relation masked": (
        lambda s, t: distill.attention_relation(s, t, MASK),
        SCORES,
        lambda s, t: attention_relation(s, t, MASK),
    ),
    "value relation": (distill.value_relation, VALUES, value_relation),
    "value relation masked": (lambda s, t: distill.value_relation(s, t, MASK), VALUES, lambda s, t: value_relation(s, t, MASK)),
    "attention scores": (distill.attention_scores, SCORES, attention_scores),
    "attention scores masked": (
        lambda s, t: distill.attention_scores(s, t, MASK),
        SCORES,
        lambda s, t: attention_scores(s, t, MASK),
    ),
    "hidden states": (distill.hidden_states, (S[:, 0], T[:, 0]), lambda s, t: ((s.astype(np.float64) - t) ** 2).mean()),
}


@pytest.mark.parametrize("name", CASES)
def test_the_values_are_those_of_the_formula(name):
    fn, pair, reference = CASES[name]
    found = fn(*pair)
    assert (found.shape, found.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(found, reference(*pair), rtol=2e-5, atol=1e-7)


SINGLE = [name for name in CASES if "fsp" not in name]


@pytest.mark.parametrize("name", SINGLE)
def test_gradients_are_finite_and_nothing_is_lost_at_the_teacher(name):
    fn, (s, t), _ = CASES[name]
    step = jax.jit(jax.value_and_grad(fn))
    hard = [np.where(RNG.uniform(size=x.shape) < 0.5, -1e4, 1e4).astype(np.float32) for x in (s, t)]
    for a, b in (hard, (np.zeros_like(s), np.zeros_like(t)), (s, hard[1])):
        value, slope = step(jnp.asarray(a), jnp.asarray(b))
        assert np.isfinite(value) and np.isfinite(slope).all()
    if "vid" not in name and "boundary" not in name:
        np.testing.assert_allclose(fn(t, t), 0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in SINGLE if "masked" not in name])
def test_the_whole_is_the_mean_of_the_examples(name):
    """What `losses.on_features` builds on: each example alone, as a batch of 1."""
    fn, (s, t), _ = CASES[name]
    alone = [fn(s[i : i + 1], t[i : i + 1]) for i in range(B)]
    np.testing.assert_allclose(fn(s, t), np.mean(alone), rtol=1e-5, atol=1e-7)


def test_scores_that_are_masked_do_not_count():
    causal = np.where(np.tril(np.ones((4, 4), bool)), SCORES, -np.inf)
    for fn in (distill.attention_relation, distill.attention_scores):
        value, slope = jax.value_and_grad(fn)(jnp.asarray(causal[0]), jnp.asarray(causal[1]))
        assert np.isfinite(value) and np.isfinite(slope).all()
    s, t = wide(*SCORES)
    below = np.tril_indices(4)
    np.testing.assert_allclose(distill.attention_scores(*causal), ((s - t)[..., below[0], below[1]] ** 2).mean(), rtol=1e-5)
    rows = [attention_relation_row(s[..., i, : i + 1], t[..., i, : i + 1]) for i in range(4)]
    np.testing.assert_allclose(distill.attention_relation(*causal), np.mean(rows), rtol=1e-5)


def attention_relation_row(s, t):
    return (softmax(t, -1) * (log_softmax(t, -1) - log_softmax(s, -1))).sum(-1).mean()


def test_maps_whose_sizes_do_not_divide_are_pooled_over_overlapping_windows():
    x = normal(1, 5, 5, 1)
    spans = [(0, 3), (2, 5)]  # floor(i 5 / 2) to ceil((i + 1) 5 / 2)
    small = np.array([[x[0, a:b, c:d, 0].mean() for c, d in spans] for a, b in spans])[None, ..., None].astype(np.float32)
    np.testing.assert_allclose(distill.hint(x, small), 0, atol=1e-12)


def test_review_fuses_from_the_last_stage_to_the_first():
    """Chen et al. 2021: the fusion and the context loss, written out for two stages."""
    s, t = [normal(2, 4, 4, 2), normal(2, 2, 2, 3)], [normal(2, 4, 4, 5), normal(2, 2, 2, 4)]
    fusion = distill.review_fusion(jax.random.key(0), s, t)
    assert {k: v.shape for k, v in fusion["0"].items()} == {
        "enter": (2, 3),
        "leave": (3, 3, 3, 5),
        "gate": (6, 2),
        "gate_bias": (2,),
    }
    assert sorted(fusion["1"]) == ["enter", "leave"]
    fusion["0"]["gate_bias"] = jnp.array([0.5, -1.0])
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), fusion)
    deep = s[1] @ p["1"]["enter"]
    above, x = deep.repeat(2, 1).repeat(2, 2), s[0] @ p["0"]["enter"]
    gates = expit(np.concatenate([x, above], -1) @ p["0"]["gate"] + p["0"]["gate_bias"])
    mixed = x * gates[..., :1] + above * gates[..., 1:]

    def conv(x, kernel):
        out = [
            [sum(correlate2d(a[..., i], kernel[..., i, o], "same") for i in range(x.shape[-1])) for o in range(kernel.shape[-1])]
            for a in x
        ]
        return np.moveaxis(np.array(out), 1, -1)

    first, last = conv(mixed, p["0"]["leave"]) - t[0], conv(deep, p["1"]["leave"]) - t[1]
    whole = lambda gap: (gap.mean((1, 2)) ** 2).mean()
    want = ((first**2).mean() + (halved(first) ** 2).mean() / 2 + whole(first) / 4) / 1.75
    want += ((last**2).mean() + whole(last) / 2) / 1.5
    np.testing.assert_allclose(distill.review_kd(s, t, fusion), want, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: distill.hint(S, T[:2]),
            r"hint: the student's feature is \[3, 4, 5, 3\] and the teacher's \[2, 4, 5, 3\]; all axes",
        ),
        (lambda: distill.hint(S, WIDER), 'give losses.on_features project="linear"'),
        (lambda: distill.hint(S[:, 0], T[:, 0, :2]), "all axes but the last must agree"),
        (lambda: distill.cosine(S, T[:, 0]), "cosine: the student's feature is"),
        (
            lambda: distill.attention_transfer(S[:, 0, 0], T[:, 0, 0]),
            "attention_transfer: .* expected the same positions",
        ),
        (lambda: distill.nst(S[:, 0], T[:, 0, :2]), "nst: .* expected the same positions"),
        (lambda: distill.fsp([S], [T]), "fsp: 1 maps of the student and 1 of the teacher; expected two each"),
        (lambda: distill.fsp([S, S], [T, WIDER]), "the widths must agree"),
        (lambda: distill.fsp([S[0], S[0]], [T, T]), r"fsp: expected arrays \[B, H, W, C\], and one is \[4, 5, 3\]"),
        (lambda: distill.activation_boundary(S, T, 0.0), "margin is 0.0; expected a number above 0"),
        (lambda: distill.vid(S, T, jnp.zeros(2)), r"vid: log_variance is \[2\] for 3 channels"),
        (lambda: distill.attention_scores(SCORES[0], SCORES[1][:, :1]), "attention_scores: .* they must agree"),
        (lambda: distill.attention_relation(*SCORES, MASK[:, :2]), r"a mask \[3, 2\] for scores"),
        (lambda: distill.value_relation(S[0], T[0]), r"value_relation: expected arrays \[B, T, heads, d\]"),
        (lambda: distill.review_kd([S], [], {}), "1 stages of the student and 0 of the teacher"),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)
