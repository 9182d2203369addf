import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax import trace, trees
from bmjax.models.mlp import PlainMLP, ResidualMLP
from bmjax.models.vit import ViT


def random_params(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape)).astype(np.float32), shapes)


def linen(module, x, **kwargs):
    """(fn, random params) of a Linen module."""
    batch = {"inputs": x}
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), batch))["params"]
    return lambda p, x: module.apply({"params": p}, {"inputs": x}, **kwargs), random_params(params)


def shapes(**kwargs):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in kwargs.items()}


def inputs(*shape):
    return np.random.default_rng(9).normal(size=shape).astype(np.float32)


def places(group):
    return {(member.path, member.axis) for member in group.members}


def by_name(groups):
    return {group.name: group for group in groups}


def remove(params, group, keep):
    """(masked, small) parameters, in plain NumPy, for an unstacked group."""
    masked, small = trees.paths(params), trees.paths(params)
    for path, axis, index in group.members:
        gone = index[~keep].ravel()
        masked[path] = np.array(masked[path])
        masked[path][(slice(None),) * axis + (gone,)] = 0
    dropped = {}
    for path, axis, index in group.members:
        dropped.setdefault((path, axis), set()).update(index[~keep].ravel().tolist())
    for (path, axis), gone in dropped.items():
        small[path] = np.delete(small[path], sorted(gone), axis)
    return trees.replace(params, masked), trees.replace(params, small)


def assert_exact(fn, params, x, groups, names=None):
    """Each unnoted, unstacked group: the function with zeros equals the replay without them."""
    traced, whole = trace.trace(fn, params, x, names=names), jax.jit(fn)
    for group in groups:
        if group.note:
            continue
        assert not group.stack
        keep = np.arange(group.size) % 2 == 0
        masked, small = remove(params, group, keep)
        expected, found = whole(masked, x), jax.jit(traced.replay({group.name: keep}))(small, x)
        np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=group.name)


def test_mlp_groups_are_the_hidden_layers():
    module = PlainMLP((6, 5), 3)
    fn, params = linen(module, inputs(4, 7))
    traced = trace.trace(lambda p, x: fn(p, x).logits, params, inputs(4, 7), names=module.axes)
    groups = by_name(traced.groups)
    assert set(groups) == {"hidden_0", "hidden_1"}
    assert places(groups["hidden_0"]) == {("hidden_0/kernel", 1), ("hidden_0/bias", 0), ("hidden_1/kernel", 0)}
    assert places(groups["hidden_1"]) == {("hidden_1/kernel", 1), ("hidden_1/bias", 0), ("head/kernel", 0)}
    assert (groups["hidden_0"].size, groups["hidden_0"].stack, groups["hidden_0"].note) == (6, 0, "")
    assert set(traced.frozen) == {("hidden_0/kernel", 0), ("head/kernel", 1), ("head/bias", 0)}
    assert traced.report == ()


def test_replay_is_the_module_of_the_smaller_size():
    module, small_module, x = PlainMLP((6, 5), 3), PlainMLP((4, 5), 3), inputs(4, 7)
    fn, params = linen(module, x)
    traced = trace.trace(lambda p, x: fn(p, x).logits, params, x, names=module.axes)
    keep = np.array([1, 0, 1, 1, 0, 1], bool)
    masked, small = remove(params, by_name(traced.groups)["hidden_0"], keep)
    found = traced.replay({"hidden_0": keep})(small, x)
    np.testing.assert_allclose(found, small_module.apply({"params": small}, {"inputs": x}).logits, atol=1e-6)
    np.testing.assert_allclose(found, fn(masked, x).logits, atol=1e-6)


def test_scanned_mlp_has_stacked_neurons_shared_width_and_layers():
    module, x = ResidualMLP(3, 8, 12, 5), inputs(4, 7)
    fn, params = linen(module, x)
    groups = by_name(trace.groups(lambda p, x: fn(p, x).logits, params, x, names=module.axes))
    assert {name: (g.size, g.stack) for name, g in groups.items()} == {"width": (8, 0), "layers": (3, 0), "neurons": (12, 3)}
    assert places(groups["neurons"]) == {("layers/up/kernel", 2), ("layers/up/bias", 1), ("layers/down/kernel", 1)}
    assert places(groups["layers"]) == {(path, 0) for path in trees.paths(params) if path.startswith("layers/")}
    assert groups["neurons"].note == groups["layers"].note == ""
    assert "norm" in groups["width"].note
    assert places(groups["width"]) == {
        ("embed/kernel", 1), ("embed/bias", 0), ("layers/norm/scale", 1), ("layers/norm/bias", 1), ("layers/up/kernel", 1),
        ("layers/down/kernel", 2), ("layers/down/bias", 1), ("final_norm/scale", 0), ("final_norm/bias", 0), ("head/kernel", 0),
    }  # fmt: skip


def test_vit_groups():
    module, x = ViT(2, 2, 8, 4, 2, 6, 5), inputs(2, 4, 4, 1)
    fn, params = linen(module, x)
    groups = by_name(trace.groups(lambda p, x: fn(p, x).logits, params, x, names=module.axes))
    sizes = {name: (g.size, g.stack, bool(g.note)) for name, g in groups.items()}
    assert sizes["heads"] == (4, 2, False)
    assert sizes["neurons"] == (6, 2, False)
    assert sizes["layers"] == (2, 0, False)
    assert sizes["width"] == (8, 0, True)
    attention = {f"layers/attention/{name}" for name in ("query/kernel", "key/kernel", "value/kernel")}
    biases = {(path.replace("kernel", "bias"), 1) for path in attention}
    assert places(groups["heads"]) == {(path, 2) for path in attention} | biases | {("layers/attention/out/kernel", 1)}
    assert ("position", 2) in places(groups["width"])


def test_captured_layer_features_freeze_the_layers():
    module, x = ResidualMLP(3, 8, 12, 5), inputs(4, 7)
    fn, params = linen(module, x, capture=("layers/1",))
    traced = trace.trace(lambda p, x: fn(p, x)[:2], params, x, names=module.axes)
    groups = by_name(traced.groups)
    assert "layers" not in groups
    assert "width" not in groups  # the features show it
    assert groups["neurons"].stack == 3
    assert any("'layers' cannot shrink" in line for line in traced.report)


class Attention(nn.Module):
    """Patches, a cls token, learned positions, unrolled pre-norm blocks with Flax's own attention."""

    layers: int = 1
    heads: int = 2

    @nn.compact
    def __call__(self, batch):
        x = nn.Dense(8, name="embed")(batch["inputs"])
        cls = self.param("cls", nn.initializers.zeros, (1, 1, 8))
        x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("position", nn.initializers.zeros, (1, x.shape[1], 8))
        for i in range(self.layers):
            h = nn.LayerNorm(name=f"norm_a{i}")(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads, qkv_features=8, name=f"attention{i}")(h, h)
            h = nn.LayerNorm(name=f"norm_b{i}")(x)
            x = x + nn.Dense(8, name=f"down{i}")(nn.gelu(nn.Dense(6, name=f"up{i}")(h)))
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


def test_unrolled_transformer():
    x = inputs(2, 5, 4)
    fn, params = linen(Attention(), x)
    names = {"heads": ("attention0/query/kernel", 1), "neurons": ("up0/kernel", 1), "width": ("embed/kernel", 1)}
    groups = trace.groups(fn, params, x, names=names)
    found = by_name(groups)
    assert places(found["neurons"]) == {("up0/kernel", 1), ("up0/bias", 0), ("down0/kernel", 0)}
    assert (found["heads"].size, found["heads"].note, found["neurons"].note) == (2, "", "")
    assert places(found["heads"]) == {
        *((f"attention0/{name}/kernel", 1) for name in ("query", "key", "value")),
        *((f"attention0/{name}/bias", 0) for name in ("query", "key", "value")),
        ("attention0/out/kernel", 0),
    }
    assert "norm" in found["width"].note
    assert {("cls", 2), ("position", 2), ("norm/scale", 0), ("head/kernel", 0)} <= places(found["width"])
    assert_exact(fn, params, x, groups, names)


def fused_attention(params, x):
    """One kernel for q, k and v [D, 3 * 2 * 4], reshaped and split; two heads of 4."""
    b, t, _ = x.shape
    qkv = (x @ params["qkv"]).reshape(b, t, 3, 2, 4)
    q, k, v = (part[:, :, 0] for part in jnp.split(qkv, 3, axis=2))
    return jax.nn.dot_product_attention(q, k, v).reshape(b, t, 8) @ params["out"]


def test_fused_qkv_heads_are_strided_blocks():
    x, params = inputs(2, 5, 6), random_params(shapes(qkv=(6, 24), out=(8, 6)))
    groups = trace.groups(fused_attention, params, x, names={"heads": ("out", 0)})
    members = {member.path: member for member in by_name(groups)["heads"].members}
    head_0 = [*range(0, 4), *range(8, 12), *range(16, 20)]  # q, k and v lie 8 apart
    assert sorted(np.concatenate([m.index[0] for m in by_name(groups)["heads"].members if m.path == "qkv"])) == head_0
    np.testing.assert_array_equal(members["out"].index, [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert all(group.note == "" for group in groups)
    assert_exact(fused_attention, params, x, groups, {"heads": ("out", 0)})


def grouped_query_attention(params, x):
    """4 query heads of 3 share 2 key and value heads."""
    q = jnp.einsum("btd,dhk->bthk", x, params["q"])
    k, v = (jnp.repeat(jnp.einsum("btd,dhk->bthk", x, params[name]), 2, axis=2) for name in "kv")
    return jnp.einsum("bthk,hkd->btd", jax.nn.dot_product_attention(q, k, v), params["out"])


def test_grouped_query_attention_prunes_whole_kv_groups():
    x, params = inputs(2, 5, 6), random_params(shapes(q=(6, 4, 3), k=(6, 2, 3), v=(6, 2, 3), out=(4, 3, 6)))
    groups = trace.groups(grouped_query_attention, params, x, names={"kv": ("k", 1)})
    members = {member.path: member for member in by_name(groups)["kv"].members}
    np.testing.assert_array_equal(members["k"].index, [[0], [1]])
    np.testing.assert_array_equal(members["q"].index, [[0, 1], [2, 3]])
    np.testing.assert_array_equal(members["out"].index, [[0, 1], [2, 3]])
    assert by_name(groups)["kv"].note == ""
    assert_exact(grouped_query_attention, params, x, groups, {"kv": ("k", 1)})


def test_embedding_lookup_freezes_the_vocabulary_and_tying_joins():
    def fn(params, ids):
        h = jnp.take(params["table"], ids, axis=0)
        h = h + jax.nn.silu(h @ params["up"]) @ params["down"]
        return h @ params["table"].T

    params, ids = random_params(shapes(table=(7, 6), up=(6, 4), down=(4, 6))), np.array([[1, 2, 3], [4, 5, 6]])
    traced = trace.trace(fn, params, ids)
    assert ("table", 0) in traced.frozen
    assert {frozenset(places(group)) for group in traced.groups} == {
        frozenset({("table", 1), ("up", 0), ("down", 1)}),
        frozenset({("up", 1), ("down", 0)}),
    }
    assert_exact(fn, params, ids, trace.groups(fn, params, ids))


def test_linear_attention_is_caught_by_the_check():
    def fn(params, x):
        q, k = jnp.exp(x @ params["q"]), jnp.exp(x @ params["k"])  # exp of a masked column is 1, not 0
        return q @ (k.T @ (x @ params["v"])) @ params["out"]

    params, x = shapes(q=(5, 4), k=(5, 4), v=(5, 6), out=(6, 2)), inputs(3, 5)
    unchecked = trace.groups(fn, params, x, check=False)
    assert [group.note for group in unchecked] == ["", ""]
    groups = {frozenset(places(group)): group.note for group in trace.groups(fn, params, x)}
    assert "masking is not removing" in groups[frozenset({("q", 1), ("k", 1)})]
    assert groups[frozenset({("v", 1), ("out", 0)})] == ""


def test_softmax_over_an_axis_is_noted():
    fn = lambda params, x: jax.nn.softmax(x @ params["up"]) @ params["down"]
    (group,) = trace.groups(fn, shapes(up=(5, 4), down=(4, 3)), inputs(2, 5))
    assert "softmax" in group.note


def scanned(block):
    """`h` goes through `block(h, layer params)` for each row of the stacked parameters, then through a head."""

    def fn(params, x):
        h, _ = jax.lax.scan(lambda h, layer: (block(h, layer), None), x @ params["embed"], params["stack"])
        return h @ params["head"]

    return fn


STACK = {"embed": (5, 6), "stack": {"up": (3, 6, 8), "down": (3, 8, 6), "scale": (3, 6)}, "head": (6, 2)}
STACKED = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), STACK, is_leaf=lambda x: isinstance(x, tuple))
LAYERS = {"layers": ("stack/up", 0), "neurons": ("stack/up", 2)}


def normalise(h):
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-3)


def test_layers_of_a_pre_norm_stack_are_exact_and_of_a_post_norm_stack_are_not():
    pre = scanned(lambda h, p: h + jax.nn.relu(normalise(h) * p["scale"] @ p["up"]) @ p["down"])
    post = scanned(lambda h, p: normalise(h + jax.nn.relu(h @ p["up"]) @ p["down"]) * p["scale"])
    notes = [by_name(trace.groups(fn, STACKED, inputs(4, 5), names=LAYERS))["layers"].note for fn in (pre, post)]
    assert notes[0] == ""
    assert "masking is not removing" in notes[1]


def test_remat_inside_scan_and_a_cast_outside_keep_per_layer_choice():
    block = jax.checkpoint(lambda h, p: h + jax.nn.gelu(h * p["scale"] @ p["up"]) @ p["down"])
    fn = lambda params, x: scanned(block)(jax.tree.map(lambda leaf: leaf.astype(jnp.float16).astype(jnp.float32), params), x)
    groups = by_name(trace.groups(fn, STACKED, inputs(4, 5), names=LAYERS))
    assert (groups["neurons"].stack, groups["neurons"].note) == (3, "")
    assert places(groups["neurons"]) == {("stack/up", 2), ("stack/down", 1)}


def test_layers_share_their_choice_where_the_axis_is_seen_outside_the_scan():
    def fn(params, x):
        h = scanned(lambda h, p: h + jax.nn.relu(h * p["scale"] @ p["up"]) @ p["down"])(params, x)
        return h + (x @ params["embed"] @ params["stack"]["up"][0]).sum() * 0.1

    groups = by_name(trace.trace(fn, STACKED, inputs(4, 5), names=LAYERS).groups)
    assert groups["neurons"].stack == 0
    assert "layers" not in groups  # layer 0 is used by its number


def test_constants_and_positions_baked_into_the_function_freeze():
    ramp = np.arange(4, dtype=np.float32)
    fn = lambda params, x: jax.nn.relu(x @ params["up"]) * ramp @ params["down"]
    assert trace.trace(fn, shapes(up=(5, 4), down=(4, 3)), inputs(2, 5)).groups == ()
    flat = lambda params, x: jax.nn.relu(x @ params["up"]) * np.full(4, 2, np.float32) @ params["down"]
    (group,) = trace.groups(flat, shapes(up=(5, 4), down=(4, 3)), inputs(2, 5))
    assert group.note == ""


def test_unknown_primitives_freeze_and_are_reported():
    fn = lambda params, x: jnp.sort(x @ params["up"]) @ params["down"]
    traced = trace.trace(fn, shapes(up=(5, 4), down=(4, 3)), inputs(2, 5))
    assert traced.groups == ()
    assert "sort" in traced.frozen["up", 1]
    assert any("sort" in line for line in traced.report)


def test_primitives_without_a_rule_replay_where_they_meet_no_group():
    def fn(params, x):
        x = jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, jnp.sort(x))
        return jax.nn.relu(x @ params["up"]) @ params["down"]

    x = inputs(2, 5)
    params = random_params(shapes(up=(5, 4), down=(4, 3)))
    groups = trace.groups(fn, params, x)
    assert [group.note for group in groups] == [""]
    assert_exact(fn, params, x, groups)


def test_a_cut_through_a_block_freezes_and_is_reported():
    def fn(params, x):
        h = jnp.einsum("bd,dhk->bhk", x, params["up"]).reshape(-1, 12)
        return h[:, :5] @ params["down"]

    traced = trace.trace(fn, shapes(up=(5, 4, 3), down=(5, 2)), inputs(2, 5))
    assert traced.groups == ()
    assert any("a cut at 5 goes through a block of 3" in line for line in traced.report)


def test_argmax_and_padding_freeze_only_their_own_axis():
    def fn(params, x):
        h = jax.nn.relu(jnp.pad(x @ params["up"], ((0, 0), (1, 0), (0, 0)))[:, :-1])
        return h @ params["down"] + jnp.argmax(x @ params["pick"], axis=-1, keepdims=True)

    params, x = random_params(shapes(up=(5, 4), down=(4, 3), pick=(5, 6))), inputs(2, 3, 5)
    groups = trace.groups(fn, params, x)
    assert [places(group) for group in groups] == [{("up", 1), ("down", 0)}]
    assert_exact(fn, params, x, groups)


def test_concatenated_branches_stay_separate_groups():
    def fn(params, x):
        h = jnp.concatenate([x @ params["a"], x @ params["b"]], axis=-1)
        return jax.nn.relu(h[:, 1:]) @ params["down"] + h[:, :1]

    params, x = random_params(shapes(a=(5, 4), b=(5, 3), down=(6, 2))), inputs(2, 5)
    groups = trace.groups(fn, params, x)
    found = [{(m.path, m.axis): m.index.ravel().tolist() for m in group.members} for group in groups]
    assert found == [
        {("a", 1): [1, 2, 3], ("down", 0): [0, 1, 2]},
        {("b", 1): [0, 1, 2], ("down", 0): [3, 4, 5]},
    ]
    assert_exact(fn, params, x, groups)


def test_unused_parameters_are_no_group():
    fn = lambda params, x: x @ params["used"]
    traced = trace.trace(fn, shapes(used=(5, 3), unused=(4, 6)), inputs(2, 5))
    assert traced.groups == ()
    assert traced.frozen["unused", 1] == "the function does not use it"


def test_layers_and_per_layer_neurons_compose_in_a_replay():
    fn = scanned(lambda h, p: h + jax.nn.relu(h * p["scale"] @ p["up"]) @ p["down"])
    params, x = random_params(STACKED), inputs(4, 5)
    keeps = {"layers": np.array([True, False, True]), "neurons": np.zeros((3, 8), bool)}
    keeps["neurons"][0, [1, 4]] = keeps["neurons"][2, [0, 7]] = True  # the dropped layer's row, empty, does not count
    h = x @ params["embed"]
    for layer, neurons in ((0, [1, 4]), (2, [0, 7])):
        up, down = params["stack"]["up"][layer][:, neurons], params["stack"]["down"][layer][neurons]
        h = h + np.maximum(h * params["stack"]["scale"][layer] @ up, 0) @ down
    small = {
        "embed": params["embed"], "head": params["head"],
        "stack": {
            "up": np.stack([params["stack"]["up"][0][:, [1, 4]], params["stack"]["up"][2][:, [0, 7]]]),
            "down": np.stack([params["stack"]["down"][0][[1, 4]], params["stack"]["down"][2][[0, 7]]]),
            "scale": params["stack"]["scale"][[0, 2]],
        },
    }  # fmt: skip
    found = trace.trace(fn, params, x, names=LAYERS).replay(keeps)(small, x)
    np.testing.assert_allclose(found, h @ params["head"], rtol=1e-4, atol=1e-5)


def test_bad_input_gets_one_clear_line():
    module, x = PlainMLP((6, 5), 3), inputs(4, 7)
    fn, params = linen(module, x)
    logits = lambda p, x: fn(p, x).logits
    with pytest.raises(ValueError, match="'a' and 'b' are one group"):
        trace.trace(logits, params, x, names={"a": ("hidden_0/kernel", 1), "b": ("hidden_1/kernel", 0)})
    with pytest.raises(ValueError, match="axis 2 of 'hidden_0/kernel', which no parameter has"):
        trace.trace(logits, params, x, names={"a": ("hidden_0/kernel", 2)})
    traced = trace.trace(logits, params, x, names=module.axes)
    with pytest.raises(ValueError, match="no group is called 'heads'"):
        traced.replay({"heads": np.ones(6, bool)})
    with pytest.raises(ValueError, match=r"shape \[5\], expected \[6\]"):
        traced.replay({"hidden_0": np.ones(5, bool)})
    with pytest.raises(ValueError, match="nothing would be left of group 'hidden_0'"):
        traced.replay({"hidden_0": np.zeros(6, bool)})
    with pytest.raises(ValueError, match=r"hidden_0/bias has shape \[6\], expected \[1\]"):
        traced.replay({"hidden_0": np.arange(6) == 0})(params, x)


def test_flops_of_products_convolutions_and_gradients():
    a, b = jax.ShapeDtypeStruct((4, 5), jnp.float32), jax.ShapeDtypeStruct((5, 6), jnp.float32)
    assert trace.flops(lambda a, b: jax.nn.relu(a @ b), a, b) == 2 * 4 * 5 * 6
    both = jax.grad(lambda a, b: jnp.sum((a @ b) ** 2), argnums=(0, 1))
    assert trace.flops(both, a, b) == 3 * 2 * 4 * 5 * 6  # forward, and one product for each operand's gradient
    image, kernel = jax.ShapeDtypeStruct((2, 8, 8, 6), jnp.float32), jax.ShapeDtypeStruct((3, 3, 2, 9), jnp.float32)
    conv = lambda x, k: jax.lax.conv_general_dilated(
        x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
    )
    assert trace.flops(conv, image, kernel) == 2 * (2 * 4 * 4 * 9) * (3 * 3 * 2)


def test_flops_count_a_scan_for_each_step_and_follow_calls():
    fn = scanned(jax.checkpoint(lambda h, p: h + jax.nn.relu(h * p["scale"] @ p["up"]) @ p["down"]))
    batch = 4
    expected = 2 * batch * (5 * 6 + 3 * (6 * 8 + 8 * 6) + 6 * 2)
    assert trace.flops(jax.jit(fn), STACKED, inputs(batch, 5)) == expected
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y, lambda y: y, x)
    assert trace.flops(branch, inputs(4, 4)) == 2 * 4**3
