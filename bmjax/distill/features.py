"""Distillation from hidden features (FitNets: Romero et al. 2015)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bmjax.types import Batch, Context, Mean, Outputs, Params, Term


def hint(student_feature: str, teacher_feature: str) -> Term:
    """Mean squared error between the student's feature, projected, and the teacher's (FitNets, eq. 3).

    The projector is one learned linear map per token from the student's width to the teacher's, trained in the same step;
    it starts as the identity where the widths agree. Both features are [B, ..., width] with equal leading axes.

    Args:
        student_feature, teacher_feature: names as in `Model.features`, for example "layers/1".

    Raises:
        ValueError: (at init) no teacher, or leading axes that differ.
    """

    def init(key: jax.Array, student: Outputs, teacher: Outputs | None) -> tuple[Params, Any]:
        if teacher is None:
            raise ValueError("the term hint needs a teacher; give the step one, or leave hint out")
        mine, theirs = student.features[student_feature].shape, teacher.features[teacher_feature].shape
        if mine[:-1] != theirs[:-1]:
            raise ValueError(
                f"hint: {student_feature} is {list(mine)} and the teacher's {teacher_feature} is {list(theirs)}; "
                "all axes but the last must agree"
            )
        shape = (mine[-1], theirs[-1])
        kernel = jnp.eye(*shape) if shape[0] == shape[1] else jax.nn.initializers.lecun_normal()(key, shape)
        return {"kernel": kernel, "bias": jnp.zeros(shape[1])}, {}

    def apply(ctx: Context, student: Outputs, teacher: Outputs, batch: Batch) -> Mean:
        projected = student.features[student_feature] @ ctx.params["kernel"] + ctx.params["bias"]
        error = jnp.square(projected - teacher.features[teacher_feature]).astype(jnp.float32).mean(-1)
        return Mean.of(error, batch["weights"])

    return Term(init, apply, (student_feature,), (teacher_feature,))
