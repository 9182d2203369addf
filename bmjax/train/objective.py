"""The loss over a batch or a part of it, and its gradient over the whole: what every executor runs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bmjax import trace, trees
from bmjax.losses import schedules
from bmjax.parallel import collectives
from bmjax.train import precision
from bmjax.train.gradients import accumulate
from bmjax.train.jaxprs import alike, read
from bmjax.train.problem import Frozen, Metrics, Problem
from bmjax.types import Aux, Batch, Context, GradientContext, Mean, Memory, Outputs, Params, TrainState

_ROLLOUT = 0x726F6C6C  # folded into a step's key; terms take small numbers


def gradients(
    problem: Problem, one_count: bool, state: TrainState, frozen: Frozen, batch: Batch
) -> tuple[Params, Memory, Metrics]:
    """(gradients, memory, metrics) of one step, aggregated over microbatches and devices.

    Terms have different counts (tokens, pairs), and a sum of means is right only if each is divided by its own, global one. If
    all counts are the same number, one division at the end does it. If not, a pass over the counts comes first: the compiler
    drops the forward pass from it wherever a count does not need that.

    Args:
        problem, state, frozen: as for the step.
        one_count: the answer of `counts_agree`.
        batch: the rows of this device, where an executor splits the batch by hand.
    """
    memory = _memory(problem, state)
    batch = _rolled_out(problem, state, batch)
    weights: dict[str, Any] = {name: schedules.at(weight, state.step) for name, (weight, _) in problem.terms.items()}
    scale = dict(weights)
    if not one_count:
        counts = _global_counts(problem, state, frozen, batch, memory)
        scale = {name: weight / jnp.maximum(counts[name], 1e-12) for name, weight in scale.items()}
        share = jnp.float32(1 / (collectives.shards() * problem.accumulate))

    def loss(params: Params, batch: Batch, memory: Memory) -> tuple[Mean, Aux]:
        aux = _evaluate_terms(problem, params, state, frozen, batch, memory)
        total = sum((scale[name] * mean.total for name, mean in aux.means.items()), start=jnp.float32(0))
        return Mean(total, next(iter(aux.means.values())).count if one_count else share), aux

    ctx = GradientContext(state.step, _step_key(state), problem.accumulate, memory, collectives.psum, collectives.all_gather)
    grads, aux = problem.full_gradient.apply(loss, collectives.vary(state.params), batch, ctx)
    metrics = {name: mean.value() for name, mean in aux.means.items()}
    metrics["loss"] = sum((weights[name] * value for name, value in metrics.items()), start=jnp.float32(0))
    return grads, aux.memory, {**metrics, **problem.scheduled(state.step)}


def counts_agree(problem: Problem, state: TrainState, frozen: Frozen, batch: Batch) -> bool:
    """True if all terms divide by the same number, found by tracing: their counts are one function of the batch.

    Raises:
        ValueError: they do not, and the gradient is taken example by example.
    """
    if len(problem.terms) == 1:
        return True

    def counts(state: TrainState, frozen: Frozen, batch: Batch) -> list[jax.Array]:
        means = _evaluate_terms(problem, state.params, state, frozen, batch, _memory(problem, state)).means
        return [mean.count for mean in means.values()]

    agree = alike(counts, state, frozen, _rolled_out_shapes(problem, state, batch))
    if problem.full_gradient.per_example and not agree:
        raise ValueError(
            f"the loss terms {', '.join(problem.terms)} weigh examples differently, so gradients per example have no average; "
            "give them the same weights, or use the gradient mean()"
        )
    return agree


def batch_keys(problem: Problem, state: TrainState, frozen: Frozen, batch: Batch) -> dict[str, set[str]]:
    """{term: the arrays of the batch that its value is computed from}, found by tracing."""

    def totals(batch: Batch, state: TrainState, frozen: Frozen) -> list[jax.Array]:
        aux = _evaluate_terms(problem, state.params, state, frozen, batch, _memory(problem, state))
        return [mean.total for mean in aux.means.values()]

    found = read(totals, _rolled_out_shapes(problem, state, batch), state, frozen)
    return {name: {key for key, used in keys.items() if used} for name, (keys, _, _) in zip(problem.terms, found)}


def _rolled_out(problem: Problem, state: TrainState, batch: Batch) -> Batch:
    """The batch that is trained on."""
    if problem.rollout is None:
        return batch
    params = jax.lax.stop_gradient(precision.narrow(_seen(problem, state.params["model"], state), problem.compute_dtype))
    return problem.rollout(problem.model, params, batch, jax.random.fold_in(_step_key(state), _ROLLOUT), state.step)


def _rolled_out_shapes(problem: Problem, state: TrainState, batch: Batch) -> dict[str, Any]:
    """The same for tracing: where there is a rollout, its shapes."""
    if problem.rollout is None:
        return dict(batch)
    return dict(jax.eval_shape(lambda state, batch: _rolled_out(problem, state, batch), state, dict(batch)))


def _memory(problem: Problem, state: TrainState) -> Memory:
    return Memory(state.model_state, {name: state.extra[name] for name in problem.terms if name in state.extra})


def _global_counts(problem: Problem, state: TrainState, frozen: Frozen, batch: Batch, memory: Memory) -> dict[str, jax.Array]:
    def one(micro: Batch, memory: Memory) -> tuple[Params, dict[str, jax.Array], Memory]:
        aux = _evaluate_terms(problem, state.params, state, frozen, micro, memory)
        return {}, {name: mean.count for name, mean in aux.means.items()}, aux.memory

    return collectives.psum(accumulate(one, {}, batch, memory, problem.accumulate)[1])


def _evaluate_terms(problem: Problem, params: Params, state: TrainState, frozen: Frozen, batch: Batch, memory: Memory) -> Aux:
    """Every term on a part of the batch, not yet divided."""
    student, teacher, model_state = _forward(problem, params, state, frozen, batch, memory.model_state)
    means, states = {}, dict(memory.terms)
    for index, (name, term) in enumerate(problem.full_terms.items()):
        ctx = Context(
            params=params["loss"].get(name, {}),
            state=memory.terms.get(name),
            step=state.step,
            key=jax.random.fold_in(_step_key(state), index),
            psum=collectives.psum,
            all_gather=collectives.all_gather,
        )
        try:
            result = term.apply(ctx, student, teacher, batch)
        except Exception as error:
            if str(error).startswith("Mean.of"):
                raise ValueError(f"the loss term {name!r}: {error}") from None
            error.add_note(f"This came from the loss term {name!r}.")
            raise
        if not isinstance(result, Mean):
            if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Mean)):
                raise ValueError(
                    f"the loss term {name!r} returned no Mean; give Mean.of(values, batch['weights']), or (Mean, new state)"
                )
            result, new = result
            what, old = f"the state of the loss term {name!r}", states.get(name, {})
            states.update({name: _renewed(what, "ctx.all_gather or ctx.psum", old, new)} if jax.tree.leaves(new) else {})
        means[name] = Mean(result.total.astype(jnp.float32), jax.lax.stop_gradient(result.count.astype(jnp.float32)))
    return Aux(means, Memory(model_state, states))


def _forward(
    problem: Problem, params: Params, state: TrainState, frozen: Frozen, batch: Batch, model_state: Params
) -> tuple[Outputs, Outputs | None, Params]:
    dtype = problem.compute_dtype
    student_capture, teacher_capture = problem.captures
    narrowed = {**batch, "inputs": precision.narrow(batch["inputs"], dtype)}

    def finished(outputs: Outputs) -> Outputs:
        outputs = outputs if dtype == "float32" else precision.widen(outputs)
        hidden, *layer = outputs.head or (None,)  # kernel and bias have no rows
        logits, features, hidden = collectives.rows((outputs.logits, outputs.features, hidden))
        return Outputs(logits, features, (hidden, *layer) if outputs.head else None)

    def forward(params: Params, model_state: Params, batch: Batch) -> tuple[Outputs, Params]:
        seen = precision.narrow(_seen(problem, params, state), dtype)
        rngs = {"dropout": _step_key(state)}
        return problem.model.apply(seen, model_state, batch, train=True, rngs=rngs, capture=student_capture)

    forward = trace.where_used(forward) if problem.views else forward
    student, renewed = forward(params["model"], model_state, narrowed)
    renewed = _renewed("the model's state", "collectives.moments or collectives.psum", model_state, renewed)
    partner = problem.partner
    if partner is None:
        return finished(student), None, renewed
    if problem.mean_teacher:
        frozen = {"params": state.extra["ema"], "model_state": model_state}
    teacher, _ = partner.apply(
        precision.narrow(frozen["params"], dtype), frozen["model_state"], narrowed, capture=teacher_capture
    )
    return finished(student), jax.lax.stop_gradient(finished(teacher)), renewed


def _seen(problem: Problem, params: Params, state: TrainState) -> Params:
    """The model's parameters through the views. Raises ValueError if one changes their shapes."""
    for view in problem.views:
        shown = view(params, state.opt_state["model"], state.step)
        if difference := trees.first_difference(params, shown):
            called = getattr(view, "__name__", type(view).__name__)
            raise ValueError(
                f"the view {called} changes the parameters' shapes: {difference}; the forward pass needs them as they are"
            )
        params = shown
    return params


def _step_key(state: TrainState) -> jax.Array:
    return jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)


def _renewed(what: str, how: str, old: Any, new: Any) -> Any:
    """The new state in the old one's dtypes. Raises ValueError if it has other shapes, or each device made its own."""
    shapes = [{path: tuple(leaf.shape) for path, leaf in trees.paths(tree).items()} for tree in (old, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{what} has the shapes {shapes[1]}, and had {shapes[0]}; a new state must be like the one before")
    for path, leaf in trees.paths(new).items():
        if collectives.differs(leaf):
            raise ValueError(f"{what} at {path or 'its root'} is made of one device's examples only; compute it with {how}")
    return jax.lax.stop_gradient(jax.tree.map(lambda x, y: y.astype(x.dtype), old, new))
