"""Your own transform: any optax one. This centres each kernel's gradient (Yong et al. 2020); a pruning transform follows it."""

import jax
import optax

from bmjax import data, losses, parallel, prune, train, trees
from bmjax.models import Plain


def centred():
    """Subtracts the mean over the inputs of each unit from the gradient of a kernel [..., inputs, units]."""
    centre = lambda path, g: g - g.mean(axis=-2, keepdims=True) if path.endswith("kernel") else g
    return optax.stateless(lambda gradients, params: trees.map_with_path(centre, gradients))


parallel.simulate(8)
digits, mesh = data.load("digits"), parallel.make_mesh("data=8")
model, batches = Plain().build(digits.shape, digits.classes), data.train_batches(digits.train, batch=128, seed=0)
for pruning in (optax.identity(), prune.sparsify(sparsity=0.8, schedule=prune.cubic(20, 60))):
    tx = optax.chain(centred(), optax.sgd(0.1, momentum=0.9), pruning)
    problem = train.Problem(model, {"ce": (1.0, losses.cross_entropy_term())}, tx)
    state = train.init_state(problem, mesh, model.rules, jax.random.key(0), batches[0])
    kernel = lambda state: jax.device_get(state.params["model"]["hidden_0"]["kernel"])
    step, before = train.make_step(problem, mesh, state), kernel(state)
    for i in range(80):
        state, metrics = step(state, None, batches[i])
        loss = float(metrics["loss"])
    moved, zeros = abs(kernel(state).mean(axis=0) - before.mean(axis=0)).max(), (kernel(state) == 0).mean()
    print(f"loss {loss:.3f}, {zeros:.0%} of the first kernel is zero, the mean of a unit's weights moved by {moved:.6f}")
