"""Multi-layer perceptrons: the plain one, and a residual pre-norm stack whose depth can be reduced."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax

from bmjax.config import above, field, within
from bmjax.models.linen import Dropout, LinenModel, classified
from bmjax.models.stack import captured_parts, layer_features, remat_field, scanned, split_captured
from bmjax.types import Batch, Outputs

_kernel_init = nn.initializers.he_normal()


class PlainMLP(nn.Module):
    """Dense layers with ReLU between. inputs [B, ...] float are flattened; logits [B, classes]."""

    hidden: tuple[int, ...]
    classes: int

    @property
    def axes(self) -> Mapping[str, tuple[str, int]]:
        """One size per hidden layer."""
        return {f"hidden_{i}": (f"hidden_{i}/kernel", 1) for i in range(len(self.hidden))}

    @property
    def rules(self) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        """Kernels over fsdp and tensor, by turns: what one layer splits over tensor the next one sums over it.

        With the same split in every layer XLA's gradient is wrong on a mesh of three axes, without a word (seen with jax 0.10).
        """
        turns = (("fsdp", "tensor"), ("tensor", "fsdp"))
        kernels = tuple((f"hidden_{i}/kernel", turns[i % 2]) for i in range(len(self.hidden)))
        return (*kernels, ("head/kernel", turns[len(self.hidden) % 2][:1]), (".*", ()))

    @property
    def features(self) -> tuple[str, ...]:
        """The activations of each hidden layer."""
        return tuple(f"hidden_{i}" for i in range(len(self.hidden)))

    def resized(self, sizes: Mapping[str, int]) -> PlainMLP:
        """The same depth with other widths."""
        return self.clone(hidden=tuple(sizes.get(f"hidden_{i}", size) for i, size in enumerate(self.hidden)))

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False, capture: tuple[str, ...] = ()) -> Outputs:
        """See `Model.apply`."""
        inputs = batch["inputs"]
        x = inputs.reshape(inputs.shape[0], -1)
        features = {}
        for i, size in enumerate(self.hidden):
            x = nn.relu(nn.Dense(size, kernel_init=_kernel_init, name=f"hidden_{i}")(x))
            features[f"hidden_{i}"] = x
        return classified(self, x, self.classes, features, capture)


class _Block(nn.Module):
    width: int
    neurons: int
    dropout: float
    train: bool
    parts: tuple[str, ...]

    @nn.compact
    def __call__(self, x: jax.Array, ids: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        y = nn.gelu(nn.Dense(self.neurons, name="up")(nn.LayerNorm(name="norm")(x)))
        mlp = Dropout(self.dropout)(nn.Dense(self.width, name="down")(y), ids, self.train)
        x = x + mlp
        found = {"": x, "mlp": mlp}
        return x, {part: found[part] for part in self.parts}


class ResidualMLP(nn.Module):
    """Pre-norm residual blocks of width -> neurons -> width, scanned. logits [B, classes].

    Attributes:
        layers, width, neurons, classes: sizes.
        dropout: fraction of each block's branch that is dropped in training.
        remat: what the backward pass computes again: "none", or a name in `stack.REMAT`.
    """

    layers: int
    width: int
    neurons: int
    classes: int
    dropout: float = 0.0
    remat: str = "none"

    @property
    def axes(self) -> Mapping[str, tuple[str, int]]:
        """Depth, the blocks' inner neurons, and the width of the residual stream."""
        return {"layers": ("layers/up/kernel", 0), "neurons": ("layers/up/kernel", 2), "width": ("embed/kernel", 1)}

    @property
    def rules(self) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        """Up and down kernels over fsdp and tensor, the Megatron way."""
        return (
            ("layers/up/kernel", (None, "fsdp", "tensor")),
            ("layers/down/kernel", (None, "tensor", "fsdp")),
            ("(embed|head)/kernel", ("fsdp",)),
            (".*", ()),
        )

    @property
    def features(self) -> tuple[str, ...]:
        """The embedding, each block and its branch, and the normalised end."""
        return ("embed", *layer_features(self.layers, ("mlp",)), "final")

    def resized(self, sizes: Mapping[str, int]) -> ResidualMLP:
        """Other layers, neurons or width."""
        return self.clone(**cast(Any, sizes))

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False, capture: tuple[str, ...] = ()) -> Outputs:
        """See `Model.apply`."""
        inputs, ids = batch["inputs"], batch.get("id")
        x = nn.Dense(self.width, name="embed")(inputs.reshape(inputs.shape[0], -1))
        features = {"embed": x}
        stack = scanned(_Block, self.layers, self.remat)
        x, stacked = stack(self.width, self.neurons, self.dropout, train, captured_parts(capture), name="layers")(x, ids)
        features |= split_captured(stacked, capture)
        x = features["final"] = nn.LayerNorm(name="final_norm")(x)
        return classified(self, x, self.classes, features, capture)


@dataclasses.dataclass
class Plain:
    """Config of a plain MLP; the default is the 128-64-32 classifier.

    Its layers have sizes of their own, so they are not scanned, and what they keep for the backward pass is what they give to
    the next one, so there is nothing to compute again.
    """

    hidden: tuple[int, ...] = field(
        (128, 64, 32), "width of each hidden layer", check=(lambda v: v and min(v) > 0, "above 0, at least one of them")
    )

    def build(self, shape: tuple[int, ...], classes: int) -> LinenModel:
        """The model for inputs of one example's `shape`."""
        return LinenModel(PlainMLP(tuple(self.hidden), classes))


@dataclasses.dataclass
class Residual:
    """Config of a residual pre-norm MLP."""

    layers: int = field(4, "residual blocks", check=above(0))
    width: int = field(128, "width of the residual stream", check=above(0))
    neurons: int = field(512, "inner neurons of each block", check=above(0))
    dropout: float = field(0.0, "fraction of each branch's output dropped in training", check=within(0, 1, open_high=True))
    remat: str = remat_field()

    def build(self, shape: tuple[int, ...], classes: int) -> LinenModel:
        """The model for inputs of one example's `shape`."""
        return LinenModel(ResidualMLP(self.layers, self.width, self.neurons, classes, self.dropout, self.remat))
