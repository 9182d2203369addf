import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bmjax import config, prune
from bmjax.models import Residual, Transformer
from bmjax.train.optimizer import Optimizer, decayed
from bmjax.trees import paths

RATE = 0.3


def curve(steps, **kwargs):
    """The learning rate of each update, and of the one that would come next."""
    schedule = Optimizer(learning_rate=RATE, **kwargs).schedule(steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


@pytest.mark.parametrize("steps", [1, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_schedules_rise_to_the_peak_and_land(steps, warmup, decay):
    rate, warm = curve(steps, warmup=warmup, decay=decay), int(warmup * steps)
    np.testing.assert_allclose(rate[:warm], np.linspace(RATE / max(warm, 1), RATE, warm + 1)[:warm], rtol=1e-5)
    t = (np.arange(warm, steps + 1) - warm) / (steps - warm)
    fall = {"cosine": (1 + np.cos(np.pi * t)) / 2, "linear": 1 - t, "constant": np.ones_like(t)}[decay]
    np.testing.assert_allclose(rate[warm:], RATE * fall, rtol=1e-5, atol=1e-7)
    assert (rate[:-1] > 0).all()  # no update is thrown away
    assert rate[warm] == pytest.approx(RATE, rel=1e-6)
    assert rate[-1] == pytest.approx(RATE if decay == "constant" else 0, rel=1e-6, abs=0)


def update(optimizer, params, grads, steps=10):
    tx = optimizer.build(steps)
    updates, _ = tx.update(grads, tx.init(params), params)
    return jax.device_get(updates)


PARAMS = {"layer": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0), "scale": jnp.full((2, 3), 2.0)}}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def test_adamw_decays_kernels_and_nothing_else():
    found = update(Optimizer("adamw", 0.1, warmup=0.0, weight_decay=0.5), PARAMS, ZEROS)["layer"]
    np.testing.assert_allclose(found["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(found["bias"], 0)
    np.testing.assert_array_equal(found["scale"], 0)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_the_other_rules_do_not_decay(name):
    found = update(Optimizer(name, 0.1, warmup=0.0), PARAMS, ZEROS)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0), found)


def test_the_parameters_of_loss_terms_do_not_decay():
    tx = Optimizer("adamw", 0.1, warmup=0.0, weight_decay=0.5).build_for_terms(10)
    updates, _ = tx.update(ZEROS, tx.init(PARAMS), PARAMS)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0), updates)
    assert jax.tree.leaves(tx.update({}, tx.init({}), {})[0]) == []


@pytest.mark.parametrize("steps", [2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("cooldown", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("decay", ["rsqrt", "wsd"])
def test_the_cooldown_goes_straight_from_where_it_began_to_the_end(steps, warmup, cooldown, decay):
    rate, warm = curve(steps, warmup=warmup, cooldown=cooldown, decay=decay, end=0.25), int(warmup * steps)
    length = min(max(round(cooldown * steps), 1), steps - warm)
    t = np.arange(warm, steps + 1)
    held = np.minimum(t, steps - length)
    stable = np.ones_like(t) if decay == "wsd" else 1 / np.sqrt(1 + (held - warm) / max(warm, 1))
    down = np.clip((t - (steps - length)) / length, 0, 1)
    np.testing.assert_allclose(rate[warm:], RATE * (stable * (1 - down) + 0.25 * down), rtol=1e-5)


@pytest.mark.parametrize("decay", ["cosine", "linear", "rsqrt", "wsd"])
@pytest.mark.parametrize("end", [0.0, 0.1, 1.0])
def test_every_schedule_lands_exactly(decay, end):
    assert curve(37, decay=decay, end=end)[-1] == pytest.approx(RATE * end, rel=1.2e-7, abs=0)  # a float32's last digit


def flat(name, **settings):
    """A rule without warm-up and decline."""
    return Optimizer(name, 0.1, warmup=0.0, decay="constant", **{"weight_decay": 0.0, **settings})


GRADS = jax.tree.map(lambda p: jnp.linspace(-1.0, 2.0, p.size).reshape(p.shape) + 0.1, PARAMS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adam", lambda p, g: -0.1 * np.sign(g)),
        ("adamw", lambda p, g: -0.1 * np.sign(g)),
        ("lion", lambda p, g: -0.1 * np.sign(g)),
        ("sgd", lambda p, g: -0.1 * g),
        ("sgdw", lambda p, g: -0.1 * g),
        ("rmsprop", lambda p, g: -0.1 * g / np.sqrt(0.1 * g**2)),
        ("lamb", lambda p, g: -0.1 * np.sign(g) * np.linalg.norm(p) / np.sqrt(g.size)),
        ("adafactor", lambda p, g: -0.1 * np.sign(g) * 2.0),  # all of p is 2, which is its root mean square
    ],
)
def test_the_first_update_has_its_closed_form(name, expected):
    found = update(flat(name), PARAMS, GRADS)
    jax.tree.map(
        lambda u, p, g: np.testing.assert_allclose(u, expected(np.asarray(p), np.asarray(g)), rtol=2e-4), found, PARAMS, GRADS
    )


@pytest.mark.parametrize("name", ["adamw", "nadamw", "lion", "sgdw", "adafactor", "muon"])
@pytest.mark.parametrize("steps", [1, 3])
def test_decay_is_decoupled_and_scaled_by_the_rate(name, steps):
    """Without a gradient a kernel shrinks by 1 - rate * decay in every update, whatever the rule."""
    tx = Optimizer(name, 0.1, warmup=0.0, decay="linear", weight_decay=0.5).build(4)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(ZEROS, state, params)
        params = optax.apply_updates(params, updates)
    left = np.prod([1 - 0.5 * 0.1 * (1 - i / 4) for i in range(steps)])
    np.testing.assert_allclose(params["layer"]["kernel"], 2.0 * left, rtol=1e-5)
    np.testing.assert_array_equal(params["layer"]["bias"], 2.0)


def test_a_regex_leaves_parameters_out_of_decay():
    params = {"layer": PARAMS["layer"], "head": PARAMS["layer"]}
    zeros = jax.tree.map(jnp.zeros_like, params)
    found = update(Optimizer("adamw", 0.1, warmup=0.0, weight_decay=0.5, no_decay="head"), params, zeros)
    np.testing.assert_allclose(found["layer"]["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(found["head"]["kernel"], 0)
    for part in found.values():  # what is no kernel does not decay in any case
        np.testing.assert_array_equal(part["scale"], 0)
    with pytest.raises(ValueError, match="no_decay is 'hed', which is found in no parameter's path"):
        update(Optimizer("adamw", 0.1, weight_decay=0.5, no_decay="hed"), params, zeros)


def test_nesterov_looks_ahead():
    found = update(flat("sgd", momentum=0.5, nesterov=True), PARAMS, GRADS)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.1 * 1.5 * np.asarray(g), rtol=1e-6), found, GRADS)


def test_muon_orthogonalises_each_layers_matrices_and_nothing_else():
    rng = np.random.default_rng(0)
    shapes = {
        "layers": {
            "query": {"kernel": (2, 8, 2, 3)},
            "out": {"kernel": (2, 2, 3, 8)},
            "up": {"kernel": (2, 8, 5), "bias": (2, 5)},
            "conv": {"kernel": (2, 3, 3, 4, 5)},
        },
        "embed": {"kernel": (6, 8)},
        "head": {"kernel": (8, 3)},
    }
    grads = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))
    found = update(flat("muon"), grads, grads)
    as_matrices = {"query": (2, 8, 6), "out": (2, 6, 8), "up": (2, 8, 5)}
    for name, shape in as_matrices.items():
        values = np.linalg.svd(found["layers"][name]["kernel"].reshape(shape), compute_uv=False)
        # Five Newton-Schulz steps come as near as that.
        np.testing.assert_allclose(values / (0.1 * 0.2 * np.sqrt(8)), 1, atol=0.35)
        one = {"up": {"kernel": grads["layers"][name]["kernel"].reshape(shape)[1]}}
        expected = found["layers"][name]["kernel"].reshape(shape)[1]
        np.testing.assert_allclose(update(flat("muon"), one, one)["up"]["kernel"], expected, rtol=1e-4, atol=1e-6)
    first = 1 + 0.9 * 0.1 / (1 - 0.9**2)  # Nesterov's look ahead in Adam's first update (Dozat 2016)
    for leaf, grad in [
        (found["layers"]["up"]["bias"], grads["layers"]["up"]["bias"]),
        (found["layers"]["conv"]["kernel"], grads["layers"]["conv"]["kernel"]),
        (found["embed"]["kernel"], grads["embed"]["kernel"]),
        (found["head"]["kernel"], grads["head"]["kernel"]),
    ]:
        np.testing.assert_allclose(leaf, -0.1 * first * np.sign(grad), rtol=1e-4)


STACK = {
    "embed": {"kernel": jnp.ones((3, 4))},
    "layers": {"up": {"kernel": jnp.ones((3, 4, 5))}, "norm": {"scale": jnp.ones((3, 4))}},
    "final_norm": {"scale": jnp.ones(4)},
    "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
}


def test_rates_go_by_the_first_regex_that_fits():
    found = update(flat("sgd", momentum=0.0, rates={"head/bias": 0.0, "head": 10.0, "layers/.*kernel": 0.5}), STACK, STACK)
    assert {path: -10 * float(leaf.ravel()[0]) for path, leaf in paths(found).items()} == pytest.approx(
        {
            "embed/kernel": 1,
            "final_norm/scale": 1,
            "head/bias": 0,
            "head/kernel": 10,
            "layers/norm/scale": 1,
            "layers/up/kernel": 0.5,
        }
    )


def test_layer_decay_is_exact_along_the_scanned_axis():
    found = update(flat("sgd", momentum=0.0, layer_decay=0.5, rates={"up": 2.0}), STACK, STACK)
    each = np.array([1 / 8, 1 / 4, 1 / 2])  # of 3 layers, the last is one below the head
    np.testing.assert_allclose(found["layers"]["norm"]["scale"], np.broadcast_to(-0.1 * each[:, None], (3, 4)), rtol=1e-6)
    np.testing.assert_allclose(found["layers"]["up"]["kernel"][:, 0, 0], -0.1 * 2 * each, rtol=1e-6)
    np.testing.assert_allclose(found["embed"]["kernel"], -0.1 / 16, rtol=1e-6)
    np.testing.assert_allclose(found["head"]["kernel"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(found["final_norm"]["scale"], -0.1, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rates": {"haed": 2.0}}, "'haed' matches none of the parameters layer/bias"),
        ({"layer_decay": 0.5}, "layer_decay is 0.5, but the model has no scanned stack called 'layers'"),
    ],
)
def test_what_fits_no_parameter_is_refused_before_the_first_update(settings, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(Optimizer(**settings).build(10).init, PARAMS)
    jax.eval_shape(Optimizer(**settings).build_for_terms(10).init, PARAMS)  # paths are the model's, not the terms'


def test_a_transform_of_the_users_takes_the_rules_place():
    mine = Optimizer(custom=lambda steps: optax.sgd(1 / steps), rates={"kernel": 3.0}, clip=1e6)
    found = update(mine, PARAMS, GRADS, steps=4)["layer"]
    np.testing.assert_allclose(found["kernel"], -3 / 4 * GRADS["layer"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(found["bias"], -1 / 4 * GRADS["layer"]["bias"], rtol=1e-6)
    with pytest.raises(ValueError, match="custom returned float; expected an optax transform"):
        Optimizer(custom=lambda steps: 0.1).build(10)


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_rate_that_is_none_builds_nothing(rate):
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate is .*; expected a finite number above 0"):
        Optimizer(learning_rate=rate).build(10)


@pytest.mark.parametrize(("norm", "scale"), [(10.0, 0.2), (1.0, 1.0)])
def test_clipping_scales_the_whole_gradient_to_the_norm(norm, scale):
    grads = jax.tree.map(lambda p: jnp.full_like(p, norm / np.sqrt(15)), PARAMS)
    found = update(Optimizer("sgd", 1.0, warmup=0.0, decay="constant", momentum=0.0, clip=2.0), PARAMS, grads)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -scale * np.asarray(g), rtol=1e-6), found, grads)
    free = update(Optimizer("sgd", 1.0, warmup=0.0, decay="constant", momentum=0.0), PARAMS, grads)
    jax.tree.map(lambda u, g: np.testing.assert_array_equal(u, -np.asarray(g)), free, grads)


def test_sgd_keeps_momentum():
    tx = Optimizer("sgd", 0.1, warmup=0.0, decay="constant", momentum=0.5).build(10)
    ones, state = jax.tree.map(jnp.ones_like, PARAMS), tx.init(PARAMS)
    for velocity in (1.0, 1.5, 1.75):
        updates, state = tx.update(ones, state, PARAMS)
        np.testing.assert_allclose(updates["layer"]["bias"], -0.1 * velocity, rtol=1e-6)


def test_the_first_update_of_adam_is_the_warmed_up_rate():
    """Adam's first bias-corrected step is the sign of the gradient (Kingma & Ba 2015)."""
    grads = jax.tree.map(lambda p: jnp.full_like(p, -0.7), PARAMS)
    found = update(Optimizer("adam", 0.1, warmup=0.5), PARAMS, grads)
    np.testing.assert_allclose(found["layer"]["kernel"], 0.1 / 5, rtol=1e-5)


@pytest.mark.parametrize("model", [Residual(2, 4, 8), Transformer(2, 2, 4, 2, 8)])
def test_decay_acts_on_the_kernels_of_a_scanned_model(model):
    params, _ = jax.eval_shape(model.build((4, 4, 1), 3).init, jax.random.key(0), {"inputs": np.zeros((1, 4, 4, 1), np.float32)})
    found = paths(decayed(params))
    assert {path for path, yes in found.items() if yes} == {path for path in found if path.endswith("/kernel")}
    stacked_norms = [path for path in found if "norm" in path and paths(params)[path].ndim == 2]
    assert stacked_norms
    assert not any(found[path] for path in stacked_norms)


def test_without_names_matrices_decay():
    assert decayed([jnp.zeros((2, 2)), jnp.zeros(2), jnp.zeros(())]) == [True, False, False]


def test_pruning_composes_behind_it():
    params = {"up": {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}}
    tx = optax.chain(Optimizer("sgd", 0.1, warmup=0.0, momentum=0.0).build(10), prune.sparsify(sparsity=0.5))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["up"]["kernel"], [[0, 0, 0, 0], [5, 6, 7, 8]])


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "adamW"},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"warmup": 1.0},
        {"decay": "exponential"},
        {"weight_decay": -0.1},
        {"momentum": 1.0},
        {"clip": -1.0},
        {"end": 1.5},
        {"cooldown": -0.1},
        {"b2": 1.0},
        {"rates": {"x": -1.0}},
        {"rates": {"x": float("nan")}},
        {"rates": {"(": 1.0}},
        {"layer_decay": 1.1},
        {"no_decay": "("},
        {"nesterov": True},
    ],
)
def test_a_value_out_of_range_is_refused(wrong):
    config.validate(Optimizer())
    with pytest.raises(ValueError, match=r"regular expression" if "(" in str(wrong) else next(iter(wrong))):
        config.validate(Optimizer(**wrong))


@pytest.mark.parametrize(
    ("name", "setting", "words"),
    [
        ("adam", {"weight_decay": 0.1}, "weight_decay is 0.1, and the rule adam has none; leave it out, or take adamw"),
        ("adamw", {"momentum": 0.5}, "momentum is 0.5, and the rule adamw has none; leave it out, or take sgd"),
    ],
)
def test_a_setting_that_the_rule_does_not_have_is_refused(name, setting, words):
    with pytest.raises(ValueError, match=words):
        Optimizer(name, 0.1, **setting).build(10)
