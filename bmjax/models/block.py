"""The pre-norm transformer block of token models, and the scan over a stack of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from bmjax.models.attention import Attention
from bmjax.models.linen import Dropout

NORMS = ("rmsnorm", "layernorm")
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {"swiglu": nn.silu, "geglu": nn.gelu, "gelu": nn.gelu}
ATTENTION = ("xla", "cudnn")
REMAT: Mapping[str, Any] = {  # what the backward pass need not compute again
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """What one block is made of.

    Attributes:
        heads, kv_heads, head_dim, bias, qk_norm, causal: as in `Attention`; the bias is that of the MLP too.
        neurons: inner neurons of the MLP.
        norm: "rmsnorm" or "layernorm"; statistics in float32.
        mlp: "swiglu" or "geglu" (gated: Shazeer 2020), or "gelu".
        dropout: fraction of each branch's output that is dropped in training.
        attention: "xla" or "cudnn".
    """

    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    norm: str
    mlp: str
    bias: bool = False
    qk_norm: bool = False
    causal: bool = False
    dropout: float = 0.0
    attention: str = "xla"


def make_norm(kind: str, name: str) -> nn.Module:
    """A norm over the last axis; a LayerNorm's variance is taken about the mean, which float32 survives."""
    return nn.RMSNorm(name=name) if kind == "rmsnorm" else nn.LayerNorm(use_fast_variance=False, name=name)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    spec: BlockSpec
    train: bool
    parts: tuple[str, ...]

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        ids: jax.Array | None,
        mask: jax.Array | None,
        rotation: tuple[jax.Array, jax.Array] | None,
        positions: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """([B, T, width], and as `Attention`) -> (the same, the captured parts)."""
        spec = self.spec
        attend = Attention(
            spec.heads, spec.head_dim, spec.kv_heads, spec.bias, spec.qk_norm, spec.causal, spec.attention, name="attention"
        )
        y = attend(make_norm(spec.norm, "norm_attention")(x), mask, rotation, positions)
        attention = Dropout(spec.dropout)(y, ids, self.train)
        x = x + attention
        mlp = Dropout(spec.dropout)(self._mlp(make_norm(spec.norm, "norm_mlp")(x)), ids, self.train)
        x = x + mlp
        found = {"": x, "attention": attention, "mlp": mlp}
        return x, {part: found[part] for part in self.parts}

    def _mlp(self, x: jax.Array) -> jax.Array:
        spec, activation = self.spec, ACTIVATIONS[self.spec.mlp]
        up = nn.Dense(spec.neurons, use_bias=spec.bias, name="up")(x)
        if spec.mlp == "gelu":
            hidden = activation(up)
        else:
            hidden = activation(nn.Dense(spec.neurons, use_bias=spec.bias, name="gate")(x)) * up
        return nn.Dense(x.shape[-1], use_bias=spec.bias, name="down")(hidden)


def stack(spec: BlockSpec, layers: int, remat: str, train: bool, parts: tuple[str, ...]) -> nn.Module:
    """`layers` blocks under one scan, called "layers"; `remat` is "none" or a name in `REMAT`.

    To be called inside a module's compact method. Parameters and caches are stacked along axis 0.
    """
    # Inside a scan nothing can be merged with the forward pass anyway, so the barriers against it would only cost.
    block: Any = Block if remat == "none" else nn.remat(Block, prevent_cse=False, policy=REMAT[remat])
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "cache": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=layers,
    )
    return scanned(spec, train, parts, name="layers")


def rules() -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    """Partition rules of a stack and of what is around it, the Megatron way: heads and neurons are split over tensor.

    The table is split over its width, by tensor: split over its rows, or by fsdp, the look-up aborts XLA's partitioner where only
    `data` is manual. A tied head then sums its logits over tensor; where that axis is large, an untied one is cheaper.
    """
    return (
        ("attention/(query|key|value)/kernel", (None, "fsdp", "tensor")),
        ("attention/out/kernel", (None, "tensor", None, "fsdp")),
        ("layers/(gate|up)/kernel", (None, "fsdp", "tensor")),
        ("layers/down/kernel", (None, "tensor", "fsdp")),
        ("embed/embedding", (None, "tensor")),
        (".*", ()),
    )


def check_heads(width: int, heads: int, head_dim: int | None) -> None:
    """Raises ValueError if the size of a head follows from the width and the heads do not divide it."""
    if head_dim is None and width % heads:
        below = max(width // heads, 1) * heads
        raise ValueError(f"width {width} does not divide into {heads} heads; take a multiple, as {below}, or set head_dim")


def check_sequence(shape: tuple[int, ...], length: int | None) -> None:
    """Raises ValueError if one example's `shape` is not (T,), or T is above the `length` of learned positions."""
    if len(shape) != 1:
        raise ValueError(f"a token model needs sequences [T] of ints; the data has {list(shape)}")
    if length is not None and shape[0] > length:
        raise ValueError(f"sequences of {shape[0]} tokens are longer than the {length} learned positions; raise `length`")
