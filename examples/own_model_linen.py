"""Your own Flax Linen module: the same numbers on 1 and 8 devices, dropout too, and what can be removed is found by itself."""

import flax.linen as nn
import jax
import optax

from bmjax import data, losses, parallel, trace, train
from bmjax.models import adapters


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv")(x)).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(32, name="hidden")(nn.Dropout(0.2, deterministic=not train)(x)))
        return nn.Dense(10, name="head")(x)


parallel.simulate(8)
digits, model = data.load("digits"), adapters.linen(Net(), rngs=("dropout",))
batch = data.train_batches(digits.train, batch=64, seed=0)[0]
problem = train.Problem(model, {"ce": (1.0, losses.cross_entropy_term())}, optax.sgd(0.1))
for devices in (1, 8):
    mesh = parallel.make_mesh(f"data={devices}", jax.devices()[:devices])
    state = train.init_state(problem, mesh, model.rules, jax.random.key(0), batch)
    state, metrics = train.make_step(problem, mesh, state)(state, None, batch)
    print(f"{devices} devices: loss {float(metrics['loss']):.5f}")
logits = lambda params, inputs: model.apply(params, {}, {"inputs": inputs})[0].logits
for group in trace.groups(logits, jax.device_get(state.params["model"]), batch["inputs"][:2]):
    print(f"{group.size} can be removed one by one from {', '.join(member.path for member in group.members)}")
