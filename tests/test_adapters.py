"""Other people's models get what ours get: the same numbers on every mesh, features, groups, a smaller form, an export."""

import csv
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bmjax import deploy, distill, losses, parallel, shrink, trace, trees
from bmjax.models import adapters
from bmjax.parallel import collectives
from bmjax.train import Problem, init_state, make_step

B, D, H, C = 16, 6, 8, 3


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def plain_init(key, inputs):
    keys = jax.random.split(key)
    new = lambda key, n, m: {"kernel": 0.5 * jax.random.normal(key, (n, m)), "bias": jnp.full(m, 0.1)}
    return {"hidden": new(keys[0], inputs.shape[-1], H), "head": new(keys[1], H, C)}


def plain_apply(params, inputs, key=None):
    x = jax.nn.relu(dense(inputs, params["hidden"]))
    if key is not None:
        x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)
    return dense(x, params["head"]), {"hidden": dense(inputs, params["hidden"])}


class LinenNet(nn.Module):
    rate: float = 0.5

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.relu(nn.Dense(H, name="hidden")(x))
        x = nn.Dropout(self.rate, deterministic=deterministic)(x)
        return nn.Dense(C, name="head")(x)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(D, H, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(H, C, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.hidden(x))))


MODELS = {
    "plain": adapters.plain(plain_init, plain_apply),
    "linen": adapters.linen(LinenNet(), rngs=("dropout",)),
    "nnx": adapters.nnx(NNXNet),
}
each = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def make_batch():
    rng = np.random.default_rng(0)
    return {
        "inputs": rng.normal(size=(B, D)).astype(np.float32),
        "targets": rng.integers(0, C, B).astype(np.int32),
        "weights": np.where(np.arange(B) < 5, 0.0, rng.uniform(0.1, 1.0, B)).astype(np.float32),  # whole shards of padding
        "id": rng.permutation(B).astype(np.int32),
    }


def run(model, spec, steps=3, terms=None, teacher=None, executor="auto"):
    """(last state on the host, losses by step) of SGD."""
    batch, mesh = make_batch(), parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None)
    problem = Problem(model, terms or {"ce": (1.0, losses.cross_entropy_term())}, optax.sgd(0.2), teacher, loss_tx=optax.sgd(0.2))
    frozen = None
    if teacher is not None:
        frozen = dict(zip(("params", "model_state"), jax.jit(teacher.init)(jax.random.key(7), batch)))
        frozen = jax.device_put(frozen, parallel.replicated(mesh))
    state = init_state(problem, mesh, model.rules, jax.random.key(0), batch, frozen=frozen)
    step, seen = make_step(problem, mesh, state, executor), []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        seen.append(float(metrics["loss"]))
    return jax.device_get(state), seen


def assert_close(found, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


@each
def test_parameters_are_nested_dicts_by_path(model):
    params, state = model.init(jax.random.key(0), make_batch())
    assert {path: leaf.shape for path, leaf in trees.paths(params).items()} == {
        "head/bias": (C,), "head/kernel": (H, C), "hidden/bias": (H,), "hidden/kernel": (D, H),
    }  # fmt: skip
    assert state == {}


@each
def test_logits_and_feature_are_those_of_the_formula(model):
    batch = make_batch()
    params, _ = jax.jit(model.init)(jax.random.key(0), batch)
    outputs, _ = model.apply(params, {}, batch, capture=("hidden",))
    host = jax.tree.map(np.asarray, params)
    hidden = dense(batch["inputs"], host["hidden"])
    np.testing.assert_allclose(outputs.features["hidden"], hidden, atol=1e-5)
    np.testing.assert_allclose(outputs.logits, dense(np.maximum(hidden, 0), host["head"]), atol=1e-5)


@each
def test_distillation_with_a_hint_and_dropout_is_the_same_on_every_mesh(model):
    terms = {
        "ce": (0.5, losses.cross_entropy_term()),
        "kd": (0.5, losses.on_logits(distill.kd, temperature=2.0)),
        "hint": (0.5, losses.on_features(distill.hint, {"hidden": "hidden"}, project="linear")),
    }
    one, history = run(model, "data=1", terms=terms, teacher=model)
    assert history[-1] < history[0]
    assert np.abs(one.params["loss"]["hint"]["project"]["0"]["bias"]).max() > 1e-3
    for spec in ("data=8", "data=2,fsdp=4") if model is MODELS["nnx"] else ("data=8",):
        many, losses_seen = run(model, spec, terms=terms, teacher=model)
        assert_close(losses_seen, history)
        assert_close(many.params, one.params)


HALVES = (("hidden/kernel", (None, "fsdp")), ("hidden/bias", ("fsdp",)), (".*", ()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("executor", "spec"), [("pmap", "data=8"), ("hybrid", "data=2,fsdp=4")])
def test_executors_on_request_run_them_too(executor, spec, name):
    """With dropout, and for hybrid with parameters that are split."""
    split = {
        "plain": adapters.plain(plain_init, plain_apply, rules=HALVES),
        "linen": adapters.linen(LinenNet(), rngs=("dropout",), rules=HALVES),
        "nnx": adapters.nnx(NNXNet, rules=HALVES),
    }[name]
    one, history = run(MODELS[name], "data=1")
    many, seen = run(split, spec, executor=executor)
    assert history[-1] < history[0]
    assert_close(seen, history)
    assert_close(many.params, one.params)


@each
def test_dropout_goes_by_the_id_and_by_the_step_key(model):
    batch = make_batch()
    params, _ = model.init(jax.random.key(0), batch)
    train = jax.jit(lambda batch, key: model.apply(params, {}, batch, train=True, rngs={"dropout": key})[0].logits)
    first = train(batch, jax.random.key(1))
    order = np.random.default_rng(1).permutation(B)
    np.testing.assert_allclose(train({k: v[order] for k, v in batch.items()}, jax.random.key(1)), first[order], atol=1e-6)
    assert np.abs(train(batch, jax.random.key(2)) - first).max() > 1e-3
    same = {**batch, "inputs": np.tile(batch["inputs"][:1], (B, 1))}
    assert len(np.unique(np.round(train(same, jax.random.key(1)), 5), axis=0)) > B // 2


@each
def test_masked_equals_replayed_and_the_export_predicts_it(model, tmp_path):
    batch = make_batch()
    params, state = jax.jit(model.init)(jax.random.key(0), batch)
    forward = lambda params, inputs: model.apply(params, {}, {"inputs": inputs})[0].logits
    groups = trace.groups(forward, params, batch["inputs"], names={"neurons": ("hidden/kernel", 1)})
    assert [(group.name, group.size, group.note) for group in groups] == [("neurons", H, "")]
    groups = trace.groups(forward, params, batch["inputs"], names=model.axes)
    keeps = {groups[0].name: np.arange(H) % 4 > 0}
    masked = jax.tree.map(lambda p, keep: p * keep, params, trace.masks(groups, keeps, params))
    small = shrink.compact(params, groups, keeps)
    assert small["hidden"]["kernel"].shape == (D, 6)
    compact = adapters.replay(model, params, state, batch["inputs"], keeps)
    shipped = lambda params, inputs: compact(params, {}, inputs)
    shrink.verify(jax.jit(forward), masked, jax.jit(shipped), small, batch["inputs"])
    shrink.verify(jax.jit(forward), masked, jax.jit(shipped), small, batch["inputs"][:5])

    folder = deploy.export(
        shipped,
        small,
        tmp_path / "export",
        input_shape=(D,),
        input_dtype="float32",
        classes=C,
        metadata={"class_names": list("abc")},
    )
    np.save(tmp_path / "inputs.npy", batch["inputs"])
    flags = {"model": folder, "input": tmp_path / "inputs.npy", "output": tmp_path / "predictions.csv"}
    command = [sys.executable, "-m", "experiments.predict", *(f"--{name}={value}" for name, value in flags.items())]
    subprocess.run(command, check=True, capture_output=True)
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    logits = np.asarray(forward(masked, batch["inputs"]))
    np.testing.assert_array_equal([int(row["class"]) for row in rows], logits.argmax(-1))
    np.testing.assert_allclose([float(row["confidence"]) for row in rows], jax.nn.softmax(logits).max(-1), atol=1e-5)


class LinenNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(nn.Dense(H, name="hidden")(x))
        return nn.Dense(C, name="head")(nn.relu(x))


class NNXNorm(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.norm = nnx.Linear(D, H, rngs=rngs), nnx.BatchNorm(H, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(H, C, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.hidden(x))))


def norm_init(key, inputs):
    params = plain_init(key, inputs)
    norm = {"scale": jnp.ones(H), "bias": jnp.zeros(H)}
    return {**params, "norm": norm}, {"norm": {"mean": jnp.zeros(H), "var": jnp.ones(H)}}


def norm_apply(params, state, inputs, train, gathered=False):
    x, norm = dense(inputs, params["hidden"]), state["norm"]
    if train:
        mean, var = collectives.moments(x, jnp.ones(len(x))) if gathered else (x.mean(0), x.var(0))
        new = {"mean": 0.9 * norm["mean"] + 0.1 * mean, "var": 0.9 * norm["var"] + 0.1 * var}
    else:
        mean, var, new = norm["mean"], norm["var"], norm
    x = (x - mean) * jax.lax.rsqrt(var + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    return dense(jax.nn.relu(x), params["head"]), {"norm": new}


NORMS = {
    "plain": adapters.plain(norm_init, norm_apply, stateful=True),
    "linen": adapters.linen(LinenNorm()),
    "nnx": adapters.nnx(NNXNorm),
}
each_norm = pytest.mark.parametrize("model", NORMS.values(), ids=NORMS.keys())


@each_norm
def test_batch_statistics_are_the_global_batchs_where_the_compiler_sees_it_and_refused_elsewhere(model):
    one, history = run(model, "data=1")
    many, losses_seen = run(model, "data=8", executor="partitioned")
    assert_close((many.params, many.model_state, losses_seen), (one.params, one.model_state, history))
    first, _ = run(model, "data=1", steps=1)
    start, _ = run(model, "data=1", steps=0)
    hidden = dense(make_batch()["inputs"], start.params["model"]["hidden"])
    mean = next(leaf for path, leaf in trees.paths(first.model_state).items() if path.endswith("norm/mean"))
    np.testing.assert_allclose(mean, 0.1 * hidden.mean(0), atol=1e-5)
    with pytest.raises(ValueError, match=r"norm/mean.* is made of one device's rows only: take the executor partitioned"):
        run(model, "data=8", steps=1)


def test_statistics_by_our_collectives_are_accepted_on_every_mesh():
    gathered = lambda params, state, inputs, train: norm_apply(params, state, inputs, train, gathered=True)
    model = adapters.plain(norm_init, gathered, stateful=True)
    one, _ = run(model, "data=1")
    many, _ = run(model, "data=8")
    assert_close((many.params, many.model_state), (one.params, one.model_state))


@each_norm
def test_evaluation_reads_the_state_and_leaves_it(model):
    batch = make_batch()
    params, state = model.init(jax.random.key(0), batch)
    moved = jax.tree.map(lambda x: x + 1, state)
    fresh, kept = model.apply(params, moved, batch)
    assert kept is moved
    assert np.abs(fresh.logits - model.apply(params, state, batch)[0].logits).max() > 1e-3


@each_norm
def test_channels_shrink_with_their_statistics(model):
    batch = make_batch()
    params, state = run(model, "data=1")[0][1:3]
    params = params["model"]
    forward = lambda params, state, inputs: model.apply(params, state, {"inputs": inputs})[0].logits
    groups = trace.groups(forward, params, batch["inputs"], state=state)
    assert [(group.size, group.note, len(group.state)) for group in groups] == [(H, "", 2)]
    keeps = {groups[0].name: np.arange(H) % 2 == 0}
    masked = jax.tree.map(lambda p, keep: p * keep, params, trace.masks(groups, keeps, params))
    small, small_state = shrink.compact(params, groups, keeps), shrink.compact_state(state, groups, keeps)
    compact = adapters.replay(model, params, state, batch["inputs"], keeps)
    np.testing.assert_allclose(compact(small, small_state, batch["inputs"]), forward(masked, state, batch["inputs"]), atol=1e-5)


def test_a_state_with_random_numbers_is_refused_where_devices_would_draw_alike():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(C)(nn.Dropout(0.5, deterministic=not train)(nn.BatchNorm(use_running_average=not train)(x)))

    model = adapters.linen(Both(), rngs=("dropout",))
    one, _ = run(model, "data=1", steps=2)
    many, _ = run(model, "data=8", steps=2, executor="partitioned")
    assert_close((many.params, many.model_state), (one.params, one.model_state))
    with pytest.raises(ValueError, match="would draw the same on every device: take the executor partitioned"):
        run(model, "data=8", steps=1)


def test_any_pytree_of_parameters_becomes_a_nested_dict_and_comes_back():
    def init(key, inputs):
        return [(jnp.ones((D, H)), jnp.zeros(H)), (jnp.ones((H, C)), jnp.arange(C, dtype=jnp.float32))]

    def apply(params, inputs):
        (w, b), (v, c) = params
        return (inputs @ w + b) @ v + c

    model = adapters.plain(init, apply)
    params, _ = model.init(jax.random.key(0), make_batch())
    assert sorted(trees.paths(params)) == ["0/0", "0/1", "1/0", "1/1"]
    outputs, _ = model.apply(params, {}, make_batch())
    expected = make_batch()["inputs"].sum(-1)[:, None] * H + np.arange(C)
    np.testing.assert_allclose(outputs.logits, expected, atol=1e-4)


def test_linen_features_by_submodule_by_sow_and_by_call():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(D, name="shared")
            x = layer(layer(x))
            self.sow("intermediates", "doubled", 2 * x)
            return nn.Dense(C)(x)

    model, batch = adapters.linen(Net()), make_batch()
    params, state = model.init(jax.random.key(0), batch)
    assert state == {}
    features = model.apply(params, {}, batch, capture=("shared", "shared:1", "doubled"))[0].features
    once = dense(batch["inputs"], params["shared"])
    twice = dense(once, params["shared"])
    for name, expected in {"shared": once, "shared:1": twice, "doubled": 2 * twice}.items():
        np.testing.assert_allclose(features[name], expected, atol=1e-5)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        y = self.dense(x)
        self.sow(nnx.Intermediate, "inner", y)
        return x + y


class Stack(nnx.Module):
    def __init__(self, rngs, scanned=False):
        self.scanned = scanned
        self.blocks = nnx.vmap(Block)(rngs.fork(split=2)) if scanned else nnx.List([Block(rngs), Block(rngs)])
        self.head = nnx.Linear(D, C, rngs=rngs)

    def __call__(self, x):
        if self.scanned:
            graph, state = nnx.split(self.blocks)
            x, _ = jax.lax.scan(lambda x, layer: (nnx.merge(graph, layer)(x), None), x, state)
        else:
            for block in self.blocks:
                x = block(x)
        return self.head(x)


def test_nnx_features_by_submodule_and_by_sow():
    model, batch = adapters.nnx(Stack), make_batch()
    params, _ = model.init(jax.random.key(0), batch)
    forward = jax.jit(lambda params: model.apply(params, {}, batch, capture=("blocks/0", "blocks/1/inner"))[0].features)
    features = forward(params)
    x, (first, second) = batch["inputs"], (params["blocks"][i]["dense"] for i in "01")
    x = x + dense(x, first)
    np.testing.assert_allclose(features["blocks/0"], x, atol=1e-5)
    np.testing.assert_allclose(features["blocks/1/inner"], dense(x, second), atol=1e-5)


def test_what_an_nnx_module_sows_in_a_scan_is_missed_loudly():
    model, batch = adapters.nnx(lambda rngs: Stack(rngs, scanned=True)), make_batch()
    params, _ = model.init(jax.random.key(0), batch)
    assert params["blocks"]["dense"]["kernel"].shape == (2, D, D)
    assert model.apply(params, {}, batch)[0].logits.shape == (B, C)
    with pytest.raises(ValueError, match=r"no feature 'blocks/inner'; there are head \(what a scan computes inside is lost"):
        model.apply(params, {}, batch, capture=("blocks/inner",))


@each
def test_a_feature_that_is_not_there_is_one_clear_error(model):
    params, _ = model.init(jax.random.key(0), make_batch())
    with pytest.raises(ValueError, match=r"^there is no feature 'layers/0'; there are .*hidden.* \(what a scan computes inside"):
        model.apply(params, {}, make_batch(), capture=("layers/0",))


def test_features_that_are_listed_are_checked_before_the_model_runs():
    model = adapters.plain(plain_init, plain_apply, features=("hidden",))
    with pytest.raises(ValueError, match=r"^there is no feature 'x'; there are hidden$"):
        model.apply({}, {}, {}, capture=("x",))


def test_a_feature_stacked_over_layers_is_refused():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(D, name="dense")(x), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "intermediates": 0}
            stack = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=2)
            return nn.Dense(C)(stack(name="layers")(x, None)[0])

    model = adapters.linen(Net())
    params, _ = model.init(jax.random.key(0), make_batch())
    with pytest.raises(
        ValueError, match=r"the feature 'layers/dense' is \[2, 16, 6\]; expected the batch of 16 on the first axis"
    ):
        model.apply(params, {}, make_batch(), capture=("layers/dense",))


@each
def test_training_without_a_key_or_ids_is_refused(model):
    batch = make_batch()
    params, _ = model.init(jax.random.key(0), batch)
    with pytest.raises(ValueError, match=r"give apply rngs={'dropout': key}"):
        model.apply(params, {}, batch, train=True)
    del batch["id"]
    with pytest.raises(ValueError, match=r"dropout needs batch\['id'\]"):
        model.apply(params, {}, batch, train=True, rngs={"dropout": jax.random.key(0)})


def test_an_unnamed_random_stream_of_a_linen_module_is_one_line():
    model = adapters.linen(LinenNet())
    params, _ = model.init(jax.random.key(0), make_batch())
    with pytest.raises(
        ValueError,
        match=r"needs PRNG for \"dropout\"; name the module's streams, as in adapters\.linen\(module, rngs=\('dropout',\)\)$",
    ):
        model.apply(params, {}, make_batch(), train=True, rngs={"dropout": jax.random.key(0)})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (adapters.plain(lambda key, x: {}, plain_apply), "the model has no parameters"),
        (adapters.plain(lambda key, x: jnp.ones((D, C)), lambda w, x: x @ w), "init returned one bare array"),
        (adapters.plain(norm_init, norm_apply), r"init returned a pair of dicts; if it is \(params, state\), give plain st"),
        (adapters.plain(plain_init, norm_apply, stateful=True), r"init of a stateful model returned dict; expected \(params, st"),
    ],
)
def test_what_init_returns_is_checked(model, message):
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), make_batch())


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (
            lambda p, x: plain_apply(p, x)[0][0],
            r"the model returned an array \[3\] for a batch of 16; expected logits \[16, ..., cl",
        ),
        (lambda p, x: {"logits": 1}, "the model returned dict"),
        (lambda p, x: (*plain_apply(p, x), {}), r"apply returned 3 values; expected logits or \(logits, features\)"),
    ],
)
def test_what_apply_returns_is_checked(apply, message):
    model = adapters.plain(plain_init, apply)
    params, _ = model.init(jax.random.key(0), make_batch())
    with pytest.raises(ValueError, match=message):
        model.apply(params, {}, make_batch())


def test_a_state_that_changes_its_form_is_refused_by_the_step():
    model = adapters.plain(norm_init, lambda p, s, x, train: (norm_apply(p, s, x, train)[0], {}), stateful=True)
    with pytest.raises(ValueError, match="a new state must be like the one before"):
        run(model, "data=1", steps=1)


def test_resize_is_the_users_own_or_refused_with_the_way_out():
    axes = {"neurons": ("hidden/kernel", 1)}
    sized = lambda sizes: adapters.linen(LinenNet(rate=float(sizes["neurons"])))
    model = adapters.linen(LinenNet(), axes=axes, resize=sized)
    assert model.axes == axes
    assert model.resize({"neurons": 4}) is not model
    for sizes, message in (({"heads": 1}, "no size 'heads'; it has neurons"), ({"neurons": 0}, "cannot be 0")):
        with pytest.raises(ValueError, match=message):
            model.resize(sizes)
    with pytest.raises(ValueError, match=r"give the adapter resize=, or take adapters\.replay"):
        MODELS["nnx"].resize({"neurons": 4})


def test_rules_partition_the_parameters():
    model = adapters.nnx(NNXNet, rules=(("hidden/kernel", (None, "fsdp")), (".*", ())))
    mesh = parallel.make_mesh("data=2,fsdp=4")
    problem = Problem(model, {"ce": (1.0, losses.cross_entropy_term())}, optax.sgd(0.1))
    state = init_state(problem, mesh, model.rules, jax.random.key(0), make_batch())
    assert state.params["model"]["hidden"]["kernel"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")
    step = make_step(problem, mesh, state)
    state, _ = step(state, None, make_batch())
    whole, _ = run(adapters.nnx(NNXNet), "data=1", steps=0)
    assert state.params["model"]["hidden"]["kernel"].shape == whole.params["model"]["hidden"]["kernel"].shape
