"""Vision transformer: pre-norm, scanned layers, learned positions, mean pooling (Dosovitskiy et al. 2021; Beyer et al. 2022)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax

from bmjax.config import field
from bmjax.models.attention import Attention
from bmjax.models.linen import Dropout, LinenModel, captured_parts, layer_features, split_captured
from bmjax.types import Batch, Outputs


class _Block(nn.Module):
    heads: int
    head_dim: int
    neurons: int
    dropout: float
    train: bool
    parts: tuple[str, ...]

    @nn.compact
    def __call__(self, x: jax.Array, ids: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        y = Attention(self.heads, self.head_dim, name="attention")(nn.LayerNorm(name="norm_attention")(x))
        attention = Dropout(self.dropout)(y, ids, self.train)
        x = x + attention
        y = nn.gelu(nn.Dense(self.neurons, name="up")(nn.LayerNorm(name="norm_mlp")(x)))
        mlp = Dropout(self.dropout)(nn.Dense(x.shape[-1], name="down")(y), ids, self.train)
        x = x + mlp
        found = {"": x, "attention": attention, "mlp": mlp}
        return x, {part: found[part] for part in self.parts}


class ViT(nn.Module):
    """inputs [B, H, W, C] float -> logits [B, classes]."""

    patch: int
    layers: int
    width: int
    heads: int
    head_dim: int
    neurons: int
    classes: int
    dropout: float = 0.0

    @property
    def axes(self) -> Mapping[str, tuple[str, int]]:
        """Depth, attention heads, FFN neurons, and the embedding width."""
        return {
            "layers": ("layers/up/kernel", 0),
            "heads": ("layers/attention/query/kernel", 2),
            "neurons": ("layers/up/kernel", 2),
            "width": ("embed/kernel", 1),
        }

    @property
    def rules(self) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        """Kernels over fsdp and tensor, the Megatron way: heads and neurons are split over tensor."""
        return (
            ("attention/(query|key|value)/kernel", (None, "fsdp", "tensor")),
            ("attention/out/kernel", (None, "tensor", None, "fsdp")),
            ("layers/up/kernel", (None, "fsdp", "tensor")),
            ("layers/down/kernel", (None, "tensor", "fsdp")),
            ("head/kernel", ("fsdp",)),
            (".*", ()),
        )

    @property
    def features(self) -> tuple[str, ...]:
        """The embedding, each layer and its branches [B, T, width], and the pooled end [B, width]."""
        return ("embed", *layer_features(self.layers, ("attention", "mlp")), "final")

    def resized(self, sizes: Mapping[str, int]) -> ViT:
        """Other layers, heads, neurons or width."""
        return self.clone(**cast(Any, sizes))

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False, capture: tuple[str, ...] = ()) -> Outputs:
        """See `Model.apply`."""
        inputs, ids = batch["inputs"], batch.get("id")
        b, h, w, c = inputs.shape
        p = self.patch
        patches = inputs.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        x = nn.Dense(self.width, name="embed")(patches.reshape(b, -1, p * p * c))
        x = x + self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        features = {"embed": x}
        stack = nn.scan(
            _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.layers,
        )
        block = stack(self.heads, self.head_dim, self.neurons, self.dropout, train, captured_parts(capture), name="layers")
        x, stacked = block(x, ids)
        features |= split_captured(stacked, capture)
        x = features["final"] = nn.LayerNorm(name="final_norm")(x).mean(axis=1)
        logits = nn.Dense(self.classes, name="head")(x)
        head: Any = self.get_variable("params", "head")
        return Outputs(logits, {name: features[name] for name in capture}, (x, head["kernel"], head["bias"]))


@dataclasses.dataclass
class Transformer:
    """Config of a vision transformer."""

    patch: int = field(2, "side of a square patch, pixels", check=(lambda v: v > 0, "above 0"))
    layers: int = field(4, "transformer layers", check=(lambda v: v > 0, "above 0"))
    width: int = field(64, "embedding width", check=(lambda v: v > 0, "above 0"))
    heads: int = field(4, "attention heads; they divide the width", check=(lambda v: v > 0, "above 0"))
    neurons: int = field(256, "FFN neurons", check=(lambda v: v > 0, "above 0"))
    dropout: float = field(
        0.0, "fraction of each branch's output that is dropped in training", check=(lambda v: 0 <= v < 1, "in [0, 1)")
    )

    def validate(self) -> None:
        """Raises ValueError if the heads do not divide the width."""
        if self.width % self.heads:
            below = max(self.width // self.heads, 1) * self.heads
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads; take a multiple, for example {below}")

    def build(self, shape: tuple[int, ...], classes: int) -> LinenModel:
        """The model for images of one example's `shape` [H, W, C].

        Raises:
            ValueError: the shape is no image, or the patch does not divide it.
        """
        if len(shape) != 3 or shape[0] % self.patch or shape[1] % self.patch:
            raise ValueError(
                f"patches of {self.patch} pixels need images [H, W, C] with sides they divide; the data has {list(shape)}"
            )
        head_dim = self.width // self.heads
        return LinenModel(ViT(self.patch, self.layers, self.width, self.heads, head_dim, self.neurons, classes, self.dropout))
