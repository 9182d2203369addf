"""Text classifiers: a bidirectional pre-norm encoder with learned positions, in the manner of BERT (Devlin et al. 2019)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmjax.config import above, field
from bmjax.models import block as blocks
from bmjax.models.attention import segment_mask
from bmjax.models.block import BlockConfig, BlockSpec
from bmjax.models.checks import check_heads, check_sequence, check_tokens
from bmjax.models.linen import LinenModel, classified
from bmjax.models.stack import captured_parts, layer_features, split_captured
from bmjax.types import Batch, Outputs

POOLS = ("mean", "first")


def real_tokens(batch: Batch, pad: int | None) -> jax.Array:
    """[B, T] bool: False where a token is padding by its id, by "weights" [B, T] or by segment 0."""
    tokens, weights, segments = batch["inputs"], batch.get("weights"), batch.get("segments")
    real = jnp.ones(tokens.shape, bool) if pad is None else tokens != pad
    if weights is not None and weights.ndim == 2:
        real &= weights > 0
    return real if segments is None else real & (segments > 0)


def pooled(x_btd: jax.Array, real_bt: jax.Array, pool: str) -> jax.Array:
    """[B, width]: the mean over the real tokens (0 if there are none), taken in float32, or the first token."""
    if pool == "first":
        return x_btd[:, 0]
    wide = x_btd.astype(jnp.promote_types(x_btd.dtype, jnp.float32))
    total = jnp.sum(jnp.where(real_bt[..., None], wide, 0), axis=1)
    return (total / jnp.maximum(real_bt.sum(axis=1, keepdims=True), 1)).astype(x_btd.dtype)


class TextClassifier(nn.Module):
    """inputs [B, T] int -> logits [B, classes].

    Attributes:
        block: what each layer is made of.
        layers, width, vocabulary, classes: sizes.
        length: rows of the table of positions.
        pad: the id of padding, or None if no token is.
        pool: "mean" or "first".
        remat: what the backward pass computes again: "none", or a name in `stack.REMAT`.
    """

    block: BlockSpec
    layers: int
    width: int
    vocabulary: int
    classes: int
    length: int
    pad: int | None = None
    pool: str = "mean"
    remat: str = "none"

    @property
    def axes(self) -> Mapping[str, tuple[str, int]]:
        """Depth, attention heads, FFN neurons, and the embedding width."""
        return blocks.axes("heads", "embed/embedding")

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

    def resized(self, sizes: Mapping[str, int]) -> TextClassifier:
        """Other layers, heads, neurons or width."""
        heads = sizes.get("heads", self.block.heads)
        spec = dataclasses.replace(self.block, heads=heads, kv_heads=heads, neurons=sizes.get("neurons", self.block.neurons))
        return self.clone(block=spec, layers=sizes.get("layers", self.layers), width=sizes.get("width", self.width))

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False, capture: tuple[str, ...] = ()) -> Outputs:
        """See `Model.apply`; "weights" and "segments" [B, T] say what is padding, "positions" [B, T] where each token stands.

        Raises:
            ValueError: more tokens than there are positions, or cuDNN cannot run.
        """
        tokens, segments, positions = batch["inputs"], batch.get("segments"), batch.get("positions")
        check_tokens(tokens, self.length)
        real = real_tokens(batch, self.pad)
        mask = real[:, None, None, :]
        if segments is not None:
            mask &= segment_mask(segments)
        table = self.param("position", nn.initializers.normal(0.02), (self.length, self.width))
        x = nn.Embed(self.vocabulary, self.width, embedding_init=nn.initializers.normal(0.02), name="embed")(tokens)
        x = x + (table[None, : tokens.shape[1]] if positions is None else jnp.take(table, positions, axis=0))
        features = {"embed": x}
        stack: Any = blocks.stack(self.block, self.layers, self.remat, train, captured_parts(capture))
        x, stacked = stack(x, batch.get("id"), mask, None, None)
        features |= split_captured(stacked, capture)
        x = features["final"] = pooled(blocks.make_norm(self.block.norm, "final_norm")(x), real, self.pool)
        return classified(self, x, self.classes, features, capture)


@dataclasses.dataclass
class Encoder(BlockConfig):
    """Config of a text classifier."""

    vocabulary: int = field(256, "tokens that there are, at least as many as in the data", check=above(1))
    width: int = field(128, "embedding width", check=above(0))
    neurons: int = field(512, "FFN neurons", check=above(0))
    norm: str = field("layernorm", "norm before each branch and at the end", choices=blocks.NORMS)
    length: int = field(512, "positions: the longest sequence", check=above(0))
    mlp: str = field("gelu", "the MLP and its activation", choices=tuple(blocks.ACTIVATIONS))
    bias: bool = field(True, "biases in attention and MLP")
    pad: int | None = field(None, "id of padding; none: only weights or segments tell", check=(lambda v: v >= 0, "of at least 0"))
    pool: str = field("mean", "what is classified: the mean over the tokens, or the first one", choices=POOLS)

    def validate(self) -> None:
        """Raises ValueError if the heads do not divide the width, or the id of padding is no token."""
        check_heads(self.width, self.heads, self.head_dim)
        if self.pad is not None and self.pad >= self.vocabulary:
            raise ValueError(f"pad is {self.pad}; expected an id below the vocabulary of {self.vocabulary}")

    def build(self, shape: tuple[int, ...], classes: int) -> LinenModel:
        """The model for sequences of one example's `shape` [T].

        Raises:
            ValueError: as `validate`; the shape is no sequence, or longer than `length`.
        """
        self.validate()
        check_sequence(shape, self.length)
        sizes = (self.layers, self.width, self.vocabulary, classes, self.length)
        return LinenModel(TextClassifier(self.spec(self.heads, causal=False), *sizes, self.pad, self.pool, self.remat))
