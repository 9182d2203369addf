"""Losses that relate examples against NumPy in float64, and their terms on eight devices."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import softmax
from vit_pair import STUDENT, TEACHER, frozen, make_batch

from bmjax import distill, losses, parallel
from bmjax.train import Problem, init_state, make_step

B = 6
RNG = np.random.default_rng(0)
S, T = RNG.normal(size=(B, 4)).astype(np.float32), (2 * RNG.normal(size=(B, 7))).astype(np.float32)
LOGITS = (2 * RNG.normal(size=(2, B, 5))).astype(np.float32)
COPIES = np.array([1, 0, 2, 3, 0, 1], np.float32)


def wide(*arrays):
    return [x.reshape(len(x), -1).astype(np.float64) for x in arrays]


def by_length(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def similarity(s, t):
    """Tung & Mori 2019, equations 1 to 4."""
    g = [by_length(x @ x.T) for x in wide(s, t)]
    return ((g[0] - g[1]) ** 2).sum() / len(s) ** 2


def correlation(s, t, gamma=0.4, order=2):
    """Peng et al. 2019, equation 9: the expanded Gaussian kernel, pair by pair."""

    def kernel(x, y):
        return sum(math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * (x @ y) ** p for p in range(order + 1))

    s, t = (by_length(x) for x in wide(s, t))
    return np.mean([(kernel(s[i], s[j]) - kernel(t[i], t[j])) ** 2 for i in range(len(s)) for j in range(len(s))])


def huber(x, y):
    return 0.5 * (x - y) ** 2 if abs(x - y) <= 1 else abs(x - y) - 0.5


def rkd(s, t, distance=25.0, angle=50.0):
    """Park et al. 2019, equations 3 to 8; pairs and triples with equal members count 0."""
    s, t = wide(s, t)
    n, psi = len(s), []
    for x in (s, t):
        d = np.linalg.norm(x[:, None] - x[None], axis=-1)
        psi.append(d / d[d > 0].mean())
    of_pairs = sum(huber(psi[0][i, j], psi[1][i, j]) for i in range(n) for j in range(n)) / n**2
    of_triples = 0.0
    for i, j, k in itertools.product(range(n), repeat=3):
        cosines = []
        for x in (s, t):
            a, b = x[i] - x[j], x[k] - x[j]
            apart = np.linalg.norm(a) * np.linalg.norm(b)
            cosines.append(a @ b / apart if apart > 0 else 0.0)
        of_triples += huber(*cosines) / n**3
    return distance * of_pairs + angle * of_triples


def pkt(s, t):
    """Passalis & Tefas 2018, equations 5 to 7, averaged over the entries."""
    p = []
    for x in wide(t, s):
        k = (by_length(x) @ by_length(x).T + 1) / 2
        p.append(k / k.sum(1, keepdims=True))
    return (p[0] * np.log(p[0] / p[1])).mean()


def dist(s, t, beta=1.0, gamma=1.0, temperature=1.0):
    """Huang et al. 2022, equations 8 to 11."""
    q, p = (softmax(x.astype(np.float64) / temperature, -1) for x in (s, t))
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T)])
    return temperature**2 * (beta * inter + gamma * intra)


PAIRS = {
    "similarity": (distill.similarity, similarity, (S, T), {}),
    "correlation": (distill.correlation, correlation, (S, T), {}),
    "correlation of order 4": (distill.correlation, correlation, (S, T), {"gamma": 0.9, "order": 4}),
    "rkd": (distill.rkd, rkd, (S, T), {}),
    "rkd of distances": (distill.rkd, rkd, (S, T), {"distance": 2.0, "angle": 0.0}),
    "pkt": (distill.pkt, pkt, (S, T), {}),
    "dist": (distill.dist, dist, LOGITS, {}),
    "dist at 4": (distill.dist, dist, LOGITS, {"beta": 2.0, "gamma": 0.5, "temperature": 4.0}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_values_are_those_of_the_formula(name):
    fn, reference, pair, kw = PAIRS[name]
    found = fn(*pair, **kw)
    assert (found.shape, found.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(found, reference(*pair, **kw), rtol=5e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_an_example_counts_as_often_as_its_weight_and_padding_not_at_all(name):
    """Weights of 0, 1, 2, 3 are the batch with examples left out and repeated; what is left out may be NaN."""
    fn, reference, pair, kw = PAIRS[name]
    repeated = [np.repeat(x, COPIES.astype(int), axis=0) for x in pair]
    padded = [np.where(COPIES[:, None] > 0, x, np.nan) for x in pair]
    value, slope = jax.value_and_grad(lambda s: fn(s, jnp.asarray(padded[1]), weights=COPIES, **kw))(jnp.asarray(padded[0]))
    np.testing.assert_allclose(value, reference(*repeated, **kw), rtol=5e-5)
    assert np.isfinite(slope).all() and not np.any(slope[COPIES == 0])
    assert np.any(slope[COPIES > 0])


@pytest.mark.parametrize("name", PAIRS)
def test_equal_students_extreme_values_and_tiny_batches(name):
    fn, _, (s, t), kw = PAIRS[name]
    np.testing.assert_allclose(fn(t, t, **kw), 0, atol=1e-5)
    hard = [np.where(RNG.uniform(size=x.shape) < 0.5, -1e4, 1e4).astype(np.float32) for x in (s, t)]
    masked = [np.concatenate([x[:, 1:], np.full((B, 1), -np.inf)], 1) for x in hard] if "dist" in name[:4] else hard
    nothing = [np.zeros_like(x) for x in (s, t)]
    for a, b in (hard, masked, (s, hard[1]), nothing, (s[:1], t[:1]), (s[:2], t[:2])):
        value, slope = jax.value_and_grad(lambda x, b=b: fn(x, jnp.asarray(b), **kw))(jnp.asarray(a))
        assert np.isfinite(value) and np.isfinite(slope).all()
    value, slope = jax.value_and_grad(lambda x: fn(x, t, weights=np.zeros(B, np.float32), **kw))(jnp.asarray(s))
    assert value == 0 and not np.any(slope)


def test_what_each_relation_does_not_see():
    turn = np.linalg.qr(RNG.normal(size=(7, 7)))[0].astype(np.float32)
    np.testing.assert_allclose(distill.rkd(3 * T + 5, T), 0, atol=1e-5)
    np.testing.assert_allclose(distill.pkt(S, 4 * T @ turn), distill.pkt(S, T), rtol=1e-4)
    np.testing.assert_allclose(distill.pkt(T @ turn, T), 0, atol=1e-6)
    np.testing.assert_allclose(distill.similarity(T @ turn * 2, T), 0, atol=1e-6)
    np.testing.assert_allclose(distill.correlation(T @ turn * 2, T), 0, atol=1e-6)
    np.testing.assert_allclose(distill.dist(LOGITS[0] + 7, LOGITS[0]), 0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in PAIRS if not name.startswith("dist")])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_features_is_no_matter(name, scale):
    fn, reference, (s, t), kw = PAIRS[name]
    slope = lambda a, b: jax.grad(lambda x: fn(x, b, **kw))(jnp.asarray(a))
    np.testing.assert_allclose(fn(np.float32(scale) * s, np.float32(scale) * t, **kw), reference(s, t, **kw), rtol=5e-5)
    small, usual = slope(np.float32(scale) * s, np.float32(scale) * t), slope(s, t)
    np.testing.assert_allclose(scale * small, usual, rtol=1e-3, atol=1e-4 * np.abs(usual).max())


def test_dist_leaves_out_what_varies_in_neither_network():
    """One example has no columns, saturated outputs have few; a class or an item that varies in one network alone has r = 0."""
    s, t = LOGITS
    for x in (s[:1], 1e4 * s, np.zeros_like(s), np.zeros((300, 1000), np.float32)):
        np.testing.assert_allclose(distill.dist(x, x), 0, atol=1e-5)
    rows = 1 - np.corrcoef(*(softmax(x[0].astype(np.float64)) for x in (s, t)))[0, 1]
    np.testing.assert_allclose(distill.dist(s[:1], t[:1]), rows, rtol=5e-5)
    np.testing.assert_allclose(distill.dist(s, np.zeros_like(t)), 2.0, rtol=1e-5)
    never = [np.concatenate([x, np.full((B, 3), -np.inf, np.float32)], 1) for x in (s, t)]
    columns = [softmax(x.astype(np.float64), -1).T for x in never]
    want = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(*columns) if a.any()])
    np.testing.assert_allclose(distill.dist(*never, beta=0.0), want, rtol=5e-5)


def test_numbers_may_be_traced():
    traced = jax.jit(lambda x, y: (distill.rkd(S, T, x, y), distill.correlation(S, T, x / 25)))(25.0, 50.0)
    np.testing.assert_allclose(traced, (rkd(S, T), correlation(S, T, 1.0)), rtol=5e-5)


def test_maps_are_pooled_and_tokens_are_items():
    large = RNG.normal(size=(B, 4, 4, 3)).astype(np.float32)
    small = large.reshape(B, 2, 2, 2, 2, 3).mean((2, 4))
    np.testing.assert_allclose(distill.similarity(large, small), 0, atol=1e-6)
    s, t = (x.reshape(2, 3, 5) for x in LOGITS)
    weights = np.array([[1, 0, 1], [1, 1, 0]], np.float32)
    found = distill.dist(s, t, weights=weights)
    np.testing.assert_allclose(found, dist(*(x[weights.ravel() > 0] for x in LOGITS)), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: distill.similarity(S, T[:3]), "similarity: the student has 6 examples and the teacher 3"),
        (lambda: distill.pkt(S, T, weights=np.ones(3)), r"pkt: weights \[3\] for 6 examples"),
        (lambda: distill.correlation(S, T, gamma=0.0), "gamma is 0.0"),
        (lambda: distill.dist(*LOGITS, temperature=-1.0), "temperature is -1.0"),
        (lambda: distill.dist(LOGITS[0], LOGITS[1][:1]), r"dist: the student's array is \[6, 5\] and the teacher's \[1, 5\]"),
        (lambda: losses.on_logits(distill.kd, per_device=True), "kd sees items one by one, and per_device is for losses that"),
        (lambda: train("dist", SPLIT, steps=1, per_device=True), "per_device=True, and here the compiler splits the batch"),
        (lambda: problem("similarity", accumulate=2), "relates examples: 2 microbatches would change its value"),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


ON = {"layers/0": "layers/1/mlp"}
TERMS = {
    "similarity": lambda **kw: losses.on_features(distill.similarity, ON, weight=30.0, **kw),
    "rkd": lambda **kw: losses.on_features(distill.rkd, ON, **kw),
    "dist": lambda **kw: losses.on_logits(distill.dist, temperature=2.0, **kw),
}


def problem(name, accumulate=1, **kw):
    terms = {"ce": (0.5, losses.cross_entropy_term()), name: (1.0, TERMS[name](**kw))}
    return Problem(STUDENT, terms, optax.sgd(0.1), teacher=TEACHER, accumulate=accumulate)


def train(name, place, steps=2, **kw):
    mesh = parallel.make_mesh(place[0], jax.devices()[:1] if place[0] == "data=1" else None)
    made, batch, history = problem(name, **kw), make_batch(), []
    state = init_state(made, mesh, STUDENT.rules, jax.random.key(0), batch, frozen=frozen())
    step = make_step(made, mesh, state, place[1])
    begun = jax.device_get(state.params)
    for _ in range(steps):
        state, metrics = step(state, frozen(), batch)
        history.append(jax.device_get(metrics))
    return begun, jax.device_get(state.params), history


MANUAL, SPLIT = ("data=8", "replicated"), ("data=2,fsdp=2,tensor=2", "partitioned")


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("similarity", (MANUAL, SPLIT)),
        pytest.param("rkd", (MANUAL, ("data=8", "pmap")), marks=pytest.mark.slow),
        pytest.param("dist", (MANUAL, SPLIT), marks=pytest.mark.slow),
    ],
)
def test_eight_devices_relate_the_global_batch(name, places):
    """Under SGD, with whole shards of padding; Adam would hide a wrong factor of the gradient."""
    begun, wanted, history = train(name, ("data=1", "partitioned"))
    assert np.abs(begun["model"]["head"]["kernel"] - wanted["model"]["head"]["kernel"]).max() > 1e-3
    for place in places:
        _, found, seen = train(name, place)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (found, seen), (wanted, history))


def test_per_device_is_the_mean_over_the_devices():
    _, _, history = train("dist", ("data=8", "replicated"), steps=1, per_device=True)
    batch = make_batch()
    made = problem("dist")
    params = init_state(made, parallel.make_mesh("data=8"), STUDENT.rules, jax.random.key(0), batch, frozen=frozen()).params
    s, t = STUDENT.apply(params["model"], {}, batch)[0].logits, TEACHER.apply(frozen()["params"], {}, batch)[0].logits
    parts = [
        distill.dist(s[i : i + 2], t[i : i + 2], temperature=2.0, weights=batch["weights"][i : i + 2]) for i in range(0, 16, 2)
    ]
    want = np.average(parts, weights=batch["weights"].reshape(8, 2).sum(1))
    np.testing.assert_allclose(history[0]["dist"], want, rtol=1e-4)
