"""Everything of your own in one run: python -m experiments.train --config=examples/own_experiment.py --config.run.steps=200"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bmjax.data import Data
from bmjax.jobs.common import Machine
from bmjax.jobs.train import Config
from bmjax.models import adapters
from bmjax.types import Mean


def mlp(shape, classes):
    return adapters.linen(nn.Sequential([lambda x: x.reshape(x.shape[0], -1), nn.Dense(64), nn.relu, nn.Dense(classes)]))


def confidence(student, teacher, batch):
    return Mean.of(jnp.max(jax.nn.log_softmax(student.logits), axis=-1), batch["weights"])


def centred(optimizer, steps):
    centre = lambda g: g - g.mean(axis=0) if g.ndim > 1 else g
    return optax.chain(optax.stateless(lambda gradients, params: jax.tree.map(centre, gradients)), optimizer)


def get_config():
    terms = {"confidence": (0.1, confidence)}
    return Config(machine=Machine(devices=8), data=Data(batch=128), model=mlp, terms=terms, transform=centred)
