"""Vision transformer: pre-norm, scanned layers, learned positions, mean pooling (Dosovitskiy et al. 2021; Beyer et al. 2022)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn

from bmjax.config import above, field, within
from bmjax.models import block as blocks
from bmjax.models.block import BlockSpec
from bmjax.models.linen import LinenModel, classified
from bmjax.models.stack import captured_parts, layer_features, remat_field, split_captured
from bmjax.types import Batch, Outputs


class ViT(nn.Module):
    """inputs [B, H, W, C] float -> logits [B, classes].

    Attributes:
        patch: side of a square patch, pixels.
        layers, width, heads, head_dim, neurons, classes: sizes.
        dropout: fraction of each branch's output that is dropped in training.
        remat: what the backward pass computes again: "none", or a name in `stack.REMAT`.
    """

    patch: int
    layers: int
    width: int
    heads: int
    head_dim: int
    neurons: int
    classes: int
    dropout: float = 0.0
    remat: str = "none"

    @property
    def axes(self) -> Mapping[str, tuple[str, int]]:
        """Depth, attention heads, FFN neurons, and the embedding width."""
        return blocks.axes("heads", "embed/kernel")

    @property
    def rules(self) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        """As all stacks of blocks."""
        return (("head/kernel", ("fsdp",)), *blocks.rules())

    @property
    def features(self) -> tuple[str, ...]:
        """The embedding, each layer and its branches [B, T, width], and the pooled end [B, width].

        Beside them what attention is made of, as `Attention` returns it: "layers/3/attention/scores" [B, heads, T, T],
        "layers/3/attention/query", "key" and "value".
        """
        return ("embed", *layer_features(self.layers, blocks.FEATURES), "final")

    def resized(self, sizes: Mapping[str, int]) -> ViT:
        """Other layers, heads, neurons or width."""
        return self.clone(**cast(Any, sizes))

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False, capture: tuple[str, ...] = ()) -> Outputs:
        """See `Model.apply`."""
        inputs = batch["inputs"]
        b, h, w, c = inputs.shape
        p = self.patch
        patches = inputs.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        x = nn.Dense(self.width, name="embed")(patches.reshape(b, -1, p * p * c))
        x = x + self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        features = {"embed": x}
        heads, norm = self.heads, "layernorm"
        spec = BlockSpec(heads, heads, self.head_dim, self.neurons, norm, "gelu", bias=True, dropout=self.dropout)
        stack: Any = blocks.stack(spec, self.layers, self.remat, train, captured_parts(capture))
        x, stacked = stack(x, batch.get("id"), None, None, None)
        features |= split_captured(stacked, capture)
        x = features["final"] = blocks.make_norm(norm, "final_norm")(x).mean(axis=1)
        return classified(self, x, self.classes, features, capture)


@dataclasses.dataclass
class Transformer:
    """Config of a vision transformer."""

    patch: int = field(2, "side of a square patch, pixels", check=above(0))
    layers: int = field(4, "transformer layers", check=above(0))
    width: int = field(64, "embedding width", check=above(0))
    heads: int = field(4, "attention heads; they divide the width", check=above(0))
    neurons: int = field(256, "FFN neurons", check=above(0))
    dropout: float = field(0.0, "fraction of each branch's output dropped in training", check=within(0, 1, open_high=True))
    remat: str = remat_field()

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
        sizes = (self.layers, self.width, self.heads, self.width // self.heads, self.neurons, classes)
        return LinenModel(ViT(self.patch, *sizes, self.dropout, self.remat))
