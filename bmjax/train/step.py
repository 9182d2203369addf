"""THE step: (state, frozen, batch) -> (state, metrics), one jit, sharded, with everything that trains inside.

Loss terms, gradients, transforms, param views and teachers compose here and nowhere else. `objective` has the gradient that
every executor runs, `executors` says who runs it on which mesh; the optimiser always runs outside, partitioned like the
parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from bmjax import parallel
from bmjax.train import executors, objective
from bmjax.train.precision import check_compute_dtype
from bmjax.train.problem import Frozen as Frozen
from bmjax.train.problem import Metrics as Metrics
from bmjax.train.problem import Problem as Problem
from bmjax.train.problem import check_state
from bmjax.train.state import abstract_state as abstract_state
from bmjax.train.state import init_state as init_state
from bmjax.train.state import shardings_of as shardings_of
from bmjax.types import Batch, Params, TrainState


def make_step(
    problem: Problem, mesh: Mesh, state: TrainState, executor: str = "auto"
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted step `(state, frozen, batch) -> (state, metrics)`; the state is donated.

    Args:
        problem: what is trained.
        mesh: from `parallel.make_mesh`.
        state: real or abstract; the new state is partitioned like it.
        executor: who runs the gradient, one of `executors.NAMES`; "auto" goes by the mesh.

    Returns:
        A function of: the state; the teacher's {"params", "model_state"}, or None without a teacher; a batch of host
        arrays, or put on the mesh by `parallel.put_batch`. Metrics are float32 scalars: "loss", every term's global mean by name,
        and with `problem.norms` "grad_norm" and "update_norm".

    Raises:
        ValueError: the executor does not fit the mesh or the problem's rollout, the devices cannot compute in the problem's
            dtype, or its gradient would spoil a part of the state.
    """
    check_state(problem, state)
    check_compute_dtype(problem.compute_dtype, mesh.devices.flat)
    spread = executors.choose(executor, mesh)
    if problem.rollout is not None and executor == "hybrid":
        # XLA's partitioner aborts the process on the look-ups of generation beside a manual axis.
        raise ValueError("the executor hybrid cannot run a problem's rollout; take partitioned")

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        parallel.check_batch(len(batch["targets"]), mesh, problem.accumulate)
        one_count = objective.counts_agree(problem, state, frozen, batch)
        gradients = spread(functools.partial(objective.gradients, problem, one_count))
        grads, memory, metrics = gradients(state, frozen, batch)
        params, opt_state, norms = _update(problem, state, grads)
        extra = {**memory.terms, **_moving_average(problem, state, params)}
        return TrainState(state.step + 1, params, memory.model_state, opt_state, extra, state.rng), {**metrics, **norms}

    # With its place stated, a batch may come as host arrays: the call itself moves them, and only what the step reads.
    layout = shardings_of(state)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(layout, None, parallel.batch_sharding(mesh)),
        out_shardings=(layout, parallel.replicated(mesh)),
    )


def _update(problem: Problem, state: TrainState, grads: Params) -> tuple[dict[str, Params], dict[str, Any], Metrics]:
    params, opt_state, norms = {}, {}, {}
    for part, tx in (("model", problem.tx), ("loss", problem.loss_tx)):
        if tx is None:
            params[part], opt_state[part] = state.params[part], state.opt_state[part]
            continue
        tx = optax.with_extra_args_support(tx)
        updates, opt_state[part] = tx.update(grads[part], state.opt_state[part], state.params[part])
        params[part] = optax.apply_updates(state.params[part], updates)
        if problem.norms and part == "model":
            norms = {"grad_norm": optax.global_norm(grads[part]), "update_norm": optax.global_norm(updates)}
    return params, opt_state, norms


def _moving_average(problem: Problem, state: TrainState, params: dict[str, Params]) -> dict[str, Params]:
    if problem.ema is None:
        return {}
    decay = jnp.float32(problem.ema)
    return {"ema": jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.extra["ema"], params["model"])}
