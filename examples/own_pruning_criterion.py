"""Your own pruning criterion: a score for each weight. This one is |weight x gradient| (Molchanov et al. 2019)."""

import jax
import optax

from bmjax import data, losses, parallel, prune, train
from bmjax.models import Plain


def saliency():
    """What the loss would change without the weight, to first order; `around` shows it the raw gradients."""
    return prune.per_weight(lambda seen: jax.tree.map(lambda w, g: abs(w * g), seen.params, seen.updates))


parallel.simulate(8)
digits, mesh = data.load("digits"), parallel.make_mesh("data=8")
model, batches = Plain().build(digits.shape, digits.classes), data.train_batches(digits.train, batch=512, seed=0)
for name, criterion in {"magnitude": prune.magnitude(), "saliency": saliency()}.items():
    tx = prune.around(optax.adam(3e-3), criterion, sparsity=0.97, schedule=prune.cubic(30, 90))
    problem = train.Problem(model, {"ce": (1.0, losses.cross_entropy_term())}, tx)
    state = train.init_state(problem, mesh, model.rules, jax.random.key(0), batches[0])
    step = train.make_step(problem, mesh, state)
    for i in range(120):
        state, metrics = step(state, None, batches[i])
        loss = float(metrics["loss"])
    report = prune.sparsity_report(state.params["model"], state.opt_state)
    logits = model.apply(state.params["model"], {}, {"inputs": digits.valid.inputs})[0].logits
    right = (logits.argmax(-1) == digits.valid.targets).mean()
    print(f"{name}: {report.total.sparsity:.0%} of all weights are zero, loss {loss:.3f}, {right:.1%} right")
