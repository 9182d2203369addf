"""Wanda, SparseGPT and OWL against their papers' pseudocode in NumPy float64; whole networks on 1 and on 8 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bmjax import parallel, trees
from bmjax.models import Decoder, Encoder, Residual, ResNet, Transformer, adapters
from bmjax.prune import global_threshold, owl, sparsegpt_update, uniform, wanda_mask
from bmjax.prune.calibration import Method, layerwise, smallest, sparsegpt, wanda
from bmjax.prune.outliers import owl_sparsities


def correlated(rows, size, seed=0):
    """Inputs of different sizes that share a few directions."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, size)) + 2 * rng.normal(size=(rows, 4)) @ rng.normal(size=(4, size))
    return (mixed * rng.lognormal(size=size)).astype(np.float32)


def kernel(inputs, outputs, seed=1):
    return np.random.default_rng(seed).normal(size=(inputs, outputs)).astype(np.float32)


def gram_of(x):
    return (x.T.astype(np.float64) @ x / len(x)).astype(np.float32)


def paper(kernel, gram, sparsity=None, n=None, m=None, block=128, damp=0.01):
    """SparseGPT, algorithm 1, in float64; W is [out, in] as there."""
    w, h = np.array(kernel.T, np.float64), np.array(gram, np.float64)
    dead = np.diag(h) == 0
    mean = np.diag(h)[~dead].mean()
    h[dead, dead] = mean
    w[:, dead] = 0
    inverse = np.linalg.inv(h + damp * mean * np.eye(len(h)))
    u = np.linalg.cholesky(inverse).T
    mask = np.ones(w.shape, bool)
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        errors = np.zeros((len(w), end - start))
        if m is None:
            scores = w[:, start:end] ** 2 / np.diag(u)[start:end] ** 2
            drop = round(sparsity * scores.size)
            chosen = np.argsort(scores.T, axis=None, kind="stable")[:drop]
            part = np.ones(scores.size, bool)
            part[chosen] = False
            mask[:, start:end] = part.reshape(end - start, -1).T
        for j in range(start, end):
            if m is not None and j % m == 0:
                scores = w[:, j : j + m] ** 2 / np.diag(u)[j : j + m] ** 2
                rank = np.argsort(np.argsort(-scores, axis=1), axis=1)
                mask[:, j : j + m] = rank < n
            after = np.where(mask[:, j], w[:, j], 0)
            errors[:, j - start] = (w[:, j] - after) / u[j, j]
            w[:, j + 1 : end] -= np.outer(errors[:, j - start], u[j, j + 1 : end])
            w[:, j] = after
        w[:, end:] -= errors @ u[start:end, end:]
    return w.T, mask.T


CASES = {
    "half": {"sparsity": 0.5, "block": 16},
    "ragged": {"sparsity": 0.7, "block": 20},
    "one block": {"sparsity": 0.3},
    "2:4": {"n": 2, "m": 4, "block": 16},
    "1:4 ragged": {"n": 1, "m": 4, "block": 20},
    "3:8": {"n": 3, "m": 8, "block": 16, "damp": 0.1},
}


@pytest.mark.parametrize("case", CASES)
def test_sparsegpt_is_the_papers(case):
    w, gram = kernel(48, 10), gram_of(correlated(400, 48))
    new, mask = sparsegpt_update(jnp.asarray(w), jnp.asarray(gram), **CASES[case])
    expected, expected_mask = paper(w, gram, **CASES[case])
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_allclose(new, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    assert not np.any(np.asarray(new)[~np.asarray(mask)])


def test_sparsegpt_with_dead_inputs_and_fewer_rows_than_inputs():
    x = correlated(20, 32)
    x[:, [3, 17]] = 0
    w, gram = kernel(32, 6), gram_of(x)
    new, mask = sparsegpt_update(jnp.asarray(w), jnp.asarray(gram), sparsity=0.5, block=8)
    expected, expected_mask = paper(w, gram, sparsity=0.5, block=8)
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_allclose(new, expected, atol=5e-3 * np.abs(expected).max())
    assert not np.any(np.asarray(new)[[3, 17]])


def test_the_scale_of_the_inputs_does_not_matter_with_dead_ones_either():
    x = correlated(100, 16)
    x[:, 5] = 0
    w = jnp.asarray(kernel(16, 4))
    update = lambda scale: sparsegpt_update(w, jnp.asarray(gram_of(scale * x)), n=2, m=4, block=8)[0]
    np.testing.assert_allclose(update(1.0), update(1e-3), rtol=1e-3, atol=1e-4)


def test_a_hessian_that_float32_cannot_factor_is_damped_more():
    gram = jnp.ones((8, 8)) * 1e4  # rank 1; without damping it has no inverse
    new, mask = sparsegpt_update(jnp.asarray(kernel(8, 3)), gram, sparsity=0.5, damp=0.0)
    assert np.isfinite(new).all()
    assert np.sum(mask) == 12
    # All inputs are the same, so what a dropped one did the last kept one can do.
    np.testing.assert_allclose(new.sum(0)[np.asarray(mask)[-1]], kernel(8, 3).sum(0)[np.asarray(mask)[-1]], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"n": 2, "m": 4}])
def test_the_output_changes_least_with_sparsegpt_then_wanda_then_magnitude(target):
    x, params = correlated(500, 64), {"kernel": kernel(64, 32)}
    fn = lambda p, b: b["inputs"] @ p["kernel"]
    methods = (sparsegpt(block=16), wanda(), smallest())
    found = [layerwise(fn, params, [{"inputs": x}], method, samples=None, **target) for method in methods]
    errors = [np.sum((x @ (np.asarray(one.params["kernel"]) - params["kernel"])) ** 2) for one in found]
    assert errors[0] < 0.6 * errors[1]
    assert errors[1] < 0.9 * errors[2]
    reported = [one.rows[0].error for one in found]
    np.testing.assert_allclose(reported, np.array(errors) / np.sum((x @ params["kernel"]) ** 2), rtol=1e-3)


def test_without_correlation_sparsegpt_chooses_by_size_and_leaves_kept_weights_alone():
    w = kernel(16, 5)
    new, mask = sparsegpt_update(jnp.asarray(w), jnp.eye(16), sparsity=0.5)
    limit = np.sort(np.abs(w), axis=None)[40]
    np.testing.assert_array_equal(mask, np.abs(w) >= limit)
    np.testing.assert_allclose(new, np.where(np.abs(w) >= limit, w, 0), rtol=1e-6)


def test_wanda_by_output():
    w, squares = kernel(11, 7), np.random.default_rng(3).lognormal(size=11).astype(np.float32)
    mask = np.asarray(wanda_mask(jnp.asarray(w), jnp.asarray(squares), sparsity=0.4))
    scores = np.abs(w) * np.sqrt(squares)[:, None]
    assert (mask.sum(0) == 11 - round(0.4 * 11)).all()
    for column in range(7):
        assert scores[mask[:, column], column].min() > scores[~mask[:, column], column].max()


def test_wanda_n_of_m_and_ties():
    w, squares = np.array([[3.0, -1], [1, 1], [-2, 1], [0, -1]], np.float32), np.array([1, 25, 4, 1], np.float32)
    np.testing.assert_array_equal(
        wanda_mask(jnp.asarray(w), jnp.asarray(squares), n=2, m=4), [[False, False], [True, True], [True, True], [False, False]]
    )
    equal = wanda_mask(jnp.ones((6, 2)), jnp.ones(6), sparsity=0.5)
    np.testing.assert_array_equal(equal, np.repeat(np.arange(6) < 3, 2).reshape(6, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither a sparsity nor n and m"),
        ({"n": 2}, "neither a sparsity nor n and m"),
        ({"sparsity": 0.5, "n": 2, "m": 4}, "both sparsity=0.5 and 2:4"),
        ({"sparsity": 1.0}, "sparsity 1.0 is given"),
        ({"sparsity": -0.1}, "sparsity -0.1 is given"),
        ({"sparsity": float("nan")}, "sparsity nan is given"),
        ({"n": 4, "m": 2}, "4:2 is given"),
        ({"n": 0, "m": 4}, "0:4 is given"),
        ({"n": 2, "m": 5}, "has 6 inputs, which 5 does not divide"),
        ({"sparsity": 0.5, "method": sparsegpt(block=0)}, "block of 0"),
        ({"n": 1, "m": 3, "method": sparsegpt(block=4)}, "block of 4 inputs is given; expected a multiple of 3"),
        ({"sparsity": 0.5, "method": sparsegpt(damp=-1)}, "damping of -1"),
        ({"sparsity": 0.5, "batches": []}, "no calibration data"),
        ({"sparsity": 0.5, "batches": iter(())}, "no calibration data"),
        ({"sparsity": 0.5, "samples": 0}, "samples=0"),
        ({"sparsity": 0.5, "where": "table"}, "there is no linear layer to prune: table: it is used by gather"),
        ({"sparsity": 0.5, "where": "unused"}, "unused: the function does not use it"),
        ({"sparsity": 0.5, "where": "absent"}, "matches none"),
        ({"n": 2, "m": 3, "allocation": owl()}, "owl spreads a sparsity, and 2:3"),
        ({"sparsity": 0.5, "allocation": global_threshold()}, "calibration takes owl\\(\\), uniform\\(\\) or none"),
        ({"sparsity": 0.05, "allocation": owl()}, "0.05 \\+- 0.08 is not within"),
        ({"sparsity": 0.5, "batches": [np.zeros(3, int), np.zeros(4, int)]}, "must be alike: in batch 1"),
    ],
)
def test_errors_before_any_work(settings, message):
    params = {"kernel": jnp.ones((6, 2)), "table": jnp.ones((4, 6)), "unused": jnp.ones((2, 2))}
    settings = {"batches": [np.zeros(3, np.int64)], "method": wanda(), **settings}
    with pytest.raises(ValueError, match=message) as raised:
        layerwise(lambda p, b: p["table"][b] @ p["kernel"], params, settings.pop("batches"), settings.pop("method"), **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("outlier", "spread"), [(0, 0.1), (5, 0), (float("nan"), 0.1)])
def test_owl_settings(outlier, spread):
    with pytest.raises(ValueError, match="expected numbers above 0"):
        owl(outlier, spread)


@pytest.mark.parametrize(
    "call", [lambda w: wanda_mask(w, jnp.ones(3), sparsity=0.5), lambda w: sparsegpt_update(w, jnp.eye(3), n=2, m=4)]
)
def test_statistics_of_another_size(call):
    with pytest.raises(ValueError, match="has shape"):
        call(jnp.ones((4, 2)))


def test_inputs_that_are_not_finite_are_an_error():
    batch = {"inputs": np.full((4, 6), np.inf, np.float32)}
    with pytest.raises(ValueError, match="pruning kernel by wanda gives numbers that are not finite"):
        layerwise(lambda p, b: b["inputs"] @ p["kernel"], {"kernel": jnp.ones((6, 2))}, [batch], wanda(), sparsity=0.5)


def test_samples_bound_what_is_read():
    read = []

    def batches():
        for seed in range(10):
            read.append(seed)
            yield {"inputs": correlated(4, 6, seed)}

    fn = lambda p, b: b["inputs"] @ p["kernel"]
    found = layerwise(fn, {"kernel": jnp.asarray(kernel(6, 5))}, batches(), wanda(), sparsity=0.5, samples=7)
    assert read[:2] == [0, 1] and len(read) <= 3
    squares = (np.concatenate([correlated(4, 6, 0), correlated(4, 6, 1)]) ** 2).mean(0)
    np.testing.assert_array_equal(
        found.masks["kernel"], wanda_mask(jnp.asarray(kernel(6, 5)), jnp.asarray(squares), sparsity=0.5)
    )


@pytest.mark.parametrize(("own", "asked"), [("pruned", None), ("dense", None), ("dense", "pruned"), ("pruned", "dense")])
def test_a_method_sees_the_pruned_network_or_the_dense_one(own, asked):
    """Keeps the first input of each layer only; the second layer sees what that makes, or what was there before."""
    seen = []

    def first_only(kernel, inputs, target):
        seen.append(np.asarray(inputs.square_mean()))
        mask = jnp.broadcast_to(jnp.arange(kernel.shape[0])[:, None] == 0, kernel.shape)
        return jnp.where(mask, kernel, 0), mask, "mine"

    params, x = {"a": kernel(4, 6), "b": kernel(6, 2)}, correlated(8, 4)
    fn, method = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], Method(first_only, inputs=own)
    found = layerwise(fn, params, [x], method, sparsity=0.5, inputs=asked)
    used = 1 if (asked or own) == "pruned" else 4
    np.testing.assert_allclose(seen[1], (np.tanh(x[:, :used] @ params["a"][:used]) ** 2).mean(0), rtol=1e-5)
    assert [(row.path, row.layer, row.note) for row in found.rows] == [("a", (), "mine"), ("b", (), "mine")]
    np.testing.assert_allclose([row.sparsity for row in found.rows], [3 / 4, 5 / 6], rtol=1e-6)
    for name in ("a", "b"):
        np.testing.assert_array_equal(found.params[name], np.where(found.masks[name], params[name], 0))


def test_stacked_layers_are_all_pruned_by_the_dense_network():
    params, x = {"layers": jnp.stack([kernel(4, 4) for _ in range(3)])}, correlated(8, 4)
    fn = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0]
    found = layerwise(fn, params, [x], wanda(), n=2, m=4)
    h = x
    for i, w in enumerate(np.asarray(params["layers"])):
        np.testing.assert_array_equal(found.masks["layers"][i], wanda_mask(w, (h**2).mean(0), n=2, m=4))
        h = np.tanh(h @ w)
    np.testing.assert_array_equal(found.params["layers"], np.where(found.masks["layers"], params["layers"], 0))


def test_kernels_in_bfloat16_stay_so():
    params = {"kernel": jnp.asarray(kernel(16, 8), jnp.bfloat16)}
    found = layerwise(lambda p, x: x @ p["kernel"], params, [correlated(50, 16)], sparsegpt(), n=2, m=4)
    assert found.params["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.params["kernel"] != 0, found.masks["kernel"])


# OWL


def test_owl_sparsities_keep_the_mean_and_the_spread():
    ratios, sizes = [0.01, 0.05, 0.02], [100, 300, 200]
    found = np.array(owl_sparsities(ratios, sizes, 0.7, 0.08))
    np.testing.assert_allclose(np.average(found, weights=sizes), 0.7, rtol=1e-12)
    np.testing.assert_allclose(np.abs(found - 0.7).max(), 0.08, rtol=1e-12)
    assert (np.argsort(found) == [1, 2, 0]).all()  # more outliers, less sparsity
    # Differences are those of the ratios, in one scale.
    np.testing.assert_allclose((found[0] - found[1]) / (found[0] - found[2]), 4.0)
    assert owl_sparsities([0.1, 0.1], [1, 1], 0.5, 0.08) == [0.5, 0.5]


def test_owl_counts_outliers_by_block_and_prunes_by_them():
    """Block "one" has 2 scores above 3 times its mean, block "two" none; both of its kernels are counted together."""
    x = np.ones((4, 8), np.float32)
    params = {name: {"p": np.ones((8, 8), np.float32), "q": np.ones((8, 8), np.float32)} for name in ("block_1", "block_2")}
    params["block_1"]["p"][0, :2] = 50.0
    # Squashed to about 1, so that all inputs are alike.
    fn = lambda p, x: functools.reduce(lambda x, w: jnp.sign(x @ w), [p[b][k] for b in sorted(p) for k in sorted(p[b])], x)
    found = layerwise(fn, params, [x], wanda(), sparsity=0.5, allocation=owl(outlier=3.0, spread=0.125))
    assert [row.path for row in found.rows] == ["block_1/p", "block_1/q", "block_2/p", "block_2/q"]
    np.testing.assert_allclose([row.sparsity for row in found.rows], [0.375, 0.375, 0.625, 0.625])


# Whole networks


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def tokens():
    return np.random.default_rng(0).integers(0, 11, (8, 6)).astype(np.int32)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.second = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x)))


NETWORKS = {
    "decoder": lambda: (Decoder(layers=2, width=8, heads=2, neurons=12).build((6,), 11), tokens()),
    "encoder": lambda: (Encoder(layers=2, width=8, heads=2, neurons=12).build((6,), 11), tokens()),
    "vit": lambda: (Transformer(layers=2, width=8, heads=2, neurons=12).build((4, 4, 1), 3), normal(8, 4, 4, 1)),
    "resnet": lambda: (ResNet(8, width=4).build((4, 4, 4), 3), normal(8, 4, 4, 4)),
    "mlp": lambda: (Residual(layers=2, width=8, neurons=12).build((5,), 3), normal(8, 5)),
    "nnx": lambda: (adapters.nnx(Net), normal(8, 4)),
}


@functools.cache
def network(name):
    model, inputs = NETWORKS[name]()
    batch = {"inputs": inputs, "id": np.arange(8, dtype=np.int32), "weights": np.ones(inputs.shape[: 1 + (inputs.ndim == 2)])}
    if name in ("mlp", "nnx"):
        batch["weights"] = np.ones(8)
    return model, *model.init(jax.random.key(0), batch), batch


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_two_of_four(name):
    method = sparsegpt(block=8) if name in ("decoder", "resnet") else wanda()
    model, params, state, batch = network(name)
    found = layerwise(model, params, [batch, batch], method, n=2, m=4, state=state)
    masks = trees.paths(found.masks)
    assert any(mask.ndim for mask in masks.values())
    for path, new in trees.paths(found.params).items():
        if masks[path].ndim:
            assert not np.any(np.asarray(new)[~np.asarray(masks[path])])  # a tap that sees nothing but padding may be 0 too
            assert path.removesuffix("/value").endswith("kernel") and not path.startswith(("embed", "head"))
        else:
            assert masks[path] and new is trees.paths(params)[path]
    assert all(row.sparsity == 0.5 and 0 < row.error < 1 for row in found.rows)
    for layer in {row.layer for row in found.rows if row.layer}:
        mask = masks[next(row.path for row in found.rows if row.layer)][layer]
        assert (mask.reshape(-1, 4, mask[0].size).sum(1) == 2).all()


def test_uniform_is_what_is_done_without_an_allocation():
    params, x = {"kernel": kernel(8, 5)}, correlated(20, 8)
    found = [
        layerwise(lambda p, x: x @ p["kernel"], params, [x], wanda(), sparsity=0.5, allocation=allocation)
        for allocation in (None, uniform())
    ]
    jax.tree.map(np.testing.assert_array_equal, found[0].masks, found[1].masks)


def test_owl_on_scanned_layers():
    model, params, state, batch = network("decoder")
    found = layerwise(model, params, [batch], wanda(), sparsity=0.5, state=state, allocation=owl(2.0, 0.25))
    by_layer = [{row.sparsity for row in found.rows if row.layer == (i,)} for i in range(2)]
    # 8 or 12 inputs: a quarter or three quarters of them.
    assert sorted(map(sorted, by_layer)) == [[0.25], [0.75]]


@pytest.mark.parametrize(
    ("mesh", "method", "target"),
    [
        ("data=2,fsdp=2,tensor=2", wanda(), {"sparsity": 0.5}),
        ("data=8", sparsegpt(block=8), {"sparsity": 0.5}),
        ("data=2,fsdp=2,tensor=2", sparsegpt(block=8), {"n": 2, "m": 4}),
    ],
)
def test_eight_devices_give_what_one_gives(mesh, method, target):
    model, params, state, batch = network("decoder")
    batch = {**batch, "weights": np.where(np.arange(48).reshape(8, 6) % 5 == 0, 0.0, 1.0)}
    alone = layerwise(model, params, [batch, batch], method, **target, state=state)
    mesh = parallel.make_mesh(mesh)
    shardings = parallel.partition(params, model.rules, mesh)
    together = layerwise(
        model, jax.device_put(params, shardings), [parallel.put_batch(batch, mesh)] * 2, method, **target, state=state
    )
    jax.tree.map(np.testing.assert_array_equal, together.masks, alone.masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), together.params, alone.params)
    assert all(
        jax.tree.leaves(jax.tree.map(lambda leaf, at: leaf.sharding.is_equivalent_to(at, leaf.ndim), together.params, shardings))
    )
