"""Your own loss term: (student, teacher, batch) -> Mean. This one punishes confidence (Pereyra et al. 2017)."""

import jax
import jax.numpy as jnp
import optax

from bmjax import data, losses, parallel, train
from bmjax.models import Plain
from bmjax.types import Mean


def confidence(student, teacher, batch):
    """Minus the entropy of the predictions, in nats."""
    log_p = jax.nn.log_softmax(student.logits)
    return Mean.of(jnp.sum(jnp.exp(log_p) * log_p, axis=-1), batch["weights"])


parallel.simulate(8)
digits, mesh = data.load("digits"), parallel.make_mesh("data=8")
model, batches = Plain().build(digits.shape, digits.classes), data.train_batches(digits.train, batch=128, seed=0)
for weight in (0.0, 0.5):
    terms = {"ce": (1.0, losses.cross_entropy_term()), "confidence": (weight, confidence)}
    problem = train.Problem(model, terms, optax.adamw(3e-3))
    state = train.init_state(problem, mesh, model.rules, jax.random.key(0), batches[0])
    step = train.make_step(problem, mesh, state)
    for i in range(60):
        state, metrics = step(state, None, batches[i])
        found = {name: float(value) for name, value in metrics.items()}
    print(f"weight {weight}: cross-entropy {found['ce']:.3f}, entropy of the predictions {-found['confidence']:.3f} nats")
