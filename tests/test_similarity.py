"""CKA against its definitions in float64, with padding, and with the rows split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bmjax import measure, parallel
from bmjax.parallel import collectives

N = 24
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 5)).astype(np.float32) + 3
Y = (X @ RNG.normal(size=(5, 7)) + 0.5 * RNG.normal(size=(N, 7))).astype(np.float32)
WEIGHTS = np.where(np.arange(N) < 7, 0.0, RNG.uniform(0.2, 2.0, N)).astype(np.float32)  # two shards of padding, one in part
ROTATION, _ = np.linalg.qr(RNG.normal(size=(5, 5)))


def cka(x, y, weights=None):
    """By Gram matrices: tr(K H L H) with weights as multiplicities, the definition of Kornblith et al. 2019, equation 4."""
    w = np.ones(N) if weights is None else weights.astype(np.float64)
    x, y = (np.sqrt(w)[:, None] * (z - (w @ z) / w.sum()) for z in (x.astype(np.float64), y.astype(np.float64)))
    k, m = x @ x.T, y @ y.T
    return np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))


def unbiased(x, y):
    """Over all ways to draw four different examples: what equation 5 of Song et al. 2012 is the closed form of."""
    k, m = (np.asarray(z, np.float64) @ np.asarray(z, np.float64).T for z in (x, y))
    n, total, count = len(x), 0.0, 0
    for a in range(n):
        for b in range(n):
            for c in range(n):
                for d in range(n):
                    if len({a, b, c, d}) == 4:
                        total += k[a, b] * (m[a, b] + m[c, d] - 2 * m[a, c])
                        count += 1
    return total / count


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_linear_cka_is_that_of_the_gram_matrices(weights):
    found = measure.linear_cka(jnp.asarray(X), jnp.asarray(Y), weights)
    assert (found.shape, found.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(found, cka(X, Y, weights), rtol=1e-5)


def test_it_sees_rotations_and_scales_as_the_same_and_constants_as_nothing():
    np.testing.assert_allclose(measure.linear_cka(X, 1e15 * X @ ROTATION + 2), 1, rtol=1e-5)
    stretched = X * np.array([5, 1, 1, 1, 0.1], np.float32)
    np.testing.assert_allclose(measure.linear_cka(X, stretched), cka(X, stretched), rtol=1e-5)
    assert cka(X, stretched) < 0.95
    assert measure.linear_cka(X, np.full_like(Y, 0.1)) == 0


def test_rows_of_weight_0_may_hold_anything():
    bad = X.copy()
    bad[WEIGHTS == 0] = np.nan
    for fn in (measure.linear_cka, measure.hsic):
        np.testing.assert_array_equal(fn(jnp.asarray(bad), jnp.asarray(Y), WEIGHTS), fn(jnp.asarray(X), jnp.asarray(Y), WEIGHTS))


def test_hsic_is_the_mean_over_all_quadruples():
    x, y = X[:7], Y[:7]
    np.testing.assert_allclose(measure.hsic(x, y), unbiased(x, y), rtol=1e-4)
    kept = np.array([1, 0, 1, 1, 1, 0, 1], np.float32)
    np.testing.assert_allclose(measure.hsic(x, y, kept), unbiased(x[kept > 0], y[kept > 0]), rtol=1e-4)
    assert measure.hsic(x, y, np.array([1, 1, 1, 0, 0, 0, 0], np.float32)) == 0


def test_cka_over_batches_has_no_bias_to_1():
    """Noise with more features than examples: the plain form sees a likeness, the sums over batches see none."""
    rng = np.random.default_rng(1)
    batches = [(rng.normal(size=(8, 64)), rng.normal(size=(8, 64))) for _ in range(40)]
    batches = [tuple(jnp.asarray(z, jnp.float32) for z in pair) for pair in batches]
    assert measure.linear_cka(*batches[0]) > 0.8
    assert abs(measure.minibatch_cka(batches)) < 0.1
    np.testing.assert_allclose(measure.minibatch_cka([(x, 3 * x) for x, _ in batches]), 1, rtol=1e-5)
    sums = np.sum([[unbiased(a[:6], b[:6]) for a, b in ((x, y), (x, x), (y, y))] for x, y in batches[:2]], axis=0)
    found = measure.minibatch_cka([(x[:6], y[:6]) for x, y in batches[:2]])
    np.testing.assert_allclose(found, sums[0] / np.sqrt(sums[1] * sums[2]), rtol=1e-3)


def test_rows_over_eight_devices_are_one_batch():
    def body(x, y, w):
        with collectives.over("data"):
            return measure.linear_cka(x, y, w), measure.hsic(x, y, w)

    mesh = parallel.make_mesh("data=8")
    found = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P()))(X, Y, WEIGHTS)
    np.testing.assert_allclose(found[0], cka(X, Y, WEIGHTS), rtol=1e-5)
    np.testing.assert_allclose(found[1], measure.hsic(X, Y, WEIGHTS), rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: measure.linear_cka(X, Y[:3]), r"linear_cka: features and weights are \[24, 5\], \[3, 7\], \[24\]; expected"),
        (lambda: measure.hsic(X[0], Y[0]), "hsic: features and weights are"),
        (lambda: measure.linear_cka(X, Y, WEIGHTS[:3]), "of the same n examples"),
        (lambda: measure.minibatch_cka([]), "minibatch_cka was given no batch"),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)
