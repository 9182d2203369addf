"""Groups through convolutions, pooling, norms and what stands beside them: members, and masked equals replayed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_trace import assert_exact, by_name, inputs, places, random_params, shapes

from bmjax import shrink, trace, trees
from bmjax.models.norms import BatchNorm, GroupNorm


def convolve(x, kernel, strides=(1, 1), padding="SAME", **kwargs):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **kwargs)


def index_of(group, path, axis):
    return next(member.index.tolist() for member in group.members if (member.path, member.axis) == (path, axis))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"strides": (2, 1)},
        {"rhs_dilation": (2, 2)},
        {"lhs_dilation": (2, 2), "padding": ((2, 1), (1, 2))},  # transposed convolution
        {"padding": "VALID", "strides": (2, 2)},
    ],
)
def test_channels_of_convolutions_with_stride_and_dilation(kwargs):
    def fn(params, x):
        h = jax.nn.relu(convolve(x, params["a"], **kwargs) + params["bias"])
        return convolve(h, params["b"]).mean((1, 2)) @ params["head"]

    params, x = random_params(shapes(a=(3, 3, 2, 6), bias=(6,), b=(3, 3, 6, 5), head=(5, 3))), inputs(2, 7, 6, 2)
    traced, groups = trace.trace(fn, params, x), trace.groups(fn, params, x)
    assert [(group.size, group.note) for group in groups] == [(6, ""), (5, "")]
    assert places(groups[0]) == {("a", 3), ("bias", 0), ("b", 2)}
    assert places(groups[1]) == {("b", 3), ("head", 0)}
    assert {traced.frozen["a", axis] for axis in (0, 1)} == {"a window slides over it"}
    assert ("a", 2) in traced.frozen  # the image's own channels
    assert traced.report == ()
    assert_exact(fn, params, x, groups)


def test_channels_first_and_one_dimension():
    def fn(params, x):
        h = jax.lax.conv_general_dilated(x, params["a"], (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH"))
        return jnp.einsum("bch,cd->bd", jax.nn.relu(h), params["head"])

    params, x = random_params(shapes(a=(4, 2, 3), head=(4, 3))), inputs(2, 2, 5)
    groups = trace.groups(fn, params, x)
    assert [places(group) for group in groups] == [{("a", 0), ("head", 0)}]
    assert_exact(fn, params, x, groups)


def test_depthwise_convolution_loses_filters_with_its_channels():
    def fn(params, x):
        h = convolve(x, params["expand"])
        h = jax.nn.relu(convolve(h, params["depthwise"], feature_group_count=6))
        return convolve(h, params["project"]).mean((1, 2))

    sizes = shapes(expand=(1, 1, 2, 6), depthwise=(3, 3, 1, 6), project=(1, 1, 6, 3))
    params, x = random_params(sizes), inputs(2, 5, 5, 2)
    (group,) = groups = trace.groups(fn, params, x)
    assert (group.size, group.note) == (6, "")
    assert places(group) == {("expand", 3), ("depthwise", 3), ("project", 2)}
    assert_exact(fn, params, x, groups)
    keep = {group.name: np.arange(6) < 2}
    small = shrink.compact(params, groups, keep)
    replayed = jax.make_jaxpr(trace.trace(fn, params, x).replay(keep))(small, x)
    assert [eqn.params["feature_group_count"] for eqn in replayed.eqns if "conv" in eqn.primitive.name] == [1, 2, 1]


def test_depthwise_convolution_with_two_filters_a_channel():
    def fn(params, x):
        h = jax.nn.relu(convolve(convolve(x, params["expand"]), params["depthwise"], feature_group_count=3))
        return convolve(h, params["project"]).mean((1, 2))

    sizes = shapes(expand=(1, 1, 2, 3), depthwise=(3, 3, 1, 6), project=(1, 1, 6, 3))
    params, x = random_params(sizes), inputs(2, 5, 5, 2)
    groups = {group.size: group for group in trace.groups(fn, params, x)}
    assert index_of(groups[3], "depthwise", 3) == [[0, 1], [2, 3], [4, 5]]
    assert index_of(groups[3], "expand", 3) == [[0], [1], [2]]
    assert index_of(groups[2], "project", 2) == [[0, 2, 4], [1, 3, 5]]
    assert {group.note for group in groups.values()} == {""}
    assert_exact(fn, params, x, groups.values())


def test_grouped_convolution_loses_groups_or_one_place_in_each():
    def fn(params, x):
        h = jax.nn.relu(convolve(convolve(x, params["expand"]), params["grouped"], feature_group_count=4))
        return convolve(h, params["project"]).mean((1, 2))

    sizes = shapes(expand=(1, 1, 2, 8), grouped=(3, 3, 2, 12), project=(1, 1, 12, 3))  # 4 groups of 2 -> 3
    params, x = random_params(sizes), inputs(2, 5, 5, 2)
    groups = {group.size: group for group in trace.groups(fn, params, x)}
    assert places(groups[4]) == {("expand", 3), ("grouped", 3), ("project", 2)}
    assert index_of(groups[4], "expand", 3) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert index_of(groups[4], "grouped", 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert places(groups[2]) == {("expand", 3), ("grouped", 2)}
    assert index_of(groups[2], "expand", 3) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert places(groups[3]) == {("grouped", 3), ("project", 2)}
    assert {group.note for group in groups.values()} == {""}
    assert_exact(fn, params, x, groups.values())


def test_groups_of_a_convolution_that_cross_a_concatenation_are_frozen_and_reported():
    def fn(params, x):
        h = jnp.concatenate([convolve(x, params["a"]), convolve(x, params["b"])], -1)  # 3 + 5 channels in 2 groups of 4
        return convolve(jax.nn.relu(h), params["grouped"], feature_group_count=2).mean((1, 2))

    sizes = shapes(a=(1, 1, 2, 3), b=(1, 1, 2, 5), grouped=(3, 3, 4, 6))
    traced = trace.trace(fn, sizes, inputs(2, 5, 5, 2))
    assert traced.groups == ()
    assert any("4 does not divide an axis of 3" in line for line in traced.report)


def test_a_convolution_over_groups_of_the_batch_is_frozen_and_reported():
    fn = lambda params, x: convolve(x, params["a"], batch_group_count=2).mean((1, 2)) @ params["head"]
    traced = trace.trace(fn, shapes(a=(3, 3, 2, 4), head=(4, 3)), inputs(2, 5, 5, 2))
    assert traced.groups == ()
    assert any("conv_general_dilated" in line for line in traced.report)


@pytest.mark.parametrize(
    "pool",
    [
        lambda h: nn.max_pool(h, (2, 2), (2, 2)),
        lambda h: nn.max_pool(h, (3, 3), (2, 2), "SAME"),
        lambda h: nn.avg_pool(h, (2, 2), (2, 2)),
        lambda h: nn.avg_pool(h, (3, 3), (1, 1), "SAME", count_include_pad=False),
        lambda h: jax.lax.reduce_window(h, jnp.inf, jax.lax.min, (1, 2, 3, 1), (1, 1, 2, 1), "VALID"),
    ],
)
def test_pooling_passes_channels(pool):
    fn = lambda params, x: pool(jax.nn.relu(convolve(x, params["a"]))).mean((1, 2)) @ params["head"]
    params, x = random_params(shapes(a=(3, 3, 2, 6), head=(6, 3))), inputs(2, 6, 6, 2)
    groups = trace.groups(fn, params, x)
    assert [(places(group), group.note) for group in groups] == [({("a", 3), ("head", 0)}, "")]
    assert trace.trace(fn, params, x).report == ()
    assert_exact(fn, params, x, groups)


def test_pooling_over_channels_freezes_them():
    fn = lambda params, x: jax.lax.reduce_window(
        convolve(x, params["a"]), -jnp.inf, jax.lax.max, (1, 1, 1, 2), (1, 1, 1, 2), "VALID"
    ).mean((1, 2))
    traced = trace.trace(fn, shapes(a=(3, 3, 2, 6)), inputs(2, 6, 6, 2))
    assert traced.groups == ()
    assert traced.frozen["a", 3] == "a window slides over it"


class Normed(nn.Module):
    """conv-norm-relu-conv with a residual connection round a scanned stack of conv-norm-relu-conv."""

    @nn.compact
    def __call__(self, batch):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                y = nn.relu(BatchNorm(name="norm")(nn.Conv(5, (3, 3), name="up")(x), None, False))
                return x + BatchNorm(name="out")(nn.Conv(4, (3, 3), name="down")(y), None, False), None

        x = nn.relu(BatchNorm(name="stem_norm")(nn.Conv(4, (3, 3), use_bias=False, name="stem")(batch["inputs"]), None, False))
        stack = nn.scan(Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="stack")(x, None)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


NAMES = {"width": ("stem/kernel", 3), "inner": ("stack/up/kernel", 4), "layers": ("stack/up/kernel", 0)}


def normed():
    """(fn of params, state, x; params, state, x), random, with variances that are positive."""
    x = inputs(2, 5, 5, 2)
    variables = jax.eval_shape(lambda: Normed().init(jax.random.key(0), {"inputs": x}))
    rng = np.random.default_rng(4)
    state = jax.tree.map(lambda leaf: rng.uniform(0.3, 2, leaf.shape).astype(np.float32), variables["batch_stats"])
    fn = lambda params, state, x: Normed().apply({"params": params, "batch_stats": state}, {"inputs": x})
    return fn, random_params(variables["params"]), state, x


def test_batch_statistics_belong_to_channels_and_layers():
    fn, params, state, x = normed()
    groups = by_name(trace.groups(fn, params, x, names=NAMES, state=state))
    assert {name: (g.size, g.stack, g.note) for name, g in groups.items()} == {
        "width": (4, 0, ""), "inner": (5, 3, ""), "layers": (3, 0, "")
    }  # fmt: skip
    moments = lambda path, axis: {(f"{path}/mean", axis), (f"{path}/var", axis)}
    in_state = {name: {(m.path, m.axis) for m in group.state} for name, group in groups.items()}
    assert in_state["width"] == moments("stem_norm", 0) | moments("stack/out", 1)
    assert in_state["inner"] == moments("stack/norm", 1)
    assert in_state["layers"] == moments("stack/norm", 0) | moments("stack/out", 0)
    assert places(groups["inner"]) == {
        ("stack/up/kernel", 4), ("stack/up/bias", 1), ("stack/norm/scale", 1), ("stack/norm/bias", 1), ("stack/down/kernel", 3)
    }  # fmt: skip


def test_masked_parameters_with_whole_statistics_equal_the_replay_with_cut_ones():
    fn, params, state, x = normed()
    traced = trace.trace(fn, params, x, names=NAMES, state=state)
    rng = np.random.default_rng(5)
    keeps = {
        "width": np.array([1, 0, 1, 1], bool),
        "inner": rng.permuted(np.tile(np.arange(5), (3, 1)), axis=1) < 3,
        "layers": np.array([0, 1, 1], bool),
    }
    mask = trace.masks(traced.groups, keeps, params)
    masked = jax.tree.map(lambda leaf, keep: np.where(keep, leaf, 0), params, mask)
    small, cut = shrink.compact(params, traced.groups, keeps), shrink.compact_state(state, traced.groups, keeps)
    assert {path: leaf.shape for path, leaf in trees.paths(cut).items() if "mean" in path} == {
        "stem_norm/mean": (3,), "stack/norm/mean": (2, 3), "stack/out/mean": (2, 3)
    }  # fmt: skip
    rows = [state["stack"]["norm"]["var"][layer][keeps["inner"][layer]] for layer in (1, 2)]
    np.testing.assert_array_equal(cut["stack"]["norm"]["var"], rows)
    np.testing.assert_allclose(jax.jit(traced.replay(keeps))(small, cut, x), jax.jit(fn)(masked, state, x), atol=1e-5)
    with pytest.raises(ValueError, match=r"state stack/out/mean has shape \[3, 4\], expected \[3, 3\]"):
        traced.replay({"width": keeps["width"]})(shrink.compact(params, traced.groups, {"width": keeps["width"]}), state, x)


def test_statistics_that_are_closed_over_freeze_their_channels():
    fn, params, state, x = normed()
    names = set(by_name(trace.trace(lambda p, x: fn(p, state, x), params, x, names=NAMES).groups))
    assert names == set()


def test_group_norm_loses_whole_groups():
    def fn(params, x):
        h = GroupNorm(2).apply({"params": params["norm"]}, convolve(x, params["a"]))
        return jax.nn.relu(h).mean((1, 2)) @ params["head"]

    params = random_params({**shapes(a=(3, 3, 2, 6), head=(6, 3)), "norm": shapes(scale=(6,), bias=(6,))})
    x = inputs(2, 5, 5, 2)
    groups = {group.size: group for group in trace.groups(fn, params, x)}
    assert places(groups[3]) == {("a", 3), ("norm/scale", 0), ("norm/bias", 0), ("head", 0)}
    assert index_of(groups[3], "a", 3) == [[0, 1], [2, 3], [4, 5]]
    assert groups[3].note == ""
    assert "norm" in groups[2].note  # one channel of each group
    assert_exact(fn, params, x, groups.values())


def test_flax_norms_are_followed_too():
    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True, name="batch")(nn.Conv(6, (3, 3), name="conv")(x))
            return nn.Dense(3, name="head")(nn.relu(nn.GroupNorm(num_groups=3, name="group")(x)).mean((1, 2)))

    x = inputs(2, 5, 5, 2)
    variables = jax.eval_shape(lambda: Flax().init(jax.random.key(0), x))
    fn = lambda params, state, x: Flax().apply({"params": params, "batch_stats": state}, x)
    groups = trace.groups(fn, variables["params"], x, state=variables["batch_stats"])
    whole = next(group for group in groups if group.size == 3)
    assert whole.note == ""
    assert {(m.path, m.axis) for m in whole.state} == {("batch/mean", 0), ("batch/var", 0)}
    assert len(places(whole)) == 7


def test_dense_branches_joined_by_concatenation_stay_apart_through_a_convolution():
    def fn(params, x):
        h = jnp.concatenate([x, jax.nn.relu(convolve(x, params["a"])), jax.nn.relu(convolve(x, params["b"]))], -1)
        return convolve(h, params["c"]).mean((1, 2))

    params = random_params(shapes(a=(3, 3, 2, 4), b=(3, 3, 2, 3), c=(1, 1, 9, 3)))
    x = inputs(2, 5, 5, 2)
    a, b = groups = trace.groups(fn, params, x)
    assert (index_of(a, "c", 2), index_of(b, "c", 2)) == ([[2], [3], [4], [5]], [[6], [7], [8]])
    assert_exact(fn, params, x, groups)


def test_one_kernel_for_queries_keys_and_values_cut_in_three():
    """[D, 3 * 8] cut by slices, then two heads of 4."""

    def fn(params, x):
        q, k, v = (part.reshape(2, 5, 2, 4) for part in jnp.split(x @ params["qkv"] + params["bias"], 3, axis=-1))
        return jax.nn.dot_product_attention(q, k, v).reshape(2, 5, 8) @ params["out"]

    x, params = inputs(2, 5, 6), random_params(shapes(qkv=(6, 24), bias=(24,), out=(8, 6)))
    groups = by_name(trace.groups(fn, params, x, names={"heads": ("out", 0)}))
    heads = groups["heads"]
    assert (heads.size, heads.note) == (2, "")
    of_head_1 = np.concatenate([member.index[1] for member in heads.members if member.path == "qkv"])
    assert sorted(of_head_1) == [*range(4, 8), *range(12, 16), *range(20, 24)]
    assert_exact(fn, params, x, groups.values(), {"heads": ("out", 0)})


def test_embedding_tied_to_the_logits_through_a_scan_loses_width():
    def fn(params, ids):
        block = lambda h, layer: (h + jax.nn.relu(h @ layer["up"]) @ layer["down"], None)
        h, _ = jax.lax.scan(block, params["table"][ids] * 2.0, params["stack"])
        return jnp.einsum("btd,vd->btv", h, params["table"])

    params = random_params({"table": shapes(t=(7, 6))["t"], "stack": shapes(up=(2, 6, 4), down=(2, 4, 6))})
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    names = {"width": ("table", 1)}
    width = by_name(trace.groups(fn, params, ids, names=names))["width"]
    assert (places(width), width.note) == ({("table", 1), ("stack/up", 1), ("stack/down", 2)}, "")
    assert_exact(fn, params, ids, [width], names)


def test_reversal_and_slices_at_computed_places_freeze_only_their_own_axis():
    def fn(params, x):
        h = jax.nn.relu(x @ params["up"])[:, ::-1]
        h = jax.lax.dynamic_slice_in_dim(h, jnp.argmax(x[0, :, 0]) // 2, 2, axis=1)
        return h @ params["down"]

    params, x = random_params(shapes(up=(5, 4), down=(4, 3))), inputs(2, 4, 5)
    traced, groups = trace.trace(fn, params, x), trace.groups(fn, params, x)
    assert [(places(group), group.note) for group in groups] == [({("up", 1), ("down", 0)}, "")]
    assert traced.report == ()
    assert_exact(fn, params, x, groups)
    turned = lambda params, x: (x @ params["up"])[..., ::-1] @ params["down"]
    assert trace.trace(turned, params, x).frozen["up", 1] == "it is reversed"
    part = lambda params, x: jax.lax.dynamic_slice_in_dim(x @ params["up"], jnp.argmax(x[0, 0]), 2, axis=2)
    assert trace.trace(part, params, x).frozen["up", 1] == "it is sliced at a computed place"
