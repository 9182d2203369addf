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
    found = update(Optimizer(name, 0.1, warmup=0.0, weight_decay=0.5), PARAMS, ZEROS)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0), found)


def test_the_parameters_of_loss_terms_do_not_decay():
    tx = Optimizer("adamw", 0.1, warmup=0.0, weight_decay=0.5).build_for_terms(10)
    updates, _ = tx.update(ZEROS, tx.init(PARAMS), PARAMS)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0), updates)
    assert jax.tree.leaves(tx.update({}, tx.init({}), {})[0]) == []


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
    ],
)
def test_a_value_out_of_range_is_refused(wrong):
    config.validate(Optimizer())
    with pytest.raises(ValueError, match=next(iter(wrong))):
        config.validate(Optimizer(**wrong))
