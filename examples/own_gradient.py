"""Your own gradient: how it is taken and aggregated. This one is taken where the loss is highest nearby (Foret et al. 2021)."""

import jax
import optax

from bmjax import data, losses, parallel, train
from bmjax.models import Plain
from bmjax.train import gradients

uphill = lambda params, grads: jax.tree.map(lambda p, g: p + 0.2 / optax.global_norm(grads) * g, params, grads)


def sharpness_aware(loss_fn, params, batch, ctx):
    grads, aux = gradients.mean().apply(loss_fn, params, batch, ctx)  # over all devices and microbatches
    return gradients.mean().apply(loss_fn, uphill(params, grads), batch, ctx)[0], aux


parallel.simulate(8)
digits, mesh = data.load("digits"), parallel.make_mesh("data=8")
model, batches = Plain().build(digits.shape, digits.classes), data.train_batches(digits.train, batch=128, seed=0)
cost = lambda w: losses.cross_entropy(model.apply(w, {}, batches[99])[0].logits, batches[99]["targets"]).mean()
for gradient in (gradients.mean(), sharpness_aware):
    problem = train.Problem(model, {"ce": (1.0, losses.cross_entropy_term())}, optax.adamw(3e-3), gradient=gradient)
    state = train.init_state(problem, mesh, model.rules, jax.random.key(0), batches[0])
    step = train.make_step(problem, mesh, state)
    for i in range(100):
        state, metrics = step(state, None, batches[i])
        loss = float(metrics["loss"])
    near = uphill(state.params["model"], jax.grad(cost)(state.params["model"]))
    print(f"loss {loss:.3f}, and {cost(near):.3f} at a distance of 0.2")
