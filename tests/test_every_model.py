"""Every network, in every executor, does the same steps as on one device."""

import functools

import jax
import numpy as np
import optax
import pytest

from bmjax import losses, parallel
from bmjax.models import Decoder, Encoder, Plain, Residual, ResNet, Transformer
from bmjax.train import Problem, init_state, make_step

B = 16
IMAGES, TOKENS = (8, 8, 3), (6,)
MODELS = {
    "plain": (Plain(hidden=(8, 8)), IMAGES),
    "residual": (Residual(layers=2, width=8, neurons=8), IMAGES),
    "vit": (Transformer(patch=4, layers=2, width=8, heads=2, neurons=8), IMAGES),
    "resnet": (ResNet(depth=14, width=4), IMAGES),
    "decoder": (Decoder(layers=2, width=8, heads=4, kv_heads=2, neurons=8), TOKENS),
    "encoder": (Encoder(layers=2, width=8, heads=2, neurons=8, vocabulary=16), TOKENS),
}
EXECUTORS = [
    ("data=8", "replicated"),
    ("data=8", "pmap"),
    ("data=2,fsdp=2,tensor=2", "partitioned"),
    ("data=4,tensor=2", "hybrid"),
]


@functools.cache
def case(name):
    """(model, batch with two whole shards of padding)."""
    config, shape = MODELS[name]
    rng = np.random.default_rng(0)
    tokens = shape == TOKENS
    inputs = rng.integers(0, 16, (B, *shape)) if tokens else rng.normal(size=(B, *shape))
    targets = rng.integers(0, 16, (B, *shape)) if name == "decoder" else rng.integers(0, 4, B)
    batch = {
        "inputs": inputs.astype(np.int32 if tokens else np.float32),
        "targets": targets.astype(np.int32),
        "weights": np.broadcast_to((np.arange(B) > 3).reshape(B, *[1] * (targets.ndim - 1)), targets.shape).astype(np.float32),
        "id": np.arange(B, dtype=np.int32),
    }
    return config.build(shape, 16 if name == "decoder" else 4), batch


def two_steps(name, spec, executor):
    model, batch = case(name)
    mesh = parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None)
    problem = Problem(model, {"ce": (1.0, losses.cross_entropy_term())}, optax.sgd(0.1))
    state = init_state(problem, mesh, model.rules, jax.random.key(0), batch)
    step = make_step(problem, mesh, state, executor)
    found = []
    for _ in range(2):
        state, metrics = step(state, None, batch)
        found.append(float(metrics["loss"]))
    return found, jax.device_get((state.params, state.model_state))


@functools.cache
def alone(name):
    return two_steps(name, "data=1", "auto")


SLOW = {("resnet", "pmap"), ("resnet", "hybrid"), ("encoder", "pmap"), ("encoder", "hybrid"), ("residual", "hybrid")}
CASES = [
    pytest.param(name, *executor, marks=[pytest.mark.slow] if (name, executor[1]) in SLOW else [])
    for name in MODELS
    for executor in EXECUTORS
]


@pytest.mark.parametrize(("name", "spec", "executor"), CASES)
def test_two_steps_are_those_of_one_device(name, spec, executor):
    want, have = alone(name), two_steps(name, spec, executor)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), want, have)
