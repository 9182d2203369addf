"""Your own distillation loss: a function of arrays. This one compares how likely both find the right class."""

import jax
import jax.numpy as jnp
import optax

from bmjax import data, distill, losses, parallel, train
from bmjax.models import Plain


def margin(s, t, labels):
    right = lambda logits: jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return jnp.square(right(s) - right(t))


parallel.simulate(8)
digits, mesh = data.load("digits"), parallel.make_mesh("data=8")
teacher, student = (Plain(hidden=hidden).build(digits.shape, digits.classes) for hidden in ((128, 64), (32, 16)))
batches, ce, frozen = data.train_batches(digits.train, batch=128, seed=0), losses.cross_entropy_term(), None
hint = losses.on_features(distill.hint, {"hidden_1": "hidden_1"}, project="linear")
taught = {"ce": (0.5, ce), "margin": (0.5, losses.on_logits(margin)), "hint": (1.0, hint)}
for model, terms, guide in ((teacher, {"ce": (1.0, ce)}, None), (student, taught, teacher)):
    problem = train.Problem(model, terms, optax.adam(3e-3), teacher=guide, loss_tx=optax.adam(3e-3))
    state = train.init_state(problem, mesh, model.rules, jax.random.key(0), batches[0], frozen=frozen)
    step = train.make_step(problem, mesh, state)
    for i in range(120):
        state, metrics = step(state, frozen, batches[i])
        found = {name: round(float(value), 3) for name, value in metrics.items()}
    frozen = {"params": state.params["model"], "model_state": state.model_state}
    print(f"{model.module.hidden}: {found}")
