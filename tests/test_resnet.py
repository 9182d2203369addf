"""Residual networks against the same arithmetic in NumPy float64, on one and on eight devices, padded unevenly."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from formulas import check_slopes, close, random_like, wide

from bmjax import config, losses, parallel, trace, trees
from bmjax.data import Dataset, Split
from bmjax.jobs import search
from bmjax.jobs.common import Net
from bmjax.models import LinenModel, ResNet
from bmjax.models.norms import BatchNorm, GroupNorm
from bmjax.models.resnet import ResNetModule, Stage
from bmjax.train import Problem, init_state, make_step

B, SHAPE, CLASSES = 16, (6, 6, 3), 4
STAGES = (Stage(4, 3, 2, 5), Stage(6, 4, 1, 3))
GROUPED = (Stage(2, 1, 2, 3), Stage(3, 2, 0, 0))
MODELS = {
    "batch": LinenModel(ResNetModule(STAGES, CLASSES)),
    "identity": LinenModel(ResNetModule(STAGES, CLASSES, project=False)),
    "group": LinenModel(ResNetModule(GROUPED, CLASSES, group=2)),
}
MESHES = ["data=1", "data=8", "data=4,fsdp=2"]


@functools.cache
def batch():
    """Whole shards of padding, filled with numbers that must not count."""
    rng = np.random.default_rng(0)
    weights = np.where(np.isin(np.arange(B), (0, 1, 2, 3, 7, 12)), 0, 1).astype(np.float32)
    scale = np.where(weights > 0, 1, 9)[:, None, None, None]
    return {
        "inputs": (scale * rng.normal(size=(B, *SHAPE))).astype(np.float32),
        "targets": rng.integers(0, CLASSES, B).astype(np.int32),
        "weights": weights,
        "id": np.arange(B, dtype=np.int32),
    }


@functools.cache
def variables(name):
    """Random (params, model_state): no zeros and no ones; variances are positive."""
    shapes, state = jax.eval_shape(MODELS[name].init, jax.random.key(0), batch())
    rng = np.random.default_rng(1)
    return random_like(shapes, 0.4), jax.tree.map(lambda x: rng.uniform(0.3, 1.5, x.shape).astype(np.float32), state)


def convolve(x, kernel, stride):
    size = kernel.shape[0]
    x = np.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)))
    rows, columns = ((side - size) // stride + 1 for side in x.shape[1:3])
    parts = [
        x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride] @ kernel[i, j]
        for i in range(size)
        for j in range(size)
    ]
    return sum(parts)


class Reference:
    """The forward pass in NumPy; in training it takes statistics over the examples of weight above 0, and notes the new ones."""

    def __init__(self, module, params, state, weights, train):
        self.module, self.params, self.state, self.weights, self.train = module, params, trees.paths(state), weights, train
        self.new_state = {path: np.array(leaf) for path, leaf in self.state.items()}

    def norm(self, x, p, path, layer):
        if self.module.group:
            grouped = x.reshape(*x.shape[:3], -1, self.module.group)
            mean, var = grouped.mean((1, 2, 4), keepdims=True), grouped.var((1, 2, 4), keepdims=True)
            return ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * p["scale"] + p["bias"]
        if self.train:
            real = x[self.weights > 0]
            mean, var = real.mean((0, 1, 2)), real.var((0, 1, 2))
            for name, value in (("mean", mean), ("var", var)):
                old = self.new_state[f"batch_stats/{path}/{name}"]
                old[layer] = 0.9 * old[layer] + 0.1 * value
        else:
            mean, var = (self.state[f"batch_stats/{path}/{name}"][layer] for name in ("mean", "var"))
        return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]

    def block(self, x, p, path, stride, layer=...):
        y = np.maximum(self.norm(convolve(x, p["conv1"]["kernel"], stride), p["norm1"], f"{path}/norm1", layer), 0)
        y = self.norm(convolve(y, p["conv2"]["kernel"], 1), p["norm2"], f"{path}/norm2", layer)
        if stride == 2 and self.module.project:
            x = convolve(x, p["projection"]["kernel"], 2)
            x = self.norm(x, p["norm_projection"], f"{path}/norm_projection", layer)
        elif stride == 2:
            x = np.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (0, y.shape[-1] - x.shape[-1])))
        return np.maximum(x + y, 0)

    def __call__(self, x):
        p, found = self.params, {}
        x = convolve(x, p["stem"]["kernel"], 1)
        x = found["stem"] = np.maximum(self.norm(x, p["norm_stem"], "norm_stem", ...), 0)
        for i, sizes in enumerate(self.module.stages):
            stage = p[f"stage_{i}"]
            x = found[f"stage_{i}/block_0"] = self.block(x, stage["first"], f"stage_{i}/first", 1 if i == 0 else 2)
            for j in range(sizes.blocks):
                layer = jax.tree.map(lambda leaf, j=j: leaf[j], stage["rest"])
                x = found[f"stage_{i}/block_{j + 1}"] = self.block(x, layer, f"stage_{i}/rest", 1, j)
        x = found["final"] = x.mean((1, 2))
        return x @ p["head"]["kernel"] + p["head"]["bias"], found


def reference(name, train, params=None):
    """(logits, features, new state by path)."""
    own, state = variables(name)
    run = Reference(MODELS[name].module, params or wide(own), wide(state), batch()["weights"], train)
    logits, features = run(batch()["inputs"].astype(np.float64))
    return logits, features, run.new_state


def mesh_of(spec):
    return parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_logits_every_feature_and_statistics(name, train):
    model, (logits, features, statistics) = MODELS[name], reference(name, train)
    assert set(model.features) == set(features)
    forward = jax.jit(lambda p, s, b: model.apply(p, s, b, train=train, capture=model.features))
    found, state = jax.device_get(forward(*variables(name), batch()))
    close(found.logits, logits)
    assert set(found.features) == set(features)
    for feature in features:
        close(found.features[feature], features[feature])
    hidden, kernel, bias = found.head
    close(hidden @ kernel + bias, logits)
    assert set(trees.paths(state)) == set(statistics)
    for path, leaf in trees.paths(state).items():
        assert leaf.dtype == np.float32
        close(leaf, statistics[path])
    assert bool(state) == (name != "group")


@pytest.mark.parametrize("spec", MESHES[1:])
def test_evaluation_on_every_mesh_and_without_weights(spec):
    model, mesh, (params, state) = MODELS["batch"], mesh_of(spec), variables("batch")
    params = jax.device_put(params, parallel.partition(params, model.rules, mesh))
    forward = jax.jit(lambda p, b: model.apply(p, state, b)[0].logits)
    close(forward(params, parallel.put_batch({"inputs": batch()["inputs"]}, mesh)), reference("batch", False)[0])


@functools.cache
def trained(name, spec):
    """The state after 1 and after 3 steps of SGD."""
    model, mesh = MODELS[name], mesh_of(spec)
    problem = Problem(model, {"ce": (1.0, losses.cross_entropy_term())}, optax.sgd(0.05))
    params, statistics = variables(name)
    state = init_state(problem, mesh, model.rules, jax.random.key(0), batch(), params=params)
    state = state._replace(model_state=jax.device_put(statistics, parallel.replicated(mesh)))
    step, states = make_step(problem, mesh, state), []
    for _ in range(3):
        state, metrics = step(state, None, parallel.put_batch(batch(), mesh))
        states.append(jax.device_get(state))
        assert np.isfinite(metrics["loss"])
    return states[0], states[2]


@pytest.mark.parametrize("spec", MESHES)
def test_a_step_on_every_mesh_moves_the_statistics_of_the_global_batch(spec):
    statistics = reference("batch", True)[2]
    found = trees.paths(trained("batch", spec)[0].model_state)
    assert set(found) == set(statistics)
    for path in found:
        close(found[path], statistics[path])


@pytest.mark.parametrize("spec", MESHES[1:])
def test_three_steps_give_the_same_network_on_every_mesh(spec):
    alone, together = trained("batch", "data=1")[1], trained("batch", spec)[1]
    for part in ("params", "model_state"):
        expected, found = trees.paths(getattr(alone, part)), trees.paths(getattr(together, part))
        for path in expected:
            close(found[path], expected[path])
    started = trees.paths({"model": variables("batch")[0]})
    assert all(np.abs(leaf - started[path]).max() > 1e-4 for path, leaf in trees.paths(alone.params).items())


@pytest.mark.parametrize("name", ["batch", "group"])
def test_gradients_against_finite_differences(name):
    """Along a random direction in each parameter: the slope of the loss in training, taken in NumPy float64."""
    model, (params, state), targets, weights = MODELS[name], variables(name), batch()["targets"], batch()["weights"]

    def loss(logits, xp):
        logits = logits - logits.max(-1, keepdims=True)
        nll = xp.log(xp.exp(logits).sum(-1)) - logits[xp.arange(B), targets]
        return (weights * nll).sum() / weights.sum()

    slopes = jax.jit(jax.grad(lambda p: loss(model.apply(p, state, batch(), train=True)[0].logits, jnp)))(params)
    value = lambda p: loss(reference(name, True, p)[0], np)
    check_slopes(value, slopes, wide(params), step=1e-6, rtol=2e-4, atol=2e-6)


def test_statistics_are_weighted_float32_and_the_output_has_the_parameters_dtype():
    x = np.random.default_rng(3).normal(2, 3, (5, 4, 2)).astype(np.float32)
    weights = np.array([0, 2, 1, 1, 0], np.float32)
    state = {"mean": jnp.array([1.0, 2.0]), "var": jnp.array([3.0, 4.0])}
    params = {"scale": jnp.array([2.0, 0.5]), "bias": jnp.array([-1.0, 1.0])}
    run = lambda x, params, train, w: BatchNorm(0.75).apply(
        {"params": params, "batch_stats": state}, x, w, train, mutable=["batch_stats"]
    )
    seen = x[[1, 1, 2, 3]].astype(np.float64)  # a weight of 2 is the example twice
    mean, var = seen.mean((0, 1)), seen.var((0, 1))
    y, new = run(x, params, True, weights)
    close(new["batch_stats"]["mean"], 0.75 * state["mean"] + 0.25 * mean)
    close(new["batch_stats"]["var"], 0.75 * state["var"] + 0.25 * var)
    close(y, (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"])
    close(run(x, params, True, None)[0], (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-5) * [2, 0.5] + [-1, 1])
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    coarse = jnp.asarray(x, jnp.bfloat16)
    y, new = run(coarse, low, True, weights)
    assert (y.dtype, new["batch_stats"]["mean"].dtype) == (jnp.bfloat16, jnp.float32)
    exact = np.asarray(coarse, np.float64)[[1, 1, 2, 3]].mean((0, 1))
    close(new["batch_stats"]["mean"], 0.75 * state["mean"] + 0.25 * exact)
    assert run(coarse, low, False, None)[0].dtype == GroupNorm(2).apply({"params": low}, coarse).dtype == jnp.bfloat16


def multiply_adds(n, w, side):
    """(kernels, multiply-adds) of the convolutions, without projections."""
    stages = [2 * n * 9 * w * w, 9 * w * 2 * w + (2 * n - 1) * 9 * 4 * w * w, 9 * 2 * w * 4 * w + (2 * n - 1) * 9 * 16 * w * w]
    kernels = 27 * w + sum(stages)
    return kernels, side**2 * 27 * w + sum((side >> i) ** 2 * size for i, size in enumerate(stages))


@pytest.mark.parametrize("shortcut", ["projection", "identity"])
@pytest.mark.parametrize(("depth", "width"), [(8, 8), (20, 16), (32, 16), (56, 16)])
def test_parameters_and_flops_have_their_closed_form(depth, width, shortcut):
    model, n, w, side = ResNet(depth=depth, width=width, shortcut=shortcut).build((32, 32, 3), 10), (depth - 2) // 6, width, 32
    params, state = jax.eval_shape(model.init, jax.random.key(0), {"inputs": np.zeros((1, 32, 32, 3), np.float32)})
    kernels, products = multiply_adds(n, w, side)
    channels, head = w * (2 * n + 1) + 2 * w * 2 * n + 4 * w * 2 * n, 4 * w * 10
    if shortcut == "projection":
        kernels += 2 * w * w + 8 * w * w
        products += (side // 2) ** 2 * 2 * w * w + (side // 4) ** 2 * 8 * w * w
        channels += 2 * w + 4 * w
    assert trees.size(params) == kernels + 2 * channels + head + 10
    assert trees.size(state) == 2 * channels
    forward = lambda p, s, x: model.apply(p, s, {"inputs": x})[0].logits
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    assert trace.flops(forward, params, state, image) == 2 * 2 * (products + head)
    if (depth, shortcut) == (20, "projection"):
        assert trees.size(params) == 272_474


def test_the_rules_split_kernels_only_and_leave_the_rest_whole():
    mesh = parallel.make_mesh("data=2,fsdp=2,tensor=2")
    shardings = trees.paths(parallel.partition(variables("group")[0], MODELS["group"].rules, mesh))
    split = {path for path, sharding in shardings.items() if any(sharding.spec)}
    assert split == {path for path in shardings if path.endswith("kernel")}
    assert tuple(shardings["stage_0/rest/conv1/kernel"].spec) == (None, None, None, None, "fsdp")


@pytest.mark.parametrize("name", MODELS)
def test_every_size_can_change_and_names_its_axis(name):
    model, unit = MODELS[name], max(MODELS[name].module.group, 1)
    stages = model.module.stages
    parts = {"first_inner", "blocks", "inner", "width"} - ({"width"} if name == "identity" else set())
    expected = {f"stage_{i}/{part}" for i in range(2) for part in parts if stages[i].blocks or part in ("first_inner", "width")}
    assert set(model.axes) == expected

    def sizes(model):
        shapes = trees.paths(jax.eval_shape(model.init, jax.random.key(0), batch())[0])
        return {size: shapes[path].shape[axis] // (1 if "blocks" in size else unit) for size, (path, axis) in model.axes.items()}

    now = sizes(model)
    assert now == {name: getattr(stages[int(name[6])], name.split("/")[1]) for name in expected}
    bigger = {size: value + 1 for size, value in now.items()}
    assert sizes(model.resize(bigger)) == bigger
    assert model.resize({}) == model
    assert hash(model.resize(bigger)) != hash(model)


def test_the_job_analyses_and_compacts_batch_statistics_too():
    model, (params, state) = MODELS["batch"], variables("batch")
    split = Split(batch()["inputs"], batch()["targets"], batch()["id"])
    dataset = Dataset("blobs", split, split, split, tuple("abcd"), np.zeros(SHAPE), np.ones(SHAPE), "")
    bench = types.SimpleNamespace(dataset=dataset)
    net = Net(model, params, state)
    analysis = search.analyse(bench, net)
    assert {group.name: group.size for group in analysis.groups} == {
        "stage_0/width": 4, "stage_0/first_inner": 3, "stage_0/blocks": 2, "stage_0/inner": 5,
        "stage_1/width": 6, "stage_1/first_inner": 4, "stage_1/inner": 3,
    }  # fmt: skip
    assert analysis.left_out == {}
    keeps = {
        "stage_0/width": np.array([1, 0, 1, 1], bool),
        "stage_0/inner": np.array([[1, 0, 0, 1, 1], [0, 1, 1, 1, 0]], bool),
        "stage_0/blocks": np.array([0, 1], bool),
        "stage_1/width": np.arange(6) % 3 > 0,
        "stage_1/first_inner": np.arange(4) == 3,
    }
    mask = trace.masks(analysis.groups, keeps, params)
    masked = net._replace(params=jax.tree.map(lambda leaf, keep: np.where(keep, leaf, 0), params, mask))
    small = search.compact(bench, search.Candidate(None, masked, keeps, 1.0, True), analysis)
    assert small.model.module.stages == (Stage(3, 3, 1, 3), Stage(4, 1, 1, 3))
    mean = small.model_state["batch_stats"]["stage_0"]["rest"]["norm1"]["mean"]
    whole = state["batch_stats"]["stage_0"]["rest"]["norm1"]["mean"]
    np.testing.assert_array_equal(mean, [whole[1][[1, 2, 3]]])
    first = Reference(model.module, wide(masked.params), wide(state), None, False)(batch()["inputs"].astype(np.float64))[0]
    second = Reference(small.model.module, wide(small.params), wide(small.model_state), None, False)
    close(second(batch()["inputs"].astype(np.float64))[0], first)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: config.validate(ResNet(depth=18)), "depth is 18; expected .* of the form 6n \\+ 2"),
        (lambda: config.validate(ResNet(depth=2)), "depth is 2; expected"),
        (lambda: config.validate(ResNet(norm="layer")), "norm is 'layer'; expected one of batch, group"),
        (lambda: config.validate(ResNet(shortcut="none")), "shortcut is 'none'; expected one of projection, identity"),
        (
            lambda: config.validate(ResNet(norm="group", width=18)),
            "width 18 does not divide into groups of 4 channels; .* for example 16",
        ),
        (lambda: ResNet().build((64,), 10), r"needs images \[H, W, C\]; the data has \[64\]"),
        (lambda: MODELS["batch"].resize({"stage_3/width": 2}), "no size 'stage_3/width'; it has stage_0/first_inner"),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_configs_build_what_they_say():
    whole = ResNet().build((32, 32, 3), 10).module
    assert whole == ResNetModule((Stage(16, 16, 2, 16), Stage(32, 32, 2, 32), Stage(64, 64, 2, 64)), 10)
    small = ResNet(depth=8, width=8, norm="group", group=2, shortcut="identity", remat="dots").build(SHAPE, 5).module
    assert small == ResNetModule((Stage(4, 4, 0, 4), Stage(8, 8, 0, 8), Stage(16, 16, 0, 16)), 5, 2, False, "dots")


def test_a_run_can_start_from_given_statistics():
    params, statistics = variables("batch")
    model, mesh = MODELS["batch"], parallel.make_mesh("data=8")
    problem = Problem(model, {"ce": (1.0, losses.cross_entropy_term())}, optax.sgd(0.1))
    start = functools.partial(init_state, problem, mesh, model.rules, jax.random.key(0), batch(), params=params)
    state = jax.device_get(start(model_state=statistics))
    jax.tree.map(np.testing.assert_array_equal, state.model_state, statistics)
    jax.tree.map(np.testing.assert_array_equal, state.params["model"], params)
    with pytest.raises(ValueError, match=r"the model state given does not fit the model: batch_stats/\S+ is missing"):
        start(model_state={})
