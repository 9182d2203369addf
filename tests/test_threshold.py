import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bmjax.prune import kth_largest, threshold, topk_mask
from bmjax.prune.threshold import largest

largest_of_one = jax.jit(lambda x, k: largest([x], k)[0])


def reference(scores, k):
    """The k largest by a stable sort in float64: NaN last, ties by flat index. Flat bool."""
    flat = np.concatenate([np.asarray(x).astype(np.float64).ravel() for x in scores])
    order = np.lexsort((np.arange(flat.size), -np.where(np.isnan(flat), -np.inf, flat), np.isnan(flat)))
    mask = np.zeros(flat.size, bool)
    mask[order[:k]] = True
    return mask


def draw(rng, shape, kind):
    x = rng.normal(size=shape).astype(np.float32)
    if kind == "tied":
        x = np.round(x * 2)
    if kind == "zeros":
        x.flat[::3] = 0.0
        x.flat[::6] = -0.0
    if kind == "extremes":
        x.flat[:6] = [np.inf, -np.inf, np.nan, np.finfo(np.float32).max, np.nan, np.inf]
    if kind == "skewed":
        x = np.exp(12 * x).astype(np.float32)
    if kind == "constant":
        x[:] = 3.0
    return x


@pytest.mark.parametrize("shape", [(7,), (33, 5), (64, 64), (3, 3, 5, 10), (129, 1), (1, 1009)])
def test_largest_equals_a_stable_sort(shape):
    rng = np.random.default_rng(0)
    for kind in ("normal", "tied", "zeros", "extremes", "skewed", "constant"):
        x = draw(rng, shape, kind)
        for k in {0, 1, x.size // 5, int(rng.integers(x.size)), x.size - 1, x.size}:
            got = np.asarray(largest_of_one(x, k)).ravel()
            np.testing.assert_array_equal(got, reference([x], k), err_msg=f"{kind} {k}")


@pytest.mark.parametrize("across", [False, True])
def test_sampling_first_changes_nothing(monkeypatch, across):
    monkeypatch.setattr(threshold, "_MANY", 1)
    rng = np.random.default_rng(5)
    run = jax.jit(lambda xs, ks: largest(xs, ks, across))
    for kind in ("normal", "tied", "zeros", "extremes", "skewed", "constant"):
        xs = [draw(rng, (40, 96), kind), draw(rng, (300,), kind)]
        for share in (0.0, 0.01, 0.5, 1.0):
            ks = [round(share * x.size) for x in xs]
            masks = run(xs, np.array(sum(ks) if across else ks))
            if across:
                flat = np.concatenate([np.asarray(mask).ravel() for mask in masks])
                np.testing.assert_array_equal(flat, reference(xs, sum(ks)), err_msg=f"{kind} {ks}")
            else:
                for x, k, mask in zip(xs, ks, masks):
                    np.testing.assert_array_equal(np.asarray(mask).ravel(), reference([x], k), err_msg=f"{kind} {k}")


def test_denormal_scores_keep_their_order():
    x = np.arange(1, 50, dtype=np.int32).view(np.float32)
    np.testing.assert_array_equal(np.asarray(largest_of_one(x, 20)), np.arange(49) >= 29)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "bool"])
def test_other_dtypes(dtype):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(9, 14)) * 3).astype(dtype)
    np.testing.assert_array_equal(np.asarray(largest_of_one(x, 40)).ravel(), reference([np.asarray(x, np.float32)], 40))


def test_several_arrays_each_and_across():
    rng = np.random.default_rng(2)
    xs = [draw(rng, shape, "tied") for shape in [(5, 6), (), (40,), (2, 3, 4)]]
    each = jax.jit(lambda xs, ks: largest(xs, ks))(xs, np.array([7, 1, 11, 0]))
    for x, k, mask in zip(xs, [7, 1, 11, 0], each):
        assert mask.shape == x.shape
        np.testing.assert_array_equal(np.asarray(mask).ravel(), reference([x], k))
    across = jax.jit(lambda xs, k: largest(xs, k, across=True))(xs, 31)
    flat = np.concatenate([np.asarray(mask).ravel() for mask in across])
    np.testing.assert_array_equal(flat, reference(xs, 31))


def test_a_clean_cut_among_equals_beside_a_tied_one():
    up = np.ones(24, np.float32)
    up[::2] = 0.5
    ones = np.ones(12, np.float32)  # ties are broken here, while the other array's cut lies between its two values
    masks = jax.jit(lambda xs, ks: largest(xs, ks))([up, ones], np.array([12, 6]))
    np.testing.assert_array_equal(masks[0], reference([up], 12))
    np.testing.assert_array_equal(masks[1], reference([ones], 6))


def test_kth_largest_equals_a_sort():
    rng = np.random.default_rng(3)
    kth = jax.jit(kth_largest)
    for kind in ("normal", "tied", "zeros", "skewed"):
        tree = {"a": draw(rng, (31, 7), kind), "b": [draw(rng, (50,), kind)]}
        descending = np.sort(np.concatenate([tree["a"].ravel(), tree["b"][0]]))[::-1]
        for k in (1, 2, 50, 130, 267):
            assert float(kth(tree, k)) == descending[k - 1], (kind, k)
    assert np.isnan(kth_largest(jnp.array([1.0, np.nan, 2.0]), 3))
    assert float(kth_largest(jnp.array([1.0, -np.inf, 2.0]), 3)) == -np.inf


def test_topk_mask_keeps_n_minus_rounded_share():
    x = jnp.ones((3, 5))
    mask = np.asarray(topk_mask(x, 0.5)).ravel()  # round(7.5) = 8 dropped, the lower index first among ties
    np.testing.assert_array_equal(mask, np.arange(15) < 7)
    tree = topk_mask({"a": jnp.array([1.0, 5.0]), "b": jnp.array([4.0, 3.0])}, 0.5)
    np.testing.assert_array_equal(tree["a"], [False, True])
    np.testing.assert_array_equal(tree["b"], [True, False])


@pytest.mark.parametrize(
    ("shape", "spec", "sampled"),
    [
        ((16, 64), P("fsdp", "tensor"), False),
        ((16, 72), P(None, ("fsdp", "tensor")), False),
        ((16, 72), P(None, ("fsdp", "tensor")), True),
        ((8, 3, 24), P("tensor", None, "fsdp"), False),
    ],
)
def test_partitioned_scores_give_the_same_mask_without_a_gather(monkeypatch, shape, spec, sampled):
    monkeypatch.setattr(threshold, "_MANY", 1 if sampled else 2**20)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, spec)
    x = draw(np.random.default_rng(4), shape, "tied")
    k = x.size // 3
    run = jax.jit(lambda x, k: largest([x], k)[0], in_shardings=(sharding, None), out_shardings=sharding)
    compiled = run.lower(jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()
    assert "all-reduce" in compiled
    for gather in ("all-gather", "all-to-all", "collective-permute", " sort("):
        assert gather not in compiled, gather
    np.testing.assert_array_equal(np.asarray(run(jax.device_put(x, sharding), k)).ravel(), reference([x], k))


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match=r"sparsity 1\.0 is given"):
        topk_mask(jnp.ones(3), 1.0)
    with pytest.raises(ValueError, match="the 4-th largest of 3 scores"):
        kth_largest(jnp.ones(3), 4)
    with pytest.raises(ValueError, match="no scores to rank"):
        largest([jnp.ones((0, 3))], 0)
    with pytest.raises(ValueError, match=r"fewer than 2\^31"):
        jax.eval_shape(lambda x: topk_mask(x, 0.5), jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32))
