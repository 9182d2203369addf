"""Computing activations again: which products, at which memory, and that no output and no gradient changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import close, random_like

from bmjax import config, trace
from bmjax.models import Decoder, Encoder, Residual, ResNet, Transformer
from bmjax.models.stack import REMAT

B, TOKENS, IMAGES = 4, (8,), (8, 8, 3)
CONFIGS = {
    "residual": (Residual(layers=3, width=8, neurons=12, dropout=0.3), IMAGES),
    "vit": (Transformer(patch=4, layers=3, width=8, heads=2, neurons=12, dropout=0.3), IMAGES),
    "resnet": (ResNet(depth=20, width=4), IMAGES),
    "decoder": (Decoder(layers=3, width=8, heads=4, kv_heads=2, neurons=12, dropout=0.3), TOKENS),
    "encoder": (Encoder(layers=3, width=8, heads=2, neurons=12, dropout=0.3, vocabulary=4), TOKENS),
}
BIG = {  # where activations weigh more than parameters
    "residual": (Residual(layers=16, width=16, neurons=64), IMAGES),
    "vit": (Transformer(patch=2, layers=8, width=16, heads=2, neurons=64), IMAGES),
    "resnet": (ResNet(depth=32, width=4), IMAGES),
    "decoder": (Decoder(layers=8, width=16, heads=2, neurons=64), (32,)),
    "encoder": (Encoder(layers=8, width=16, heads=2, neurons=64, vocabulary=4), (32,)),
}


def batch(shape, rows):
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 4, (rows, *shape)) if len(shape) == 1 else rng.normal(size=(rows, *shape))
    inputs = inputs.astype(np.int32 if len(shape) == 1 else np.float32)
    return {"inputs": inputs, "id": np.arange(rows, dtype=np.int32)}


def trained(made, shape, rows, remat):
    """(loss and outputs of a training pass as a function of the parameters, the parameters)."""
    model, data = type(made)(**{**vars(made), "remat": remat}).build(shape, 4), batch(shape, rows)
    params, state = jax.eval_shape(model.init, jax.random.key(0), data)
    state = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), state)

    def loss(params):
        rngs = {"dropout": jax.random.key(3)}
        outputs, new = model.apply(params, state, data, train=True, rngs=rngs, capture=model.features)
        return jnp.sum(jnp.sin(outputs.logits)), (outputs, new)

    return loss, random_like(params)


@functools.cache
def gradients(name, remat):
    """((loss, what the forward pass gives), gradients), and FLOPs."""
    loss, params = trained(*CONFIGS[name], B, remat)
    slopes = jax.value_and_grad(loss, has_aux=True)
    return jax.device_get(jax.jit(slopes)(params)), trace.flops(slopes, params)


@pytest.mark.parametrize("policy", REMAT)
@pytest.mark.parametrize("name", CONFIGS)
def test_only_what_is_computed_changes(name, policy):
    """Logits, features, statistics and gradients stay, dropout among them; "dots" computes no product twice, "full" each one."""
    (want, plain), (found, again) = gradients(name, "none"), gradients(name, policy)
    same = functools.partial(close, floor=0.1)  # the gradient of a key's bias is 0 but for rounding
    jax.tree.map(same, found, want)
    attends = name in ("vit", "decoder", "encoder")
    assert again > plain if policy == "full" or (policy == "dots_no_batch" and attends) else again == plain


@pytest.mark.parametrize("name", BIG)
def test_the_compiler_needs_less_memory(name):
    def temporaries(remat):
        loss, params = trained(*BIG[name], 32, remat)
        program = jax.jit(jax.grad(loss, has_aux=True)).lower(params).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries("full") < 0.6 * temporaries("none")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_policy_that_does_not_exist_is_named(name):
    made = type(CONFIGS[name][0])(remat="some")
    with pytest.raises(ValueError, match="remat is 'some'; expected one of none, full, dots, dots_no_batch"):
        config.validate(made)
