"""Your own param view: what the forward pass sees of the weights. This one sees -s, 0 and s, and trains straight through."""

import jax
import jax.numpy as jnp
import optax

from bmjax import data, losses, parallel, train
from bmjax.models import Plain


def ternary(params, opt_state, step):
    """Kernels on three levels (Ma et al. 2024); the gradient passes as if nothing was rounded (Bengio et al. 2013)."""
    scale = lambda w: jnp.mean(jnp.abs(w))
    levels = lambda w: scale(w) * jnp.clip(jnp.round(w / scale(w)), -1, 1)
    return jax.tree.map(lambda w: w + jax.lax.stop_gradient(levels(w) - w) if w.ndim > 1 else w, params)


parallel.simulate(8)
digits, mesh = data.load("digits"), parallel.make_mesh("data=8")
model, batches = Plain().build(digits.shape, digits.classes), data.train_batches(digits.train, batch=128, seed=0)
for name, views in {"rounded afterwards": (), "trained for it": (ternary,)}.items():
    problem = train.Problem(model, {"ce": (1.0, losses.cross_entropy_term())}, optax.adamw(3e-3), views=views)
    state = train.init_state(problem, mesh, model.rules, jax.random.key(0), batches[0])
    step = train.make_step(problem, mesh, state)
    for i in range(100):
        state, metrics = step(state, None, batches[i])
        loss = float(metrics["loss"])
    logits = model.apply(ternary(state.params["model"], None, 0), {}, {"inputs": digits.valid.inputs})[0].logits
    print(f"three levels, {name}: {(logits.argmax(-1) == digits.valid.targets).mean():.1%} right")
