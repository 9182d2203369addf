import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bmjax.prune import block_mask, counting, kth_largest, nm_mask, ranking, topk_mask, words
from bmjax.prune.threshold import largest, rank, remaining

KINDS = ("normal", "tied", "zeros", "extremes", "skewed", "constant", "sorted")
largest_of_one = jax.jit(lambda x, k: largest([x], k)[0])


@pytest.fixture
def fresh(monkeypatch):
    """monkeypatch for constants that compiled programs hold."""
    jax.clear_caches()
    yield monkeypatch
    jax.clear_caches()


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
    if kind == "sorted":  # scores that are close together stand in the same row
        x = np.sort(x, axis=None).reshape(shape)
    return x


@pytest.mark.parametrize("shape", [(7,), (33, 5), (64, 64), (3, 3, 5, 10), (129, 1), (1, 1009)])
def test_largest_equals_a_stable_sort(shape):
    rng = np.random.default_rng(0)
    for kind in KINDS:
        x = draw(rng, shape, kind)
        for k in {0, 1, x.size // 5, int(rng.integers(x.size)), x.size - 1, x.size}:
            got = np.asarray(largest_of_one(x, k)).ravel()
            np.testing.assert_array_equal(got, reference([x], k), err_msg=f"{kind} {k}")


@pytest.mark.parametrize("across", [False, True])
def test_sampling_first_changes_nothing(fresh, across):
    fresh.setattr(ranking, "_MANY", 1)
    rng = np.random.default_rng(5)
    run = jax.jit(lambda xs, ks: largest(xs, ks, across))
    for kind in KINDS:
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
    assert np.isnan(jax.jit(lambda x: kth_largest(x, 3))(jnp.array([1.0, np.nan, 2.0])))
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
def test_partitioned_scores_give_the_same_mask_without_a_gather(fresh, shape, spec, sampled):
    fresh.setattr(ranking, "_MANY", 1 if sampled else 2**20)
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
    with pytest.raises(ValueError, match=r"fewer than 2\^32"):
        jax.eval_shape(lambda x: topk_mask(x, 0.5), jax.ShapeDtypeStruct((2**17, 2**15), jnp.float32))
    with pytest.raises(ValueError, match="3:2 is given"):
        nm_mask(jnp.ones((4, 2)), 3, 2)
    with pytest.raises(ValueError, match=r"\[6, 2\] has 6 entries, which 4 does not divide"):
        nm_mask(jnp.ones((6, 2)), 2, 4)
    with pytest.raises(ValueError, match="no such axis"):
        nm_mask(jnp.float32(1), 2, 4)
    with pytest.raises(ValueError, match="blocks of 2 x 3 do not divide"):
        block_mask(jnp.ones((4, 4)), 0.5, (2, 3))
    with pytest.raises(ValueError, match="5 of 3 scores are to be kept"):
        rank([jnp.ones(3)], 5)


def stacked_reference(x, ks):
    return np.stack([reference([layer], k).reshape(layer.shape) for layer, k in zip(x, ks)])


def test_each_layer_of_a_stack_is_ranked_by_itself():
    rng = np.random.default_rng(8)
    for kind in ("normal", "tied", "extremes", "constant"):
        stack, single = draw(rng, (3, 6, 10), kind), draw(rng, (7, 5), kind)
        ks = [10, 0, 60, 17]
        found = jax.jit(lambda a, b, k: rank([a, b], k, stacks=[1, 0]))(stack, single, jnp.array(ks))
        np.testing.assert_array_equal(found.masks[0], stacked_reference(stack, ks), err_msg=kind)
        np.testing.assert_array_equal(np.asarray(found.masks[1]).ravel(), reference([single], 17), err_msg=kind)
        assert found.cuts.shape == (4,)


@pytest.mark.parametrize("sampled", [False, True])
def test_an_earlier_cut_saves_passes_and_changes_nothing(fresh, sampled):
    fresh.setattr(ranking, "_MANY", 1 if sampled else 2**20)
    passes = []
    one_pass = counting.at_least

    def counted(scores, ranks):
        if scores.size == 64 * 480:  # not of the sample
            jax.debug.callback(lambda: passes.append(1))
        return one_pass(scores, ranks)

    fresh.setattr(counting, "at_least", counted)
    run = jax.jit(lambda x, k, near: rank([x], k, near=near))
    rng = np.random.default_rng(9)
    none = np.zeros(1, np.uint32)
    x = draw(rng, (64, 480), "normal")
    spent = []
    for near in (none, run(x, 3000, none).cuts):
        jax.effects_barrier()
        passes.clear()
        run(x * np.float32(1 + 2**-14), 3000, near).masks[0].block_until_ready()
        jax.effects_barrier()
        spent.append(len(passes))
    assert spent[1] < spent[0], spent
    earlier = run(x, 3000, none).cuts
    for kind in KINDS:
        x = draw(rng, (64, 480), kind)
        for k in (0, 1, 3000, x.size):
            for near in (earlier, none, np.full(1, 2**32 - 1, np.uint32)):
                mask = run(x, k, near).masks[0]
                np.testing.assert_array_equal(np.asarray(mask).ravel(), reference([x], k), err_msg=f"{kind} {k} {near}")


def test_packed_rows_say_which_score_is_where():
    scores = jnp.array([[1.0, 5.0, 5.1, 2.0, 5.07, 3.0, 5.05, 5.05]])  # [layers, C]
    lo, hi = counting_ranks(5.0), counting_ranks(5.1)
    rows = counting.pack(scores, lo, hi)
    assert rows.shape == (1, 8)  # 8 devices may share this axis
    assert not counting.crowded(rows)[0]
    found = counting.packed_at_least(rows, jnp.stack([counting_ranks(5.05) - lo, counting_ranks(5.07) - lo], axis=-1))
    np.testing.assert_array_equal(found, [[3, 1]])
    np.testing.assert_array_equal(counting.equals(rows, lo, hi, counting_ranks(5.05))[0] != 0, [0, 0, 0, 0, 0, 0, 1, 1])
    crowd = counting.pack(jnp.full((1, 256), 5.0), lo, hi)
    assert counting.crowded(crowd)[0]
    bits = counting.pack(jnp.full((1, 256), 5.0), lo, lo + 1)
    np.testing.assert_array_equal(bits, np.full((1, 8), 2**32 - 1, np.uint32))


def counting_ranks(value):
    """The rank of a positive float: its bits above those of zero."""
    return jnp.array([counting.INFINITY + 1], jnp.uint32) + np.float32(value).view(np.uint32)


def test_counts_in_two_words(fresh):
    fresh.setattr(words, "BASE", 16)
    rng = np.random.default_rng(10)
    xs = [draw(rng, (9, 31), "tied"), draw(rng, (4, 8), "normal")]
    run = jax.jit(lambda xs, high, low: rank(xs, words.Words(high, low), across=True).masks)
    for k in (0, 15, 16, 17, 255, 256, 311):
        masks = run(xs, *words.words([k]))
        flat = np.concatenate([np.asarray(mask).ravel() for mask in masks])
        np.testing.assert_array_equal(flat, reference(xs, k), err_msg=str(k))


def test_words_beyond_32_bits():
    for number in (0, 1, 2**31, 2**32 + 12345, 2**45 + 7):
        word = words.words([number])
        assert int(word.high[0]) * words.BASE + int(word.low[0]) == number
    size = 5_000_000_019
    left = remaining([size, size, 10], [0.7, 0.7, 0.55], jnp.array([1.0, 0.0, 1.0]))
    exact = [int(high) * words.BASE + int(low) for high, low in zip(left.high, left.low)]
    assert exact == [size - round(0.7 * size), size, 10 - round(0.55 * 10)]


def test_remaining_follows_the_fraction_and_lands_exactly():
    for fraction in (0.0, 0.25, 0.5, 0.999, 1.0):
        left = jax.jit(lambda f: remaining([97, 64], [0.8, 0.5], f, least=1))(jnp.float32(fraction))
        expected = [97 - int(fraction * round(0.8 * 97)), 64 - int(fraction * 32)]
        np.testing.assert_array_equal(left.high * words.BASE + left.low, expected)


def test_arrays_of_more_than_int32_counts_are_ranked():
    half = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    masks = jax.eval_shape(lambda xs: rank(xs, 2**32 + 5, across=True).masks, [half] * 3)
    assert [mask.shape for mask in masks] == [half.shape] * 3


def nm_reference(x, n, m, axis):
    moved = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    rows = moved.reshape(-1, m)
    mask = np.stack([reference([row], n) for row in rows]).reshape(moved.shape)
    return np.moveaxis(mask, -1, axis)


@pytest.mark.parametrize(("shape", "axis"), [((8,), 0), ((8, 5), -2), ((3, 12, 2), 1), ((2, 3, 4, 8), -1)])
def test_nm_mask_equals_a_sort(shape, axis):
    rng = np.random.default_rng(11)
    for kind in ("normal", "tied", "zeros", "constant"):
        x = draw(rng, shape, kind)
        for n in (0, 1, 2, 4):
            np.testing.assert_array_equal(nm_mask(x, n, 4, axis), nm_reference(x, n, 4, axis), err_msg=f"{kind} {n}")
    x = x.copy()
    x.flat[:4] = [np.nan, -np.inf, np.nan, -0.0]
    traced = jax.jit(lambda x, n: nm_mask(x, n, 4, axis))
    np.testing.assert_array_equal(traced(x, 2), nm_reference(x, 2, 4, axis))


def test_block_mask_drops_the_smallest_sums():
    x = np.abs(np.random.default_rng(12).normal(size=(2, 6, 8))).astype(np.float32)
    sums = x.reshape(2, 3, 2, 2, 4).sum((2, 4))
    kept = reference([sums], 12 - round(0.4 * 12)).reshape(sums.shape)
    np.testing.assert_array_equal(block_mask(x, 0.4, (2, 4)), kept.repeat(2, axis=1).repeat(4, axis=2))


@pytest.mark.parametrize("spec", [P("fsdp"), P(None, "fsdp"), P(None, None, "fsdp")])
def test_patterns_gather_nothing_when_partitioned(spec):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, spec)
    x = np.random.default_rng(13).normal(size=(32, 32, 64)).astype(np.float32)
    kinds = {"nm": lambda x: nm_mask(x, 2, 4), "block": lambda x: block_mask(x, 0.5, (4, 8))}
    if spec != P("fsdp"):  # stacked layers are whole on each device
        kinds["stacked"] = lambda x: rank([x], [900] * 32, stacks=[1]).masks[0]
    for axis in (0, 2):
        kinds[f"nm along {axis}"] = lambda x, axis=axis: nm_mask(x, 2, 4, axis)
    for name, fn in kinds.items():
        run = jax.jit(fn, in_shardings=sharding, out_shardings=sharding)
        compiled = run.lower(jax.ShapeDtypeStruct(x.shape, jnp.float32)).compile().as_text()
        assert "all-gather" not in compiled, name
        np.testing.assert_array_equal(run(jax.device_put(x, sharding)), jax.jit(fn)(x), err_msg=name)


def test_across_arrays_partitioned_in_different_ways():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shardings = [NamedSharding(mesh, spec) for spec in (P("fsdp", "tensor"), P("tensor", "fsdp"), P())]
    xs = [draw(np.random.default_rng(i), shape, "tied") for i, shape in enumerate([(16, 64), (16, 64), (24,)])]
    run = jax.jit(lambda xs: rank(xs, 700, across=True).masks, in_shardings=(shardings,), out_shardings=shardings)
    compiled = run.lower([jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs]).compile().as_text()
    for gather in ("all-gather", "all-to-all", "collective-permute", " sort("):
        assert gather not in compiled, gather
    masks = run([jax.device_put(x, sharding) for x, sharding in zip(xs, shardings)])
    np.testing.assert_array_equal(np.concatenate([np.asarray(mask).ravel() for mask in masks]), reference(xs, 700))


def test_vmap_of_patterns():
    xs = np.random.default_rng(14).normal(size=(3, 8, 12)).astype(np.float32)
    for fn in (lambda x: nm_mask(x, 2, 4), lambda x: block_mask(x, 0.5, (2, 3))):
        np.testing.assert_array_equal(jax.jit(jax.vmap(fn))(xs), np.stack([fn(x) for x in xs]))


def test_vmap_ranks_each_model():
    xs = np.stack([draw(np.random.default_rng(i), (6, 10), kind) for i, kind in enumerate(("normal", "tied", "constant"))])
    masks = jax.jit(jax.vmap(lambda x, k: rank([x], k).masks[0]))(xs, jnp.array([7, 30, 12]))
    np.testing.assert_array_equal(masks, stacked_reference(xs, [7, 30, 12]))
