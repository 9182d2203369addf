"""Your own pair of functions, no module library: units pruned on 8 devices, cut out, proved equal and exported."""

import tempfile

import jax
import optax

from bmjax import data, deploy, losses, parallel, prune, shrink, trace, train
from bmjax.models import adapters

init = lambda key, x: {"up": jax.random.normal(key, (64, 64)) / 8, "down": jax.random.normal(key, (64, 10)) / 8}
apply = lambda params, x: jax.nn.relu(x.reshape(x.shape[0], -1) @ params["up"]) @ params["down"]
parallel.simulate(8)
digits, mesh, model = data.load("digits"), parallel.make_mesh("data=8"), adapters.plain(init, apply)
batches, x = data.train_batches(digits.train, batch=128, seed=0), digits.valid.inputs
units = trace.groups(apply, init(jax.random.key(0), x), x[:2])
tx = optax.chain(optax.adam(1e-2), prune.sparsify(sparsity=0.75, pattern=prune.groups(units), schedule=prune.cubic(20, 60)))
problem = train.Problem(model, {"ce": (1.0, losses.cross_entropy_term())}, tx)
state = train.init_state(problem, mesh, model.rules, jax.random.key(0), batches[0])
step = train.make_step(problem, mesh, state)
for i in range(90):
    state, metrics = jax.block_until_ready(step(state, None, batches[i]))
params, keeps = jax.device_get((state.params["model"], prune.keeps(state.opt_state)))
small, program = shrink.compact(params, units, keeps), adapters.replay(model, params, {}, x, keeps)
shipped = lambda params, x: program(params, {}, x)
gap = shrink.verify(apply, params, shipped, small, x)
with tempfile.TemporaryDirectory() as folder:
    deploy.export(shipped, small, folder, input_shape=digits.shape, input_dtype="float32", classes=10, metadata={})
    right = (deploy.load(folder)(x).argmax(-1) == digits.valid.targets).mean()
print(f"{small['up'].shape[1]} of 64 units, {gap:.0e} apart; the file is {right:.1%} right")
