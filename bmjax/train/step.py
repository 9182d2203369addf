"""THE step: (state, frozen, batch) -> (state, metrics), one jit, sharded, with everything that trains inside.

Loss terms, transforms, param views and the teacher compose here and nowhere else. Two executors give the same numbers:
with only `data` above 1 the gradient runs in a `shard_map` with explicit `lax.pmean`; with `fsdp` or `tensor` above 1 the
compiler partitions it. The optimiser always runs outside, partitioned like the parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from bmjax import parallel, trees
from bmjax.losses import as_term
from bmjax.parallel import collectives
from bmjax.parallel.rules import Rules
from bmjax.types import Batch, Context, LossTerm, Mean, Model, Outputs, Params, Term, TrainState, View

Frozen: TypeAlias = Any  # {"params": ..., "model_state": ...} of the teacher, or None
Metrics: TypeAlias = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is trained, on what objective, and how; all of it pure functions.

    Attributes:
        model: the student, or the only model.
        terms: {name: (weight, loss term)}; the loss is the weighted sum of the terms' global means.
        tx: optimiser of the model's parameters; pruning transforms are part of it.
        teacher: a frozen model whose params are the step's second argument.
        loss_tx: optimiser of the parameters that terms own (a projector); needed only where some do.
        views: what the forward pass sees of the parameters, applied in order.
        accumulate: microbatches a step.
    """

    model: Model
    terms: Mapping[str, tuple[float, LossTerm]]
    tx: optax.GradientTransformation
    teacher: Model | None = None
    loss_tx: optax.GradientTransformation | None = None
    views: tuple[View, ...] = ()
    accumulate: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError on what cannot work, before anything is traced."""
        if not self.terms:
            raise ValueError("a problem needs at least one loss term")
        for name, (weight, term) in self.terms.items():
            if not jnp.isfinite(weight):
                raise ValueError(f"the weight of the loss term {name!r} is {weight}; expected a finite number")
            if self.accumulate > 1 and as_term(term).relates_examples:
                raise ValueError(
                    f"the loss term {name!r} relates examples: {self.accumulate} microbatches would change its value; "
                    "set accumulate to 1"
                )
        if self.accumulate < 1:
            raise ValueError(f"accumulate is {self.accumulate}; expected 1 or more microbatches")

    @property
    def full_terms(self) -> dict[str, Term]:
        """The terms in their full form."""
        return {name: as_term(term) for name, (_, term) in self.terms.items()}


class _Carry(NamedTuple):
    """What one forward pass leaves beside its loss."""

    means: dict[str, Mean]
    model_state: Params
    extra: dict[str, Any]


def _capture(problem: Problem) -> tuple[tuple[str, ...], tuple[str, ...]]:
    terms = problem.full_terms.values()
    student = {name for term in terms for name in term.student_features}
    teacher = {name for term in terms for name in term.teacher_features}
    return tuple(sorted(student)), tuple(sorted(teacher))


def _forward(
    problem: Problem, params: Params, state: TrainState, frozen: Frozen, batch: Batch, step: jax.Array
) -> tuple[Outputs, Outputs | None, Params]:
    student_capture, teacher_capture = _capture(problem)
    seen = params["model"]
    for view in problem.views:
        seen = view(seen, state.opt_state["model"], step)
    rngs = {"dropout": jax.random.fold_in(jax.random.wrap_key_data(state.rng), step)}
    student, model_state = problem.model.apply(seen, state.model_state, batch, train=True, rngs=rngs, capture=student_capture)
    teacher = None
    if problem.teacher is not None:
        outputs, _ = problem.teacher.apply(frozen["params"], frozen["model_state"], batch, capture=teacher_capture)
        teacher = jax.lax.stop_gradient(outputs)
    return student, teacher, model_state


def _evaluate_terms(problem: Problem, params: Params, state: TrainState, frozen: Frozen, batch: Batch) -> _Carry:
    """Every term on one microbatch, not yet divided."""
    student, teacher, model_state = _forward(problem, params, state, frozen, batch, state.step)
    means, extra = {}, dict(state.extra)
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    for index, (name, term) in enumerate(problem.full_terms.items()):
        key = jax.random.fold_in(step_key, index)
        ctx = Context(
            params["loss"].get(name, {}), state.extra.get(name), state.step, key, collectives.psum, collectives.all_gather
        )
        result = term.apply(ctx, student, teacher, batch)
        if not isinstance(result, Mean):
            result, extra[name] = result
        means[name] = Mean(result.total.astype(jnp.float32), jax.lax.stop_gradient(result.count.astype(jnp.float32)))
    return _Carry(means, model_state, jax.lax.stop_gradient(extra))


def _loss(problem: Problem, means: Mapping[str, Mean], counts: Mapping[str, jax.Array]) -> jax.Array:
    # Counts are per shard on average, so that the pmean of the shards' gradients is the gradient of the global mean.
    return sum(  # type: ignore[return-value]
        (weight * means[name].total / jnp.maximum(counts[name], 1e-12) for name, (weight, _) in problem.terms.items()),
        start=jnp.float32(0),
    )


def _global_counts(means: Mapping[str, Mean]) -> dict[str, jax.Array]:
    return {name: collectives.pmean(mean.count) for name, mean in means.items()}


def _one_batch(problem: Problem, state: TrainState, frozen: Frozen, batch: Batch) -> tuple[Params, _Carry]:
    def loss(params: Params) -> tuple[jax.Array, _Carry]:
        carry = _evaluate_terms(problem, params, state, frozen, batch)
        return _loss(problem, carry.means, _global_counts(carry.means)), carry

    return jax.grad(loss, has_aux=True)(collectives.vary(state.params))


def _microbatches(problem: Problem, state: TrainState, frozen: Frozen, batch: Batch) -> tuple[Params, _Carry]:
    """Gradient accumulation: counts over all microbatches first, then the gradients of the globally divided sums."""
    n = problem.accumulate
    # Row r of microbatch i is row r * n + i of the batch: each shard keeps its rows, so nothing moves between devices.
    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1), dict(batch))
    params = collectives.vary(state.params)

    def count(_: Any, micro: Batch) -> tuple[Any, dict[str, jax.Array]]:
        means = _evaluate_terms(problem, params, state, frozen, micro).means
        return None, {name: mean.count for name, mean in means.items()}

    # Only counts leave this scan, so the compiler drops the forward pass wherever a count does not need it.
    counts = jax.tree.map(lambda c: collectives.pmean(c.sum(0)), jax.lax.scan(count, None, split)[1])

    def accumulate(total: Params, micro: Batch) -> tuple[Params, _Carry]:
        def loss(params: Params) -> tuple[jax.Array, _Carry]:
            carry = _evaluate_terms(problem, params, state, frozen, micro)
            return _loss(problem, carry.means, counts), carry

        grads, carry = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(jnp.add, total, grads), carry

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    grads, stacked = jax.lax.scan(accumulate, zeros, split)
    means = jax.tree.map(lambda x: x.sum(0), stacked.means)
    last = jax.tree.map(lambda x: x[-1], stacked)
    return grads, _Carry(means, last.model_state, last.extra)


def _gradients(
    problem: Problem, state: TrainState, frozen: Frozen, batch: Batch
) -> tuple[Params, Params, dict[str, Any], Metrics]:
    """(float32 gradients, model_state, extra, metrics), aggregated over the shards of the batch."""
    one = _one_batch if problem.accumulate == 1 else _microbatches
    grads, carry = one(problem, state, frozen, batch)
    # Reduced in float32 (a bfloat16 all-reduce loses what float32 masters keep), and all in one collective.
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    grads, means = collectives.pmean((grads, carry.means))
    metrics = {name: mean.value() for name, mean in means.items()}
    metrics["loss"] = _loss(problem, means, {name: mean.count for name, mean in means.items()})
    return grads, collectives.invariant(carry.model_state), collectives.invariant(carry.extra), metrics


def _replicated(problem: Problem, mesh: Mesh) -> Callable[..., Any]:
    """`_gradients` with the batch split by hand over `data`; everything else is on every device."""

    def body(state: TrainState, frozen: Frozen, batch: Batch) -> Any:
        with collectives.over("data"):
            return _gradients(problem, state, frozen, batch)

    whole = PartitionSpec()
    return jax.shard_map(body, mesh=mesh, in_specs=(whole, whole, PartitionSpec("data")), out_specs=whole)


def _update(problem: Problem, state: TrainState, grads: Params, **extra_args: Any) -> tuple[Params, dict[str, Any]]:
    params, opt_state = {}, {}
    for part, tx in (("model", problem.tx), ("loss", problem.loss_tx)):
        if tx is None:
            params[part], opt_state[part] = state.params[part], state.opt_state[part]
            continue
        tx = optax.with_extra_args_support(tx)
        updates, opt_state[part] = tx.update(grads[part], state.opt_state[part], state.params[part], **extra_args)
        params[part] = optax.apply_updates(state.params[part], updates)
    return params, opt_state


def make_step(problem: Problem, mesh: Mesh, state: TrainState) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted step `(state, frozen, batch) -> (state, metrics)`; the state is donated.

    Args:
        problem: what is trained.
        mesh: from `parallel.make_mesh`; decides the executor.
        state: real or abstract; the new state is partitioned like it.

    Returns:
        A function of: the state; the teacher's {"params", "model_state"}, or None without a teacher; a batch of host
        arrays, or put on the mesh by `parallel.put_batch`. Metrics are float32 scalars: "loss" and every term's global mean by name.
    """
    split = mesh.shape["data"] > 1 and not parallel.is_partitioned(mesh)
    gradients = _replicated(problem, mesh) if split else _bind(problem)

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        parallel.check_batch(len(batch["targets"]), mesh, problem.accumulate)
        grads, model_state, extra, metrics = gradients(state, frozen, batch)
        params, opt_state = _update(problem, state, grads)
        return TrainState(state.step + 1, params, model_state, opt_state, extra, state.rng), metrics

    # With its place stated, a batch may come as host arrays: the call itself moves them, and only what the step reads.
    layout = shardings_of(state)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(layout, None, parallel.batch_sharding(mesh)),
        out_shardings=(layout, parallel.replicated(mesh)),
    )


def _bind(problem: Problem) -> Callable[..., Any]:
    return lambda state, frozen, batch: _gradients(problem, state, frozen, batch)


def abstract_state(
    problem: Problem, mesh: Mesh, rules: Rules, key: jax.Array, batch: Batch, *, frozen: Frozen = None
) -> TrainState:
    """The state that `init_state` would make, as ShapeDtypeStructs with shardings: what a checkpoint is restored onto.

    Parameters are partitioned by the rules, the optimiser's state like the parameters; everything else is replicated.

    Raises:
        ValueError: as `init_state`.
    """
    shapes = jax.eval_shape(_initialiser(problem, batch, frozen), key, None)
    if jax.tree.leaves(shapes.params["loss"]) and problem.loss_tx is None:
        raise ValueError(
            f"the loss terms {sorted(shapes.params['loss'])} have parameters of their own; give the problem a loss_tx"
        )
    whole: Any = parallel.replicated(mesh)
    everywhere: Callable[[Any], Any] = lambda tree: jax.tree.map(lambda _: whole, tree)
    params = {"model": parallel.partition(shapes.params["model"], rules, mesh), "loss": everywhere(shapes.params["loss"])}
    opt_state = {
        part: parallel.like_params(tree, shapes.params[part], params[part], mesh) for part, tree in shapes.opt_state.items()
    }
    shardings = TrainState(whole, params, everywhere(shapes.model_state), opt_state, everywhere(shapes.extra), whole)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def init_state(
    problem: Problem,
    mesh: Mesh,
    rules: Rules,
    key: jax.Array,
    batch: Batch,
    *,
    params: Params | None = None,
    frozen: Frozen = None,
) -> TrainState:
    """A fresh state, created already partitioned: no parameter ever exists whole where it is split.

    Args:
        problem: what will be trained.
        mesh, rules: where its parameters go; rules speak of the model's own paths.
        key: PRNG key for the parameters and for all that is random in training.
        batch: arrays or ShapeDtypeStructs of one batch.
        params: start from these model parameters (copied) instead of fresh ones.
        frozen: the teacher's, arrays or abstract; needed with a teacher.

    Raises:
        ValueError: no rule covers a parameter, `params` do not fit the model, or a term owns parameters and `loss_tx` is None.
    """
    shapes = abstract_state(problem, mesh, rules, key, batch, frozen=frozen)
    if params is not None and (misfit := trees.first_difference(shapes.params["model"], params)):
        raise ValueError(f"the parameters given do not fit the model: {misfit}")
    return jax.jit(_initialiser(problem, batch, frozen), out_shardings=shardings_of(shapes))(key, params)


def shardings_of(state: TrainState) -> TrainState:
    """The sharding of every leaf of a state, real or abstract."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def _initialiser(problem: Problem, batch: Batch, frozen: Frozen) -> Callable[[jax.Array, Params | None], TrainState]:
    """A traceable (key, model params or None) -> TrainState."""
    student_capture, teacher_capture = _capture(problem)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(batch))

    def init(key: jax.Array, params: Params | None) -> TrainState:
        model_key, loss_key, run_key = jax.random.split(key, 3)
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
        fresh, model_state = problem.model.init(model_key, blank)
        model_params = fresh if params is None else jax.tree.map(jnp.asarray, params)
        student = jax.eval_shape(lambda p: problem.model.apply(p, model_state, blank, capture=student_capture)[0], model_params)
        teacher, partner = None, problem.teacher
        if partner is not None:
            if frozen is None:
                raise ValueError("a problem with a teacher needs the teacher's parameters as `frozen`")
            forward = lambda f: partner.apply(f["params"], f["model_state"], blank, capture=teacher_capture)[0]
            teacher = jax.eval_shape(forward, frozen)
        loss_params, extra = {}, {}
        for index, (name, term) in enumerate(problem.full_terms.items()):
            own, state = term.init(jax.random.fold_in(loss_key, index), student, teacher)
            if jax.tree.leaves(own):
                loss_params[name] = own
            if jax.tree.leaves(state):
                extra[name] = state
        both = {"model": model_params, "loss": loss_params}
        opt_state = {
            "model": problem.tx.init(model_params),
            "loss": problem.loss_tx.init(loss_params) if problem.loss_tx is not None else (),
        }
        return TrainState(jnp.int32(0), both, model_state, opt_state, extra, jax.random.key_data(run_key))

    return init
