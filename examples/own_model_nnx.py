"""Your own Flax NNX module, as the teacher and as a student that also learns from a hidden layer (FitNets)."""

import jax
import optax
from flax import nnx

from bmjax import data, distill, losses, parallel, train
from bmjax.models import adapters


class Net(nnx.Module):
    def __init__(self, width, rngs):
        self.hidden, self.head = nnx.Linear(64, width, rngs=rngs), nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


parallel.simulate(8)
mesh, batches = parallel.make_mesh("data=8"), data.train_batches(data.load("digits").train, batch=128, seed=0)
teacher, student = (adapters.nnx(lambda rngs, width=width: Net(width, rngs)) for width in (128, 8))
frozen, ce, hint = None, losses.cross_entropy_term(), losses.on_features(distill.hint, {"hidden": "hidden"}, project="linear")
for model, terms, partner in ((teacher, {"ce": (1.0, ce)}, None), (student, {"ce": (1.0, ce), "hint": (1.0, hint)}, teacher)):
    problem = train.Problem(model, terms, optax.adam(1e-2), partner, loss_tx=optax.adam(1e-2))
    state = train.init_state(problem, mesh, model.rules, jax.random.key(0), batches[0], frozen=frozen)
    step = train.make_step(problem, mesh, state)
    for i in range(60):
        state, metrics = jax.block_until_ready(step(state, frozen, batches[i]))
    frozen = {"params": state.params["model"], "model_state": state.model_state}
    print(frozen["params"]["hidden"]["bias"].size, "units:", jax.tree.map(lambda x: round(float(x), 3), metrics))
