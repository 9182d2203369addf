"""A fresh state, created already partitioned, and its abstract twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bmjax import parallel, trees
from bmjax.parallel.rules import Rules
from bmjax.train.problem import Frozen, Problem, check_state
from bmjax.types import Batch, Params, TrainState


def abstract_state(
    problem: Problem, mesh: Mesh, rules: Rules, key: jax.Array, batch: Batch, *, frozen: Frozen = None
) -> TrainState:
    """The state that `init_state` would make, as ShapeDtypeStructs with shardings: what a checkpoint is restored onto.

    Parameters are partitioned by the rules, the optimiser's state and a moving average like the parameters; everything else is
    replicated.

    Raises:
        ValueError: as `init_state`.
    """
    shapes = jax.eval_shape(_initialiser(problem, batch, frozen), key, None, None)
    check_state(problem, shapes)
    whole: Any = parallel.replicated(mesh)
    everywhere: Callable[[Any], Any] = lambda tree: jax.tree.map(lambda _: whole, tree)
    params = {"model": parallel.partition(shapes.params["model"], rules, mesh), "loss": everywhere(shapes.params["loss"])}
    opt_state = {
        part: parallel.like_params(tree, shapes.params[part], params[part], mesh) for part, tree in shapes.opt_state.items()
    }
    extra = everywhere(shapes.extra)
    if problem.ema is not None:
        extra["ema"] = params["model"]
    shardings = TrainState(whole, params, everywhere(shapes.model_state), opt_state, extra, whole)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def init_state(
    problem: Problem,
    mesh: Mesh,
    rules: Rules,
    key: jax.Array,
    batch: Batch,
    *,
    params: Params | None = None,
    model_state: Params | None = None,
    frozen: Frozen = None,
) -> TrainState:
    """A fresh state, created already partitioned: no parameter ever exists whole where it is split.

    Args:
        problem: what will be trained.
        mesh, rules: where its parameters go; rules speak of the model's own paths.
        key: PRNG key for the parameters and for all that is random in training.
        batch: arrays or ShapeDtypeStructs of one batch.
        params: start from these model parameters (copied) instead of fresh ones.
        model_state: start from these batch statistics (copied) instead of fresh ones.
        frozen: the teacher's, arrays or abstract; needed with a teacher.

    Raises:
        ValueError: no rule covers a parameter, `params` or `model_state` do not fit the model, a term owns parameters and
            `loss_tx` is None, or the problem's gradient would spoil batch statistics or a term's state.
    """
    shapes = abstract_state(problem, mesh, rules, key, batch, frozen=frozen)
    if params is not None and (misfit := trees.first_difference(shapes.params["model"], params)):
        raise ValueError(f"the parameters given do not fit the model: {misfit}")
    if model_state is not None and (misfit := trees.first_difference(shapes.model_state, model_state)):
        raise ValueError(f"the model state given does not fit the model: {misfit}")
    init = jax.jit(_initialiser(problem, batch, frozen), out_shardings=shardings_of(shapes))
    return init(key, params, model_state)


def shardings_of(state: TrainState) -> TrainState:
    """The sharding of every leaf of a state, real or abstract."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def _initialiser(
    problem: Problem, batch: Batch, frozen: Frozen
) -> Callable[[jax.Array, Params | None, Params | None], TrainState]:
    """A traceable (key, model params or None, model state or None) -> TrainState."""
    student_capture, teacher_capture = problem.captures
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(batch))

    def init(key: jax.Array, params: Params | None, given_state: Params | None) -> TrainState:
        model_key, loss_key, run_key = jax.random.split(key, 3)
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
        fresh, fresh_state = problem.model.init(model_key, blank)
        model_params = fresh if params is None else jax.tree.map(jnp.asarray, params)
        model_state = fresh_state if given_state is None else jax.tree.map(jnp.asarray, given_state)
        student = jax.eval_shape(lambda p: problem.model.apply(p, model_state, blank, capture=student_capture)[0], model_params)
        teacher, partner = None, problem.teacher
        if problem.mean_teacher:
            average = lambda p: problem.model.apply(p, model_state, blank, capture=teacher_capture)[0]
            teacher = jax.eval_shape(average, model_params)
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
        if problem.ema is not None:
            extra["ema"] = jax.tree.map(jnp.copy, model_params)
        both = {"model": model_params, "loss": loss_params}
        opt_state = {
            "model": problem.tx.init(model_params),
            "loss": problem.loss_tx.init(loss_params) if problem.loss_tx is not None else (),
        }
        return TrainState(jnp.int32(0), both, model_state, opt_state, extra, jax.random.key_data(run_key))

    return init
