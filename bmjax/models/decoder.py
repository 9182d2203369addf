"""Causal language models: pre-norm, scanned layers, as in LLaMA or GPT-2 by its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmjax.config import above, field
from bmjax.models import block as blocks
from bmjax.models.attention import rope, segment_mask, segment_positions
from bmjax.models.block import BlockConfig, BlockSpec
from bmjax.models.checks import check_heads, check_sequence, check_tokens
from bmjax.models.linen import LinenModel, classified
from bmjax.models.stack import captured_parts, layer_features, split_captured
from bmjax.types import Batch, Outputs, Params


class CausalLM(nn.Module):
    """inputs [B, T] int -> logits [B, T, vocabulary]; each token sees itself and what is before it in its segment.

    Attributes:
        block: what each layer is made of.
        layers, width, vocabulary: sizes.
        length: rows of the table of learned positions; 0 for rotary ones.
        rope_base: of the rotary frequencies.
        tied: the head is the embedding's table.
        remat: what the backward pass computes again: "none", or a name in `stack.REMAT`.
    """

    block: BlockSpec
    layers: int
    width: int
    vocabulary: int
    length: int = 0
    rope_base: float = 10000.0
    tied: bool = True
    remat: str = "none"

    @property
    def axes(self) -> Mapping[str, tuple[str, int]]:
        """Depth, heads of keys and values (their queries go with them), FFN neurons, and the embedding width."""
        return blocks.axes("kv_heads", "embed/embedding")

    @property
    def rules(self) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        """As all stacks of blocks; an untied head is split over the vocabulary by tensor."""
        return (("head/kernel", ("fsdp", "tensor")), *blocks.rules())

    @property
    def features(self) -> tuple[str, ...]:
        """The embedding, each layer and its branches, and the normalised end, all [B, T, width].

        Beside them what attention is made of, as `Attention` returns it: "layers/3/attention/scores" [B, heads, T, T],
        "layers/3/attention/query", "key" and "value".
        """
        return ("embed", *layer_features(self.layers, blocks.FEATURES), "final")

    def resized(self, sizes: Mapping[str, int]) -> CausalLM:
        """Other layers, kv_heads, neurons or width."""
        spec = self.block
        kv_heads = sizes.get("kv_heads", spec.kv_heads)
        heads = kv_heads * (spec.heads // spec.kv_heads)
        spec = dataclasses.replace(spec, heads=heads, kv_heads=kv_heads, neurons=sizes.get("neurons", spec.neurons))
        return self.clone(block=spec, layers=sizes.get("layers", self.layers), width=sizes.get("width", self.width))

    def empty_cache(self, params: Params, rows: int, slots: int) -> Params:
        """The collection "cache" with room for `slots` tokens in each of `rows` rows, in the parameters' dtype."""
        shape = (self.layers, rows, slots, self.block.kv_heads, self.block.head_dim)
        dtype = jnp.result_type(*jax.tree.leaves(params))
        return {"layers": {"attention": {name: jnp.zeros(shape, dtype) for name in ("key", "value")}}}

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False, capture: tuple[str, ...] = ()) -> Outputs:
        """See `Model.apply`; "segments" and "positions" [B, T] int of a packed batch are obeyed.

        Raises:
            ValueError: more tokens than there are learned positions, or cuDNN cannot run.
        """
        tokens, segments, positions = batch["inputs"], batch.get("segments"), batch.get("positions")
        check_tokens(tokens, self.length or None)
        if positions is None and segments is not None:
            positions = segment_positions(segments)
        embed = nn.Embed(self.vocabulary, self.width, embedding_init=nn.initializers.normal(0.02), name="embed")
        x, rotation = embed(tokens), None
        if self.length:
            x = x + self._learned(positions, tokens.shape[1])
        else:
            places = jnp.arange(tokens.shape[1])[None] if positions is None else positions
            rotation = rope(places, self.block.head_dim, self.rope_base)
        features = {"embed": x}
        stack: Any = blocks.stack(self.block, self.layers, self.remat, train, captured_parts(capture))
        mask = None if segments is None else segment_mask(segments)
        x, stacked = stack(x, batch.get("id"), mask, rotation, positions)
        features |= split_captured(stacked, capture)
        x = features["final"] = blocks.make_norm(self.block.norm, "final_norm")(x)
        if not self.tied:
            return classified(self, x, self.vocabulary, features, capture, self.block.bias)
        kernel = embed.embedding.T
        return Outputs(x @ kernel, {name: features[name] for name in capture}, (x, kernel, None))

    def _learned(self, positions: jax.Array | None, tokens: int) -> jax.Array:
        """What is added to the embedding, [1 or B, T, width]."""
        table = self.param("position", nn.initializers.normal(0.02), (self.length, self.width))
        return table[None, :tokens] if positions is None else jnp.take(table, positions, axis=0)


_LENGTH, _BASE = 1024, 10000.0


@dataclasses.dataclass
class Decoder(BlockConfig):
    """Config of a causal language model."""

    kv_heads: int | None = field(None, "heads of keys and values, each for heads / kv_heads queries; none: heads", check=above(0))
    positions: str = field("rope", "rotary or learned", choices=("rope", "learned"))
    length: int = field(_LENGTH, "learned positions: the longest sequence", check=above(0))
    rope_base: float = field(_BASE, "rotary positions: base of the frequencies", check=above(1))
    tied: bool = field(True, "the head is the embedding's table")

    def validate(self) -> None:
        """Raises ValueError if heads, kv_heads, head_dim and width do not fit each other, or a setting would do nothing."""
        check_heads(self.width, self.heads, self.head_dim)
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads {self.kv_heads} does not divide {self.heads} heads; take a divisor of {self.heads}")
        head_dim = self.head_dim or self.width // self.heads
        if self.positions == "rope" and head_dim % 2:
            raise ValueError(f"rotary positions need heads of an even size; head_dim is {head_dim}")
        name, usual = ("length", _LENGTH) if self.positions == "rope" else ("rope_base", _BASE)
        if getattr(self, name) != usual:
            raise ValueError(
                f"{name} is {getattr(self, name)}, and positions are {self.positions}, which do not look at it; leave it out"
            )

    def build(self, shape: tuple[int, ...], classes: int) -> LinenModel:
        """The model for sequences of one example's `shape` [T] with `classes` tokens in the vocabulary.

        Raises:
            ValueError: as `validate`; the shape is no sequence, or longer than the learned positions.
        """
        self.validate()
        learned = self.positions == "learned"
        check_sequence(shape, self.length if learned else None)
        spec = self.spec(self.kv_heads or self.heads, causal=True)
        length = self.length if learned else 0
        return LinenModel(CausalLM(spec, self.layers, self.width, classes, length, self.rope_base, self.tied, self.remat))
