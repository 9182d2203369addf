"""Your own arrays: `data.build` checks, splits and normalises them; batches are shuffled by (seed, epoch) and resume by step."""

import jax
import numpy as np
import optax

from bmjax import data, losses, parallel, train
from bmjax.models import Plain


def rings(n=3000):
    """Three rings: the class is how far a point is from the middle."""
    rng = np.random.default_rng(0)
    targets, angle = rng.integers(0, 3, n), rng.uniform(0, 2 * np.pi, n)
    radius = 1 + targets + rng.normal(0, 0.2, n)
    inputs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return data.build("rings", inputs, targets, data.stratified(targets), class_names=("inner", "middle", "outer"))


parallel.simulate(8)
dataset, mesh = rings(), parallel.make_mesh("data=8")
model, batches = Plain().build(dataset.shape, dataset.classes), data.train_batches(dataset.train, batch=256, seed=0)
problem = train.Problem(model, {"ce": (1.0, losses.cross_entropy_term())}, optax.adam(1e-2))
state = train.init_state(problem, mesh, model.rules, jax.random.key(0), batches[0])
step = train.make_step(problem, mesh, state)
for i in range(60):
    state, metrics = step(state, None, batches[i])
    loss = float(metrics["loss"])
right = model.apply(state.params["model"], {}, {"inputs": dataset.test.inputs})[0].logits.argmax(-1) == dataset.test.targets
print(f"{len(dataset.train)} points for training; {right.mean():.1%} of {len(dataset.test)} others right")
