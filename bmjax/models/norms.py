"""Normalisation of channels: over the global batch, and over groups of channels of one example."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmjax.parallel import collectives


class BatchNorm(nn.Module):
    """Batch normalisation whose statistics are those of the whole batch, however it is split and padded (Ioffe & Szegedy 2015).

    The running mean and (biased) variance are float32 and live in the collection "batch_stats"; a training step moves them by
    `running <- momentum * running + (1 - momentum) * batch`. Without training they are used.

    Attributes:
        momentum: how much of the running statistics a step keeps.
        epsilon: added to the variance.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array | None, train: bool) -> jax.Array:
        """x [B, ..., C]; weights [B], an example counting as so many, 0 for padding; None is 1 for all."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(channels, jnp.float32))
        var = self.variable("batch_stats", "var", lambda: jnp.ones(channels, jnp.float32))
        if not train:
            return _affine((x - mean.value) * jax.lax.rsqrt(var.value + self.epsilon), scale, bias, x)
        batch_mean, batch_var = collectives.moments(x, jnp.ones(x.shape[:1]) if weights is None else weights)
        for running, batch in ((mean, batch_mean), (var, batch_var)):
            running.value = self.momentum * running.value + (1 - self.momentum) * jax.lax.stop_gradient(batch)
        return _affine((x - batch_mean) * jax.lax.rsqrt(batch_var + self.epsilon), scale, bias, x)


class GroupNorm(nn.Module):
    """Group normalisation: each example's statistics over its positions and a group of channels (Wu & He 2018).

    The number of channels in a group is fixed, not the number of groups, so that whole groups can be removed.

    Attributes:
        size: channels in a group.
        epsilon: added to the variance.
    """

    size: int
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, ..., C]; C is a multiple of the group's size."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], channels // self.size, self.size)
        axes = (*range(1, x.ndim - 1), x.ndim)
        centred = grouped - grouped.mean(axes, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + self.epsilon)
        return _affine(normal.reshape(x.shape), scale, bias, x)


def _affine(normal: jax.Array, scale: jax.Array, bias: jax.Array, x: jax.Array) -> jax.Array:
    """Scaled and shifted in the statistics' precision, returned in that of the input and the parameters."""
    return (normal * scale + bias).astype(jnp.result_type(x, scale))
