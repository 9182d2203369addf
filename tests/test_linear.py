"""Linear layers found in a jaxpr, their statistics against NumPy, and kernels that change on the way."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bmjax import trace, trees
from bmjax.models import Decoder, Encoder, Residual, ResNet, Transformer, adapters
from bmjax.trace import contracting, linears, sides


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def names(fn, params, batch, where=None):
    return [layer.name for layer in linears(fn, params, batch, where).layers]


def moments(fn, params, batches, where=None):
    """{layer: (X^T X / N, mean of x^2, did weights count)} of a pass that changes nothing."""
    found = {}

    def visit(layer, kernel, inputs):
        assert kernel.shape == (layer.inputs, layer.outputs)
        squares = inputs.square_mean()
        found[layer.name] = np.asarray(inputs.gram()), np.asarray(squares), inputs.counted

    linears(fn, params, batches[0], where).stream(params, batches, visit)
    return found


def check(found, rows, counted=False):
    """The statistics of one layer against those of its rows [N, in]."""
    gram, squares, did = found
    rows = np.asarray(rows, np.float64)
    np.testing.assert_allclose(gram, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(squares, (rows**2).mean(0), rtol=1e-4, atol=1e-6)
    assert did == counted


def relu(x):
    return np.maximum(x, 0)


def test_moments_of_a_chain_over_several_batches():
    params = {"a": normal(5, 7), "b": normal(7, 3, seed=1)}
    fn = lambda p, batch: jax.nn.relu(batch["inputs"] @ p["a"]) @ p["b"]
    x = normal(12, 5, seed=2)
    found = moments(fn, params, [{"inputs": x[:6]}, {"inputs": x[6:]}])
    check(found["a"], x)
    check(found["b"], relu(x @ params["a"]))


def test_a_changed_kernel_is_what_later_layers_see_and_the_input_is_left_alone():
    params = {"a": normal(5, 7), "b": normal(7, 3, seed=1)}
    fn = lambda p, batch: jax.nn.relu(batch["inputs"] @ p["a"]) @ p["b"]
    x, seen = normal(12, 5, seed=2), {}

    def visit(layer, kernel, inputs):
        seen[layer.name] = inputs.square_mean()
        return -2 * kernel if layer.name == "a" else None

    new = linears(fn, params, {"inputs": x}).stream(params, [{"inputs": x}], visit)
    np.testing.assert_array_equal(new["a"], -2 * params["a"])
    assert new["b"] is params["b"]
    np.testing.assert_allclose(seen["b"], (relu(-2 * x @ params["a"]) ** 2).mean(0), rtol=1e-5)


def test_relative_error_of_the_output():
    params, x = {"a": normal(5, 7)}, normal(12, 5, seed=2)
    new, found = normal(5, 7, seed=3), []
    visit = lambda layer, kernel, inputs: found.append(inputs.relative_error(kernel, jnp.asarray(new)))
    batches = [{"inputs": x[:6], "weights": np.ones(6)}, {"inputs": x[6:], "weights": np.array([1.0, 1, 0, 0, 0, 0])}]
    linears(lambda p, b: b["inputs"] @ p["a"], params, batches[0]).stream(params, batches, visit)
    rows = x[:8]
    expected = ((rows @ (new - params["a"])) ** 2).sum() / ((rows @ params["a"]) ** 2).sum()
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


@jax.custom_jvp
def gate(x):
    return jnp.tanh(x)


gate.defjvp(lambda primals, tangents: (gate(*primals), tangents[0]))


def test_calls_remat_casts_and_layouts_are_looked_through():
    params = {"flat": normal(24), "t": normal(3, 6), "qkv": normal(2, 3, 9), "heads": normal(2, 3, 5)}

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def fn(p, batch):
        x = gate(batch["inputs"]) @ p["flat"].reshape(4, 6).astype(jnp.bfloat16).astype(jnp.float32)
        x = jax.jit(lambda x, w: x @ w.T)(x, p["t"])
        q, k, v = jnp.split(p["qkv"][1], 3, axis=1)
        x = (x @ q) * (x @ k) + x @ v
        return jnp.einsum("bi,hio->bho", x, p["heads"])

    x = normal(8, 4, seed=1)
    found = linears(fn, params, {"inputs": x})
    assert [(layer.path, layer.inputs, layer.outputs) for layer in found.layers] == [
        *[("flat", 4, 6), ("t", 6, 3)],
        *[("qkv", 3, 3)] * 3,
        ("heads", 3, 10),
    ]
    assert found.left == {}
    doubled = iter(range(1, 7))
    new = found.stream(params, [{"inputs": x}], lambda layer, kernel, inputs: kernel * next(doubled))
    np.testing.assert_allclose(new["flat"], params["flat"], rtol=1e-6)
    np.testing.assert_array_equal(new["t"], 2 * params["t"])
    np.testing.assert_array_equal(new["qkv"][0], params["qkv"][0])
    np.testing.assert_array_equal(new["qkv"][1], params["qkv"][1] * np.repeat(np.array([3, 4, 5], np.float32), 3))
    np.testing.assert_array_equal(new["heads"], 6 * params["heads"])


def test_matrix_form_and_its_inverse():
    """heads: einsum over (h, i) with the parameter's axes (o, h, i): rows of the matrix are (h, i), innermost last."""
    params = {"w": normal(5, 2, 3)}
    (layer,) = linears(lambda p, b: jnp.einsum("bhi,ohi->bo", b, p["w"]), params, normal(4, 2, 3)).layers
    matrix = layer.get(jnp.asarray(params["w"]))
    np.testing.assert_array_equal(matrix, params["w"].transpose(1, 2, 0).reshape(6, 5))
    np.testing.assert_array_equal(layer.put(jnp.zeros((5, 2, 3)), matrix), params["w"])


def tied(p, batch):
    return p["w"][batch] @ p["w"].T


def twice(p, batch):
    return (batch @ p["w"]) @ p["w"]


def experts(p, batch):
    return jnp.einsum("bi,bio->bo", batch, p["w"])


def recurrent(p, batch):
    return jax.lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x), None), jnp.zeros_like(batch[0]), batch)[0]


def conditional(p, batch):
    return jax.lax.cond(batch.sum() > 0, lambda x: x @ p["w"], lambda x: x, batch)


def overlapping(p, batch):
    return batch[:, :3] @ p["w"][:3] + batch[:, 1:] @ p["w"][1:]


def grouped(p, batch):
    return jax.lax.conv_general_dilated(batch, p["w"][..., None], (1,), "SAME", feature_group_count=4)


@pytest.mark.parametrize(
    ("fn", "batch", "why"),
    [
        (tied, np.array([0, 1]), "it is tied: it is used by gather, and by a product"),
        (twice, normal(3, 4), "2 products use it"),
        (experts, normal(4, 4), "the product has batch axes"),
        (recurrent, normal(5, 3, 4), "it is used by scan"),
        (conditional, normal(3, 4), "it is used by cond"),
        (overlapping, normal(2, 4), "2 products use it"),
        (grouped, normal(2, 16, 6), "the convolution has groups"),
    ],
)
def test_what_is_no_linear_layer_is_left_out_and_said(fn, batch, why):
    shape = (4, 4, 4) if fn is experts else (4, 4)
    found = linears(fn, {"w": jnp.ones(shape)}, batch)
    assert found.layers == ()
    assert found.left["w"].startswith(why)


def test_disjoint_slices_are_layers_and_a_constant_in_a_scan_over_others_is_not():
    params = {"w": normal(4, 4), "stack": normal(3, 4, 4), "shared": normal(4, 4)}

    def fn(p, x):
        x = x[:, :2] @ p["w"][:2] + x[:, 2:] @ p["w"][2:]
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ p["shared"], None), x, p["stack"])[0]

    found = linears(fn, params, normal(3, 4))
    assert [layer.name for layer in found.layers] == ["w", "w", "stack[0]", "stack[1]", "stack[2]"]
    assert found.left == {"shared": "it is used at every step of a scan"}


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_is_gone_through_layer_by_layer(reverse):
    """Nested, with a table that is scanned along, a constant, a carry beside the activations, and collected outputs."""
    params = {"w": normal(2, 3, 4, 4), "scale": 1 + 0.1 * normal(2, 4), "end": normal(4, 2)}

    def fn(p, batch):
        shift = batch["inputs"].mean(0)

        def outer(carry, xs):
            x, count = carry
            ws, scale = xs
            x, seen = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w + shift), x.sum()), x * scale, ws)
            return (x, count + 1), (seen, count)

        (x, count), (seen, counts) = jax.lax.scan(outer, (batch["inputs"], 0), (p["w"], p["scale"]), reverse=reverse)
        return (x + count + seen.sum() + counts.sum()) @ p["end"]

    batches = [{"inputs": normal(6, 4, seed=s)} for s in (1, 2)]
    order = [1, 0] if reverse else [0, 1]
    assert names(fn, params, batches[0]) == [*(f"w[{i}][{j}]" for i in order for j in range(3)), "end"]
    rows = {}
    for batch in batches:
        x, seen = batch["inputs"], 0
        for i in order:
            x = x * params["scale"][i]
            for j in range(3):
                rows.setdefault(f"w[{i}][{j}]", []).append(x)
                seen += x.sum()
                x = np.tanh(x @ (2 * params["w"][i, j]) + batch["inputs"].mean(0))
        rows.setdefault("end", []).append(x + 2 + seen + 1)
    found = {}

    def visit(layer, kernel, inputs):
        found[layer.name] = inputs.gram(), inputs.square_mean(), inputs.counted
        return 2 * kernel

    new = linears(fn, params, batches[0]).stream(params, batches, visit)
    np.testing.assert_array_equal(new["w"], 2 * params["w"])
    for name, parts in rows.items():
        check(found[name], np.concatenate(parts))


def patches(x, k, stride):
    """[N, k * k * C] of the same padding, channels innermost."""
    h, c = x.shape[2:]
    out = -(-h // stride)
    pad = max((out - 1) * stride + k - h, 0)
    x = np.pad(x, ((0, 0), (pad // 2, pad - pad // 2), (pad // 2, pad - pad // 2), (0, 0)))
    rows = [x[:, i * stride : i * stride + k, j * stride : j * stride + k] for i in range(out) for j in range(out)]
    return np.stack(rows, 1).reshape(-1, k * k * c)


@pytest.mark.parametrize("stride", [1, 2])
def test_moments_of_a_convolution(stride):
    params, x = {"w": normal(3, 3, 2, 5)}, normal(4, 6, 6, 2, seed=1)
    fn = lambda p, b: jax.lax.conv_general_dilated(
        b["inputs"], p["w"], (stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    batch = {"inputs": x, "weights": np.array([1.0, 0.0, 2.0, 0.0])}
    check(moments(fn, params, [batch])["w"], patches(x[[0, 2]], 3, stride), counted=True)
    (layer,) = linears(fn, params, batch).layers
    rows, kernel = patches(x, 3, stride), layer.get(jnp.asarray(params["w"]))
    np.testing.assert_allclose(rows @ kernel, np.reshape(fn(params, batch), (-1, 5)), rtol=1e-4, atol=1e-5)


def test_positions_of_weight_zero_do_not_count():
    """Weights [B, T] of rows [B, T], [T, B] and [B * T], and of rows [B] after a mean over time."""
    params = {name: normal(4, 4, seed=i) for i, name in enumerate("abcde")}
    b, t = 4, 4  # equal on purpose: sizes cannot tell the axes apart
    x, weights = normal(b, t, 4, seed=9), np.ones((b, t), np.float32)
    weights[0, 2:] = weights[1] = 0

    def fn(p, batch):
        x = jnp.tanh(batch["inputs"] @ p["a"])
        x = jnp.tanh(jnp.swapaxes(x, 0, 1) @ p["b"])
        x = jnp.tanh(jnp.swapaxes(x, 0, 1).reshape(b * t, 4) @ p["c"]).reshape(b, t, 4)
        return x.mean(1) @ p["d"], x.mean(0) @ p["e"]

    batch = {"inputs": x, "weights": weights}
    found = moments(fn, params, [batch])
    inside = weights > 0
    a = np.tanh(x @ params["a"])
    c = np.tanh(a @ params["b"])
    end = np.tanh(c @ params["c"])
    check(found["a"], x[inside], counted=True)
    check(found["b"], a[inside], counted=True)
    check(found["c"], c[inside], counted=True)
    check(found["d"], end.mean(1)[[0, 2, 3]], counted=True)
    check(found["e"], end.mean(0))
    confused = moments(lambda p, b: sum(fn(p, b)), params, [batch])  # adds what is by example to what is by position
    check(confused["a"], x.reshape(-1, 4))


def test_a_padded_batch_of_rubbish_does_not_poison():
    x = normal(3, 4)
    x[2] = np.nan
    found = moments(lambda p, b: b["inputs"] @ p["w"], {"w": normal(4, 2)}, [{"inputs": x, "weights": np.array([1, 1, 0])}])
    check(found["w"], x[:2], counted=True)


def test_queries_keys_and_values_share_one_statistic():
    params, seen = {"q": normal(4, 4), "k": normal(4, 4), "v": normal(4, 4)}, []
    fn = lambda p, x: (x @ p["q"]) * (x @ p["k"]) + x @ p["v"]
    linears(fn, params, normal(2, 4)).stream(params, [normal(2, 4)], lambda layer, kernel, inputs: seen.append(inputs))
    assert seen[0] is seen[1] is seen[2]


def test_one_layers_second_moments_and_inputs_are_alive_at_a_time():
    params, grams, inputs_seen = {"w": normal(3, 4, 4), "end": normal(4, 2)}, [], []

    def fn(p, x):
        return jnp.tanh(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), jnp.tanh(x), p["w"])[0]) @ p["end"]

    def visit(layer, kernel, inputs):
        gc.collect()
        assert not any(one() is not None for one in (*grams, *inputs_seen))
        grams.append(weakref.ref(inputs.gram()))
        inputs_seen.append(weakref.ref(inputs._values[0]))
        assert grams[-1]() is not None and inputs_seen[-1]() is not None

    linears(fn, params, normal(5, 4)).stream(params, [normal(5, 4), normal(5, 4)], visit)
    assert len(grams) == 4


def test_one_shape_of_batches():
    found = linears(lambda p, b: b["inputs"] @ p["w"], {"w": normal(4, 2)}, {"inputs": normal(3, 4)})
    with pytest.raises(ValueError, match="in batch 1, inputs has shape"):
        found.stream({"w": normal(4, 2)}, [{"inputs": normal(3, 4)}, {"inputs": normal(2, 4)}], lambda *_: None)


def model_of(name):
    tokens = lambda t, v: np.random.default_rng(0).integers(0, v, (4, t)).astype(np.int32)
    if name == "decoder":
        return Decoder(layers=2, width=8, heads=2, neurons=12).build((6,), 11), tokens(6, 11), 14
    if name == "encoder":
        return Encoder(layers=2, width=8, heads=2, neurons=12).build((6,), 11), tokens(6, 11), 2 * 6
    if name == "vit":
        return Transformer(layers=2, width=8, heads=2, neurons=12).build((4, 4, 1), 3), normal(4, 4, 4, 1), 2 * 6
    if name == "resnet":
        return ResNet(14, width=4).build((8, 8, 3), 3), normal(4, 8, 8, 3), 1 + 3 * 4 + 2
    return Residual(layers=2).build((5,), 3), normal(4, 5), None


KINDS = ("decoder", "encoder", "vit", "resnet", "mlp")


@pytest.mark.parametrize("kind", KINDS)
def test_our_networks(kind):
    """All layers but embeddings and heads are found, and each sees what those before it were changed to."""
    model, inputs, expected = model_of(kind)
    batch = {"inputs": inputs, "id": np.arange(4, dtype=np.int32)}
    params, state = model.init(jax.random.key(0), batch)
    fn = lambda p, b: model.apply(p, state, b)[0].logits
    kernels = [path for path in trees.paths(params) if path.endswith("kernel") and not path.startswith(("embed", "head"))]
    found = linears(fn, params, batch, kernels)
    assert {layer.path for layer in found.layers} == set(kernels)
    assert expected is None or len(found.layers) == expected
    new = found.stream(params, [batch], lambda layer, kernel, inputs: 2 * kernel)
    doubled = trees.map_with_path(lambda path, leaf: 2 * leaf if path in kernels else leaf, params)
    jax.tree.map(np.testing.assert_array_equal, new, doubled)


def test_later_layers_of_a_decoder_see_what_earlier_ones_were_changed_to():
    """What a pass that doubles each kernel on the way sees is what one without changes sees in the network of doubled kernels."""
    model, inputs, _ = model_of("decoder")
    batch = {"inputs": inputs, "id": np.arange(4, dtype=np.int32)}
    params, state = model.init(jax.random.key(0), batch)
    kernels = [path for path in trees.paths(params) if path.endswith("kernel")]
    found = linears(lambda p, b: model.apply(p, state, b)[0].logits, params, batch, kernels)
    seen = {}

    def visit(layer, kernel, inputs):
        seen[layer.name] = inputs.gram()
        return 2 * kernel

    def check(layer, kernel, inputs):
        np.testing.assert_allclose(inputs.gram(), seen[layer.name], rtol=1e-4, atol=1e-5)

    found.stream(found.stream(params, [batch], visit), [batch], check)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(5, 8, rngs=rngs)
        self.second = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x)))


def test_an_nnx_module():
    model, batch = adapters.nnx(Net), {"inputs": normal(4, 5)}
    params, state = model.init(jax.random.key(0), batch)
    found = linears(lambda p, b: model.apply(p, state, b)[0].logits, params, batch)
    assert [(layer.inputs, layer.outputs) for layer in found.layers] == [(5, 8), (8, 3)]


def test_contracted_axes():
    """Of a stack of DenseGeneral kernels, a convolution, and a transposed product."""
    model, inputs, _ = model_of("decoder")
    batch = {"inputs": inputs, "id": np.arange(4, dtype=np.int32)}
    params, _ = model.init(jax.random.key(0), batch)
    found = contracting(lambda p, b: model.apply(p, {}, b)[0].logits, params, batch)
    assert found["layers/attention/query/kernel"] == -3
    assert found["layers/attention/out/kernel"] == -2
    assert found["layers/down/kernel"] == -2
    assert "embed/embedding" not in found
    assert contracting(lambda p, x: x @ p["w"].T, {"w": normal(3, 6)}, normal(2, 6)) == {"w": -1}


def test_inputs_and_outputs():
    """Of a stack of DenseGeneral kernels, of a transposed product, and of convolutions whose kernels lie in two ways."""
    model, inputs, _ = model_of("decoder")
    batch = {"inputs": inputs, "id": np.arange(4, dtype=np.int32)}
    params, _ = model.init(jax.random.key(0), batch)
    found = sides(lambda p, b: model.apply(p, {}, b)[0].logits, params, batch)
    assert found["layers/attention/query/kernel"] == ((), (-3,), (-2, -1))
    assert found["layers/attention/out/kernel"] == ((), (-3, -2), (-1,))
    assert found["layers/down/kernel"] == ((), (-2,), (-1,))
    assert sides(lambda p, x: x @ p["w"].T, {"w": normal(3, 6)}, normal(2, 6)) == {"w": ((), (-1,), (-2,))}
    for layout, shape, expected in (
        ("HWIO", (3, 1, 4, 5), ((-4, -3), (-2,), (-1,))),
        ("OIHW", (5, 4, 3, 2), ((-2, -1), (-3,), (-4,))),
    ):
        convolve = lambda p, x, layout=layout: jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", layout, "NHWC")
        )
        assert sides(convolve, {"w": normal(*shape)}, normal(2, 6, 6, 4)) == {"w": expected}


def test_named_in_the_package():
    assert trace.linears is linears
