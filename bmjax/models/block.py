"""The pre-norm transformer block, the scan over a stack of them, and what networks made of it have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax

from bmjax.config import above, field, within
from bmjax.models.attention import CAPTURED, Attention
from bmjax.models.linen import Dropout
from bmjax.models.stack import remat_field, scanned

NORMS = ("rmsnorm", "layernorm")
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {"swiglu": nn.silu, "geglu": nn.gelu, "gelu": nn.gelu}
ATTENTION = ("xla", "cudnn")


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
        inside = tuple(part.removeprefix("attention/") for part in self.parts if part.startswith("attention/"))
        y, captured = attend(make_norm(spec.norm, "norm_attention")(x), mask, rotation, positions, inside)
        attention = Dropout(spec.dropout)(y, ids, self.train)
        x = x + attention
        mlp = Dropout(spec.dropout)(self._mlp(make_norm(spec.norm, "norm_mlp")(x)), ids, self.train)
        x = x + mlp
        found = {"": x, "attention": attention, "mlp": mlp, **{f"attention/{name}": value for name, value in captured.items()}}
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
    """`layers` blocks under one scan, called "layers", as `stack.scanned`; to be called inside a module's compact method."""
    return scanned(Block, layers, remat)(spec, train, parts, name="layers")


# What can be captured beside a block's end: its branches, and what attention is made of.
FEATURES = ("attention", *(f"attention/{name}" for name in CAPTURED), "mlp")


def axes(heads: str, width: str) -> Mapping[str, tuple[str, int]]:
    """Sizes of a stack and of what is around it: depth, heads of keys and values, FFN neurons, and the embedding width.

    Args:
        heads: what the heads are called; their queries go with them.
        width: path of the parameter whose axis 1 is the width.
    """
    return {
        "layers": ("layers/up/kernel", 0),
        heads: ("layers/attention/key/kernel", 2),
        "neurons": ("layers/up/kernel", 2),
        "width": (width, 1),
    }


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


@dataclasses.dataclass
class BlockConfig:
    """The fields that configs of token models share; each gives defaults of its own where its kind has others."""

    layers: int = field(4, "transformer layers", check=above(0))
    width: int = field(256, "embedding width", check=above(0))
    heads: int = field(4, "attention heads, those of the queries", check=above(0))
    head_dim: int | None = field(None, "size of a head; none: width / heads", check=above(0))
    neurons: int = field(1024, "FFN neurons", check=above(0))
    norm: str = field("rmsnorm", "norm before each branch and at the end", choices=NORMS)
    mlp: str = field("swiglu", "the MLP and its activation", choices=tuple(ACTIVATIONS))
    bias: bool = field(False, "biases in attention, MLP and an untied head over the vocabulary")
    qk_norm: bool = field(False, "RMSNorm on queries and keys")
    dropout: float = field(0.0, "fraction of each branch's output dropped in training", check=within(0, 1, open_high=True))
    attention: str = field("xla", "cudnn runs on NVIDIA, in bfloat16 or float16", choices=ATTENTION)
    remat: str = remat_field()

    def spec(self, kv_heads: int, causal: bool) -> BlockSpec:
        """What each layer is made of."""
        return BlockSpec(
            heads=self.heads,
            kv_heads=kv_heads,
            head_dim=self.head_dim or self.width // self.heads,
            neurons=self.neurons,
            norm=self.norm,
            mlp=self.mlp,
            bias=self.bias,
            qk_norm=self.qk_norm,
            causal=causal,
            dropout=self.dropout,
            attention=self.attention,
        )
