"""One layer's kernel pruned by what enters it: Wanda's mask, and SparseGPT's mask and weight update."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bmjax.prune import threshold
from bmjax.prune.kinds import number, whole

_EXACT = lax.Precision.HIGHEST
_TRIES = 6  # each with ten times the damping


class Target(NamedTuple):
    """How much of a layer goes: a fraction, or all but n of each m neighbouring inputs."""

    sparsity: float | None = None
    n: int | None = None
    m: int | None = None

    def check(self) -> None:
        """Raises ValueError unless it is one of the two, of the right kinds, and possible."""
        if self.sparsity is not None:
            number("the sparsity", self.sparsity)
        for name, value in (("n", self.n), ("m", self.m)):
            if value is not None:
                whole(f"{name} of the pattern n:m", value)
        if self.sparsity is not None:
            if self.n is not None or self.m is not None:
                raise ValueError(f"both sparsity={self.sparsity} and {self.n}:{self.m} are given; give one of them")
            if not 0.0 <= self.sparsity < 1.0:
                raise ValueError(f"sparsity {self.sparsity} is given; expected a fraction to drop, at least 0 and below 1")
        elif self.n is None or self.m is None:
            raise ValueError(f"neither a sparsity nor n and m are given (n={self.n}, m={self.m}); give a sparsity, or n and m")
        elif not 1 <= self.n < self.m:
            raise ValueError(f"the pattern {self.n}:{self.m} is given; expected n:m with 1 <= n < m, n of each m inputs kept")

    def check_inputs(self, inputs: int, name: str = "the kernel") -> None:
        """Raises ValueError if m does not divide the inputs."""
        if self.m is not None and inputs % self.m:
            raise ValueError(f"{name} has {inputs} inputs, which {self.m} does not divide; no {self.n}:{self.m}, so leave it out")

    def dropped(self, size: int) -> int:
        """How many of `size` go."""
        assert self.sparsity is not None
        return round(self.sparsity * size)


def wanda_mask(
    kernel: jax.Array,
    input_sq_mean: jax.Array,
    *,
    sparsity: float | None = None,
    n: int | None = None,
    m: int | None = None,
) -> jax.Array:
    """Each output drops the inputs with the smallest |W| ||x||. Sun et al. 2023 (Wanda), arXiv 2306.11695, eq. 1.

    Args:
        kernel: [in, out].
        input_sq_mean: [in], the mean square of each input over the calibration data.
        sparsity: fraction of each output's inputs to drop: exactly round(sparsity * in).
        n, m: instead of a sparsity: of each m neighbouring inputs n stay.

    Returns:
        bool [in, out], True where a weight stays. Among equal scores the lower input stays.

    Raises:
        ValueError: shapes that do not go together; both or neither of a sparsity and n:m; one out of range or no number; m does
            not divide in; NaN outside jit, under which it goes first.
    """
    target = Target(sparsity, n, m)
    _check(kernel, target)
    if input_sq_mean.shape != kernel.shape[:1]:
        raise ValueError(f"input_sq_mean has shape {list(input_sq_mean.shape)}, expected {list(kernel.shape[:1])}: one an input")
    threshold.refuse_nan("weights of the kernel", kernel)
    threshold.refuse_nan("mean squares of the inputs", input_sq_mean)
    return by_scores(kernel, input_sq_mean, target)


def by_scores(kernel: jax.Array, input_sq_mean: jax.Array, target: Target) -> jax.Array:
    """`wanda_mask` of checked arguments."""
    keep = 0 if target.m else kernel.shape[0] - target.dropped(kernel.shape[0])
    return _wanda(kernel, input_sq_mean, keep, target.n, target.m)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _wanda(kernel: jax.Array, input_sq_mean: jax.Array, keep: jax.Array, n: int | None, m: int | None) -> jax.Array:
    scores = wanda_scores(kernel, input_sq_mean)
    if n is not None and m is not None:
        return threshold.nm_mask(scores, n, m, axis=0)
    order = jnp.argsort(-scores, axis=0, stable=True)  # NaN comes last
    return jnp.argsort(order, axis=0) < keep


def wanda_scores(kernel: jax.Array, input_sq_mean: jax.Array) -> jax.Array:
    """|W| times the root mean square of its input, float32 [in, out]."""
    return jnp.abs(kernel.astype(jnp.float32)) * jnp.sqrt(input_sq_mean)[:, None]


def sparsegpt_update(
    kernel: jax.Array,
    gram: jax.Array,
    *,
    sparsity: float | None = None,
    n: int | None = None,
    m: int | None = None,
    block: int = 128,
    damp: float = 0.01,
) -> tuple[jax.Array, jax.Array]:
    """Prunes a kernel and makes up for it in the weights that are left. Frantar and Alistarh 2023 (SparseGPT), arXiv 2301.00774.

    Input after input, what an output loses is made good by the inputs that come after, as the inverse of the Hessian X^T X
    says. An input that is always 0 is dead: its weights become 0. If the Hessian cannot be factored in float32 the damping is
    raised tenfold until it can.

    Args:
        kernel: [in, out].
        gram: X^T X / N, float32 [in, in].
        sparsity: fraction to drop in each block of inputs, over all outputs.
        n, m: instead of a sparsity: of each m neighbouring inputs n stay.
        block: inputs between two updates of all that comes after; with n:m a multiple of m.
        damp: what is added to the diagonal, as a fraction of its mean over inputs that are not dead.

    Returns:
        (the kernel in its dtype, 0 where dropped; bool [in, out], True where a weight stays).

    Raises:
        ValueError: as `wanda_mask`; block or damp out of range. Under jit NaN makes everything NaN.
    """
    target = Target(sparsity, n, m)
    _check(kernel, target)
    check_settings(target, block, damp)
    if gram.shape != (kernel.shape[0],) * 2:
        raise ValueError(f"the gram matrix has shape {list(gram.shape)}, expected {[kernel.shape[0]] * 2}: inputs by inputs")
    threshold.refuse_nan("weights of the kernel", kernel)
    threshold.refuse_nan("entries of the gram matrix", gram)
    new, mask, _ = solve(kernel, gram, target, block, damp)
    return new, mask


def check_settings(target: Target, block: int, damp: float) -> None:
    """Raises ValueError for SparseGPT's settings."""
    if block < 1 or (target.m is not None and block % target.m):
        raise ValueError(f"SparseGPT's block of {block} inputs is given; expected a multiple of {target.m or 1}, say 128")
    if not damp >= 0:
        raise ValueError(f"SparseGPT's damping of {damp} is given; expected 0 or more, 0.01 in the paper")


def _check(kernel: jax.Array, target: Target) -> None:
    target.check()
    if kernel.ndim != 2 or 0 in kernel.shape:
        raise ValueError(f"a kernel of shape {list(kernel.shape)} is given; expected [in, out]")
    target.check_inputs(kernel.shape[0])


def solve(kernel: jax.Array, gram: jax.Array, target: Target, block: int, damp: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(kernel, mask, the damping that was used) of `sparsegpt_update`, of checked arguments."""
    inputs, outputs = kernel.shape
    sizes = [min(block, inputs - start) * outputs for start in range(0, inputs, block)]
    padding = (-inputs % block) * outputs  # of the last block; it counts as kept
    keep = [0 if target.m else size - target.dropped(size) for size in sizes]
    keep[-1] += padding
    return _solve(kernel, gram, jnp.asarray(keep, jnp.int32), jnp.float32(damp), target.n, target.m, block)


def _factor(gram: jax.Array, damp: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(U, upper with (gram + damping)^-1 = U^T U; which inputs are dead; the damping that was used).

    With the order of inputs reversed the Cholesky factor is that of gram = R R^T with R upper, and U = R^-1: one factorisation
    where inverting first takes two, and rounding is less.
    """
    size = len(gram)
    diagonal = jnp.diagonal(gram)
    dead = diagonal <= 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1)
    mean = jnp.where(mean > 0, mean, 1.0)
    filled = gram + jnp.diag(jnp.where(dead, mean, 0.0))

    def attempt(damp: jax.Array) -> jax.Array:
        root = jnp.linalg.cholesky((filled + damp * mean * jnp.eye(size))[::-1, ::-1])[::-1, ::-1]
        return jnp.triu(jax.scipy.linalg.solve_triangular(root, jnp.eye(size), lower=False))

    def failed(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        upper, _, tries = state
        return ~jnp.all(jnp.isfinite(upper)) & (tries < _TRIES)

    def again(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        _, damp, tries = state
        damp = jnp.maximum(10 * damp, 1e-4)
        return attempt(damp), damp, tries + 1

    upper, damp, _ = lax.while_loop(failed, again, (attempt(damp), damp, jnp.int32(1)))
    return upper, dead, damp


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _solve(
    kernel: jax.Array, gram: jax.Array, keep: jax.Array, damp: jax.Array, n: int | None, m: int | None, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    inputs = len(kernel)
    padding = -inputs % block
    upper, dead, damp = _factor(gram.astype(jnp.float32), damp)
    upper = jnp.pad(upper, (0, padding)) + jnp.diag((jnp.arange(inputs + padding) >= inputs).astype(jnp.float32))
    weights = jnp.pad(jnp.where(dead[:, None], 0.0, kernel.astype(jnp.float32)), ((0, padding), (0, 0)))

    def one_block(b: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weights, mask = state
        rows = lax.dynamic_slice_in_dim(upper, b * block, block)
        square = lax.dynamic_slice_in_dim(rows, b * block, block, axis=1)
        diagonal = jnp.diagonal(square)[:, None]
        own = lax.dynamic_slice_in_dim(weights, b * block, block)
        stay = jnp.ones(own.shape, bool)
        if m is None:
            real = (b * block + jnp.arange(block) < inputs)[:, None]
            (stay,) = threshold.largest([jnp.where(real, jnp.square(own / diagonal), jnp.inf)], keep[b][None])

        def one_input(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            own, stay, pruned, errors = state
            if n is not None and m is not None:
                stay = lax.cond(i % m == 0, lambda: _next_mask(own, diagonal, stay, i, n, m), lambda: stay)
            after = jnp.where(stay[i], own[i], 0.0)
            error = (own[i] - after) / diagonal[i]
            # Inputs before this one have a factor of exactly 0.
            return own - square[i][:, None] * error, stay, pruned.at[i].set(after), errors.at[i].set(error)

        _, stay, pruned, errors = lax.fori_loop(0, block, one_input, (own, stay, jnp.zeros_like(own), jnp.zeros_like(own)))
        weights = weights - jnp.matmul(rows.T, errors, precision=_EXACT)
        weights = lax.dynamic_update_slice_in_dim(weights, pruned, b * block, axis=0)
        return weights, lax.dynamic_update_slice_in_dim(mask, stay, b * block, axis=0)

    start = (weights, jnp.ones(weights.shape, bool))
    weights, mask = lax.fori_loop(0, (inputs + padding) // block, one_block, start)
    return weights[:inputs].astype(kernel.dtype), mask[:inputs], damp


def _next_mask(own: jax.Array, diagonal: jax.Array, stay: jax.Array, i: jax.Array, n: int, m: int) -> jax.Array:
    """The mask with the group of m inputs from i on chosen, by the weights as they are by now."""
    group = lax.dynamic_slice_in_dim(own, i, m) / lax.dynamic_slice_in_dim(diagonal, i, m)
    return lax.dynamic_update_slice_in_dim(stay, threshold.nm_mask(jnp.square(group), n, m, axis=0), i, axis=0)
