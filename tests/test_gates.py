"""Hard concrete gates: their distribution, where they act, and how they close in training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bmjax import losses, parallel, prune, shrink, trace, trees
from bmjax.models.linen import LinenModel
from bmjax.models.mlp import PlainMLP, ResidualMLP
from bmjax.models.resnet import ResNetModule, Stage
from bmjax.models.vit import ViT
from bmjax.prune.carrying import scaled
from bmjax.train import Problem, init_state, make_step
from bmjax.types import Group, Member, Outputs


def line(path, axis, size):
    return Member(path, axis, np.arange(size)[:, None])


def just(size=4, stack=0, **more):
    """Gates on the rows of one array."""
    group = Group("rows", size, stack, (line("down", 1 if stack else 0, size),))
    return prune.hard_concrete([group], {"rows": group.members}, **more)


def logits_of(model, state):
    return lambda params, batch: model.apply(params, state, batch)[0].logits


def random_like(shapes, seed, low=None):
    rng = np.random.default_rng(seed)
    draw = (lambda s: rng.uniform(0.5, 2.0, s)) if low else (lambda s: 0.5 * rng.normal(size=s))
    return jax.tree.map(lambda leaf: draw(leaf.shape).astype(np.float32), shapes)


@functools.cache
def found(module, shape, names, where=()):
    """(model, params, state, batch, groups, carriers) of a module on random numbers; only the named groups."""
    model = LinenModel(module)
    batch = {"inputs": np.random.default_rng(3).normal(size=shape).astype(np.float32), "id": np.arange(shape[0])}
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
    params, state = random_like(shapes[0], 1), random_like(shapes[1], 2, low=True)
    call = lambda p, x: logits_of(model, state)(p, {"inputs": x})
    stateful = lambda p, s, x: logits_of(model, s)(p, {"inputs": x})
    traced = trace.trace(stateful, params, batch["inputs"], names=model.axes, state=state)
    groups = tuple(group for group in traced.groups if group.name in names)
    assert {group.name for group in groups} == set(names)
    return model, params, state, batch, groups, prune.carriers(call, params, batch["inputs"], groups, dict(where))


RESIDUAL = (ResidualMLP(3, 8, 6, 4), (5, 7), ("layers", "neurons"), (("layers", "/down/"),))
VIT = (ViT(2, 2, 8, 4, 2, 6, 5), (2, 4, 4, 1), ("heads", "neurons"))
CONVOLUTIONS = (ResNetModule((Stage(4, 3, 2, 5), Stage(6, 4, 0, 0)), 5), (3, 6, 6, 2), ("stage_0/inner", "stage_0/width"))


# The distribution


@pytest.mark.parametrize(("temperature", "stretch"), [(2 / 3, (-0.1, 1.1)), (0.4, (-0.3, 1.2))])
def test_samples_follow_the_stretched_and_cut_concrete_distribution(temperature, stretch):
    """Against float64: u -> sigmoid((log u - log(1 - u) + a) / t), stretched and cut, is monotone in u, so that
    P(z <= v) = u where the map gives v."""
    gates, (low, high), n = just(40000, 3, temperature=temperature, stretch=stretch), stretch, 40000
    alphas = np.array([-1.5, 0.2, 2.0])
    z = np.asarray(gates.sample({"rows": jnp.broadcast_to(jnp.float32(alphas)[:, None], (3, n))}, jax.random.key(1))["rows"])
    assert z.min() == 0 and z.max() == 1

    def below(v, alpha):
        s = (v - low) / (high - low)
        return 1 / (1 + np.exp(alpha - temperature * np.log(s / (1 - s))))

    for row, alpha in zip(z, alphas):
        assert (row == 0).mean() == pytest.approx(below(0, alpha), abs=0.012)
        assert (row == 1).mean() == pytest.approx(1 - below(1, alpha), abs=0.012)
        for v in (0.1, 0.5, 0.9):
            assert (row <= v).mean() == pytest.approx(below(v, alpha), abs=0.012)
        assert float(just(1, temperature=temperature, stretch=stretch).l0({"rows": jnp.float32([alpha])})) == pytest.approx(
            1 - below(0, alpha), rel=1e-5
        )


def test_l0_is_the_mean_number_of_open_gates_and_counts_parameters_where_asked():
    gates = just(5)
    alphas = {"rows": jnp.linspace(-3, 3, 5)}
    drawn = jax.vmap(lambda key: gates.sample(alphas, key)["rows"])(jax.random.split(jax.random.key(0), 20000))
    assert float(gates.l0(alphas)) == pytest.approx((np.asarray(drawn) > 0).sum(1).mean(), abs=0.03)
    assert float(gates.l0(alphas, {"down": jnp.ones((5, 7))})) == pytest.approx(7 * float(gates.l0(alphas)), rel=1e-6)


def test_l0_in_parameters_counts_every_member_of_an_element():
    _, params, _, _, groups, carriers = found(*RESIDUAL)
    gates = prune.hard_concrete(groups, carriers, keep=0.5)
    # Each of 3 x 6 neurons: 8 in, a bias, 8 out. Each of 3 layers: two kernels of 8 x 6, biases, a norm's scale and bias.
    expected = 0.5 * (18 * 17 + 3 * (2 * 48 + 6 + 8 + 16))
    assert float(gates.l0(gates.init(), params)) == pytest.approx(expected, rel=1e-5)


def test_gates_begin_with_the_probability_asked_for():
    for keep in (0.2, 0.9, 0.983):
        gates = just(10, keep=keep)
        assert float(gates.l0(gates.init())) == pytest.approx(10 * keep, rel=1e-5)
    assert (np.asarray(gates.expected(gates.init())["rows"]) == 1).all()  # a trained model evaluates as before


def test_the_gradient_of_samples_is_that_of_finite_differences():
    gates, key, shift = just(64), jax.random.key(2), 1e-2
    alphas = {"rows": jnp.linspace(-2.0, 2.0, 64)}
    total = lambda a: jnp.sum(jnp.arange(1, 65) * gates.sample(a, key)["rows"])
    at = lambda d: np.asarray(gates.sample({"rows": alphas["rows"] + d}, key)["rows"], np.float64)
    slope = (at(shift) - at(-shift)) / (2 * shift)
    inside = (at(shift) < 1) & (at(-shift) > 0)
    assert 10 < inside.sum() < 64
    gradient = np.asarray(jax.grad(total)(alphas)["rows"]) / np.arange(1, 65)
    np.testing.assert_allclose(gradient[inside], slope[inside], atol=2e-4)
    np.testing.assert_array_equal(gradient[(at(0) == 0) | (at(0) == 1)], 0)


def test_gates_of_evaluation_are_the_formula():
    a = np.linspace(-6, 6, 25)
    expected = np.clip(1.2 / (1 + np.exp(-a)) - 0.1, 0, 1)
    np.testing.assert_allclose(just(25).expected({"rows": jnp.float32(a)})["rows"], expected, atol=1e-6)


# Where they act


def test_kernels_that_read_the_elements_carry_them():
    places = lambda case: {name: {(m.path, m.axis) for m in members} for name, members in found(*case)[-1].items()}
    assert places(RESIDUAL) == {
        "layers": {("layers/down/kernel", 0), ("layers/down/bias", 0)},
        "neurons": {("layers/down/kernel", 1)},
    }
    assert places(VIT) == {"heads": {("layers/attention/out/kernel", 1)}, "neurons": {("layers/down/kernel", 1)}}
    assert places(CONVOLUTIONS) == {
        "stage_0/inner": {("stage_0/rest/conv2/kernel", 3)},
        "stage_0/width": {
            ("stage_0/first/conv1/kernel", 2),
            ("stage_0/rest/conv1/kernel", 3),
            ("stage_1/first/conv1/kernel", 2),
            ("stage_1/first/projection/kernel", 2),
        },
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", [RESIDUAL, VIT, CONVOLUTIONS], ids=["residual", "vit", "convolutions"])
def test_gates_at_zero_give_the_masked_model(case):
    model, params, state, batch, groups, carriers = found(*case)
    rng = np.random.default_rng(5)
    shape = lambda group: (group.stack, group.size) if group.stack else (group.size,)
    keeps = {group.name: rng.random(shape(group)) < 0.6 for group in groups}
    mask = trace.masks(groups, keeps, params)
    masked = jax.tree.map(lambda p, m: np.where(m, p, 0), params, mask)
    z = {name: jnp.float32(keep) for name, keep in keeps.items()}
    run = jax.jit(logits_of(model, state))
    expected = np.asarray(run(masked, batch))
    gates = prune.hard_concrete(groups, carriers)
    np.testing.assert_allclose(run(gates.apply(params, z), batch), expected, atol=1e-5 * max(1, np.abs(expected).max()))
    assert np.abs(run(params, batch) - expected).max() > 0.05  # what was dropped mattered


def test_a_gate_scales_the_contribution_once():
    """One hidden layer: logits are linear in what each neuron contributes, biases before the ReLU included."""
    model, params, state, batch, groups, carriers = found(PlainMLP((6,), 3), (5, 7), ("hidden_0",))
    z = np.array([0.0, 0.3, 0.5, 1.0, 0.9, 0.2])
    hidden, head = params["hidden_0"], params["head"]
    neurons = np.maximum(batch["inputs"].astype(np.float64) @ hidden["kernel"] + hidden["bias"], 0)
    gated = prune.hard_concrete(groups, carriers).apply(params, {"hidden_0": jnp.float32(z)})
    np.testing.assert_allclose(
        logits_of(model, state)(gated, batch), (neurons * z) @ head["kernel"] + head["bias"], rtol=1e-5, atol=1e-5
    )


def test_a_member_in_blocks_is_scaled_where_its_elements_are():
    strided = Member("out", 0, np.array([[0, 2], [1, 3]]))  # position 4 belongs to nobody
    group = Group("pairs", 2, 0, (strided,))
    got = scaled({"out": jnp.ones((5, 2))}, [group], {"pairs": [strided]}, {"pairs": jnp.float32([0.5, 0.25])})
    np.testing.assert_array_equal(got["out"], np.array([[0.5, 0.25, 0.5, 0.25, 1.0]] * 2).T)


def test_carriers_that_do_not_mask_are_refused():
    model, params, state, batch, groups, _ = found(*RESIDUAL)
    call = lambda p, b: logits_of(model, state)(p, b)
    layers = [group for group in groups if group.name == "layers"]
    with pytest.raises(ValueError, match=r"nothing carries a factor of the group 'layers': where=\{'layers': ...\} must match"):
        prune.carriers(call, params, batch, layers)
    with pytest.raises(ValueError, match="'layers' at 0, carried by layers/down/kernel:0, do not give the masked model"):
        prune.carriers(call, params, batch, layers, {"layers": "down/kernel"})
    with pytest.raises(ValueError, match="'nothing' matches none of its members"):
        prune.carriers(call, params, batch, layers, {"layers": "nothing"})
    with pytest.raises(ValueError, match="no group is called 'heads'; there are layers"):
        prune.carriers(call, params, batch, layers, {"heads": "out"})


# What stays


def test_keeps_are_the_open_gates_filled_up_to_equal_layers():
    gates = just(4, 2)
    alphas = {"rows": jnp.float32([[-9, 2, 3, -8], [-7, -9, 1, -8]])}
    np.testing.assert_array_equal(gates.keeps(alphas)["rows"], [[0, 1, 1, 0], [1, 0, 1, 0]])
    np.testing.assert_array_equal(gates.keeps(alphas, 0.75)["rows"], [[0, 0, 1, 0], [0, 0, 1, 0]])
    np.testing.assert_array_equal(gates.keeps(alphas, {"rows": 0.25})["rows"], [[0, 1, 1, 1], [1, 0, 1, 1]])
    flat = just(4)
    np.testing.assert_array_equal(flat.keeps({"rows": jnp.float32([1, -9, 1, -9])})["rows"], [1, 0, 1, 0])
    np.testing.assert_array_equal(flat.keeps({"rows": jnp.float32([1, 1, 1, 1])}, 0.5)["rows"], [1, 1, 0, 0])
    np.testing.assert_array_equal(flat.keeps({"rows": jnp.full(4, -9.0)})["rows"], [1, 0, 0, 0])  # one stays


@pytest.mark.slow
@pytest.mark.parametrize("case", [RESIDUAL, VIT, CONVOLUTIONS], ids=["residual", "vit", "convolutions"])
def test_the_compact_model_evaluates_like_the_gated_one(case):
    model, params, state, batch, groups, carriers = found(*case)
    net = prune.gated(model, prune.hard_concrete(groups, carriers))
    trained = net.begin(params)
    alphas = lambda like: np.resize(np.float32([-4, 0.3, 3, -5, -0.5]), like.shape)  # gates of 0, .59, 1, 0, .35
    trained["gates"] = jax.tree.map(alphas, trained["gates"])
    assert trees.first_difference(trained, trees.nested(trees.paths(trained))) == ""  # as checkpoints are read
    z = net.gates.expected({group.name: trained["gates"][group.name.replace("/", ".")] for group in groups})
    assert all(((np.asarray(v) > 0) & (np.asarray(v) < 1)).any() and (np.asarray(v) == 0).any() for v in z.values())
    plain, keeps = net.finished(trained)
    small = model.resize(shrink.sizes(groups, keeps))
    compact, cut = shrink.compact(plain, groups, keeps), shrink.compact_state(state, groups, keeps)
    assert trees.size(compact) < trees.size(plain)
    assert shrink.verify(logits_of(net, state), trained, logits_of(small, cut), compact, batch) <= 1e-5


# In the step


def batch_of(rows=16, seed=0):
    rng = np.random.default_rng(seed)
    weights = np.where(np.arange(rows) < 5, 0.0, rng.uniform(0.1, 1.0, rows))  # whole shards of padding
    return {
        "inputs": rng.normal(size=(rows, 7)).astype(np.float32),
        "targets": rng.integers(0, 4, rows).astype(np.int32),
        "weights": weights.astype(np.float32),
        "id": np.arange(rows, dtype=np.int32),
    }


@functools.cache
def network():
    _, _, _, _, groups, carriers = found(*RESIDUAL)
    return prune.gated(LinenModel(ResidualMLP(3, 8, 6, 4, dropout=0.1)), prune.hard_concrete(groups, carriers, keep=0.7))


def train(net, spec, executor="auto", steps=3, params=None, batch=None, weight=0.05, tx=None, **more):
    """(params, metrics of each step) after some steps of SGD."""
    batch = batch or batch_of()
    mesh = parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None)
    terms = {"ce": (1.0, losses.cross_entropy_term()), "l0": (weight, prune.l0_term())}
    problem = Problem(net, terms, tx or optax.sgd(0.3), **more)
    state = init_state(problem, mesh, net.rules, jax.random.key(0), batch, params=params)
    step, placed, history = make_step(problem, mesh, state, executor), parallel.put_batch(batch, mesh), []
    for _ in range(steps):
        state, metrics = step(state, None, placed)
        history.append(metrics)
    return jax.device_get(state.params["model"]), jax.device_get(history)


@functools.cache
def on_one_device():
    return train(network(), "data=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "executor", "accumulate"),
    [
        ("data=8", "replicated", 1),
        ("data=8", "replicated", 2),
        ("data=4,fsdp=2", "partitioned", 1),
        ("data=2,fsdp=2,tensor=2", "hybrid", 1),
    ],
)
def test_every_executor_draws_the_same_gates(spec, executor, accumulate):
    wanted, history = on_one_device()
    got, metrics = train(network(), spec, executor, accumulate=accumulate)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), (got, metrics), (wanted, history))


def test_the_step_penalises_what_stays():
    net = network()
    _, history = on_one_device()
    assert history[0]["l0"] == pytest.approx(0.7 * (3 + 18), rel=1e-5)
    assert history[0]["loss"] == pytest.approx(history[0]["ce"] + 0.05 * history[0]["l0"], rel=1e-5)
    assert history[2]["l0"] < history[0]["l0"]
    counted = prune.gated(net.model, net.gates, count_parameters=True)
    assert train(counted, "data=1", steps=1, weight=1e-4)[1][0]["l0"] == pytest.approx(0.7 * (18 * 17 + 3 * 126), rel=1e-5)


def test_the_penalty_counts_with_tokens():
    weights = jnp.float32([[1, 1, 0], [0.5, 0, 0]])
    mean = prune.l0_term().apply(None, Outputs(None, {"l0": jnp.full(2, 3.5)}), None, {"weights": weights})
    assert (float(mean.total), float(mean.count)) == (3.5 * 2.5, 2.5)


@pytest.mark.slow
def test_useless_gates_close_and_useful_ones_stay_open():
    """Of 8 neurons two decide, by the sign of the first input; SGD, 8 devices."""
    model, params, _, _, groups, carriers = found(PlainMLP((8,), 2), (5, 7), ("hidden_0",))
    kernel, head = 0.3 * params["hidden_0"]["kernel"], np.zeros((8, 2), np.float32)
    kernel[:, [2, 5]] = 0
    kernel[0, 2], kernel[0, 5], head[2, 1], head[5, 0] = 1, -1, 6, 6
    start = {"hidden_0": {"kernel": kernel, "bias": np.zeros(8, np.float32)}, "head": {"kernel": head, "bias": np.zeros(2)}}
    start = jax.tree.map(np.float32, start)
    batch = batch_of(64)
    batch |= {"targets": (batch["inputs"][:, 0] > 0).astype(np.int32), "weights": np.ones(64, np.float32)}
    net = prune.gated(model, prune.hard_concrete(groups, carriers))
    label = lambda tree: trees.map_with_path(lambda path, _: "gates" if path.startswith("gates/") else "model", tree)
    tx = optax.partition({"model": optax.sgd(0.05), "gates": optax.sgd(5.0)}, label)
    trained, history = train(net, "data=8", steps=150, params=net.begin(start), batch=batch, tx=tx, weight=0.03)
    _, keeps = net.finished(trained)
    np.testing.assert_array_equal(np.flatnonzero(keeps["hidden_0"]), [2, 5])
    assert history[-1]["l0"] < 3 and history[-1]["ce"] < 0.4
    right = logits_of(net, {})(trained, batch).argmax(-1) == batch["targets"]
    assert right.mean() > 0.95


def test_evaluation_draws_nothing_and_the_model_is_forwarded():
    net = network()
    params = net.begin(found(*RESIDUAL)[1])
    batch = batch_of()
    outputs, _ = net.apply(params, {}, batch, capture=("layers/0", "l0"))
    same, _ = net.model.apply(net.gates.apply(found(*RESIDUAL)[1], net.gates.expected(params["gates"])), {}, batch)
    np.testing.assert_allclose(outputs.logits, same.logits, rtol=1e-6)
    assert set(outputs.features) == {"layers/0", "l0"} and outputs.features["l0"].shape == (16,)
    assert net.axes == net.model.axes and net.features == (*net.model.features, "l0") and net.vocabulary == 0
    mesh = parallel.make_mesh("data=2,fsdp=2,tensor=2")
    sharded = parallel.partition(params, net.rules, mesh)
    assert sharded["gates"]["neurons"].spec == jax.sharding.PartitionSpec()
    assert sharded["layers"]["up"]["kernel"].spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")


# What is refused


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"temperature": 0.0}, "the temperature of gates is 0.0; expected a number above 0"),
        ({"stretch": (0.0, 1.1)}, r"stretched to \(0.0, 1.1\); expected \(below 0, above 1\)"),
        ({"stretch": (-0.1, 1.0)}, "expected .below 0, above 1."),
        ({"keep": 1.0}, "keep is 1.0; expected a probability"),
    ],
)
def test_numbers_out_of_range(more, message):
    with pytest.raises(ValueError, match=message):
        just(**more)


def test_groups_and_gates_that_do_not_fit():
    gates = just()
    with pytest.raises(ValueError, match="expected groups of different names"):
        prune.hard_concrete([], {})
    with pytest.raises(ValueError, match="nothing carries the gates of the group 'rows'"):
        prune.hard_concrete(gates.groups, {})
    with pytest.raises(ValueError, match=r"gates of the shapes \{'rows': \(3,\)\} are given; expected"):
        gates.expected({"rows": jnp.zeros(3)})
    with pytest.raises(ValueError, match="carried by 'down', which is no parameter"):
        gates.apply({"up": jnp.ones(4)}, {"rows": jnp.ones(4)})
    for sparsity in (1.0, -0.1, {"rows": 2.0}):
        with pytest.raises(ValueError, match=r"expected a fraction in \[0, 1\)"):
            gates.keeps(gates.init(), sparsity)
    with pytest.raises(ValueError, match="no sparsity is given for the group 'rows'"):
        gates.keeps(gates.init(), {"heads": 0.5})


def test_the_gated_model_says_what_is_missing():
    net, params = network(), found(*RESIDUAL)[1]
    with pytest.raises(ValueError, match="hold no gates of the group 'layers'"):
        net.apply(params, {}, batch_of())
    with pytest.raises(ValueError, match="the model has parameters called 'gates'"):
        net.begin(net.begin(params))
    with pytest.raises(ValueError, match="give apply rngs="):
        net.apply(net.begin(params), {}, batch_of(), train=True)
    with pytest.raises(ValueError, match="cannot be resized; take params, keeps = finished"):
        net.resize({"neurons": 2})
    with pytest.raises(ValueError, match="the model has a feature called 'l0'"):
        prune.gated(net, net.gates)
