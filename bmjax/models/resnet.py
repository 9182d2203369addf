"""Residual networks for small images: 6n + 2 layers in three stages (He et al. 2016, section 4.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmjax.config import above, field
from bmjax.models.linen import LinenModel, classified
from bmjax.models.norms import BatchNorm, GroupNorm
from bmjax.models.stack import remat_field, rematerialised, scanned
from bmjax.types import Batch, Outputs

_SHORTCUTS = ("projection", "identity")
_kernel_init = nn.initializers.he_normal()


class Stage(NamedTuple):
    """The sizes of one stage, channels counted in units (of 1 with BatchNorm, of a whole group with GroupNorm).

    Attributes:
        width: channels of the residual stream.
        first_inner: channels inside the first block, the one that may halve the image.
        blocks: blocks after the first; they have one shape and are scanned.
        inner: channels inside each of those.
    """

    width: int
    first_inner: int
    blocks: int
    inner: int


class _Kind(NamedTuple):
    """What all blocks have in common; see `ResNetModule`."""

    group: int
    project: bool
    remat: str
    train: bool

    def norm(self, x: jax.Array, weights: jax.Array | None, name: str) -> jax.Array:
        """To be called in a compact method, whose module gets the norm as `name`."""
        return GroupNorm(self.group, name=name)(x) if self.group else BatchNorm(name=name)(x, weights, self.train)


def _conv(x: jax.Array, features: int, size: int, stride: int, name: str) -> jax.Array:
    """A square convolution with `size // 2` zeros around, in the compact method of the module that gets it as `name`."""
    pad = ((size // 2, size // 2),) * 2
    return nn.Conv(features, (size, size), (stride, stride), pad, use_bias=False, kernel_init=_kernel_init, name=name)(x)


class _Block(nn.Module):
    """conv-norm-relu-conv-norm, added to the shortcut."""

    kind: _Kind
    width: int
    inner: int
    stride: int
    capture: bool

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        kind = self.kind
        y = nn.relu(kind.norm(_conv(x, self.inner, 3, self.stride, "conv1"), weights, "norm1"))
        y = kind.norm(_conv(y, self.width, 3, 1, "conv2"), weights, "norm2")
        if self.stride > 1 and kind.project:
            x = kind.norm(_conv(x, self.width, 1, self.stride, "projection"), weights, "norm_projection")
        elif self.stride > 1:
            x = x[:, :: self.stride, :: self.stride]
            # Joined with zeros, and not padded with them, so that a trace follows the channels.
            x = jnp.concatenate([x, jnp.zeros((*x.shape[:-1], self.width - x.shape[-1]), x.dtype)], axis=-1)
        x = nn.relu(x + y)
        return x, x if self.capture else None


class _StageBlocks(nn.Module):
    """The first block, and the rest of them scanned. Returns (x, {"block_1": [B, H, W, C]} of the blocks in `capture`)."""

    kind: _Kind
    sizes: Stage
    stride: int
    capture: tuple[str, ...]

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        kind, sizes = self.kind, self.sizes
        first = rematerialised(_Block, kind.remat, scanned=False)
        unit = max(kind.group, 1)
        width, after = sizes.width * unit, any(name != "block_0" for name in self.capture)
        x, _ = first(kind, width, sizes.first_inner * unit, self.stride, False, name="first")(x, weights)
        found = {"block_0": x}
        if sizes.blocks:
            rest = scanned(_Block, sizes.blocks, kind.remat)(kind, width, sizes.inner * unit, 1, after, name="rest")
            x, stacked = rest(x, weights)
            if stacked is not None:
                found |= {f"block_{j + 1}": stacked[j] for j in range(sizes.blocks)}
        return x, {name: found[name] for name in self.capture}


class ResNetModule(nn.Module):
    """inputs [B, H, W, C] float -> logits [B, classes].

    Attributes:
        stages: sizes.
        classes: number of classes.
        group: channels in a group of GroupNorm; 0 for BatchNorm.
        project: shortcuts between stages are 1x1 convolutions; if not, they are the identity with zeros for new channels.
        remat: what the backward pass computes again, block by block: "none", or a name in `stack.REMAT`.
    """

    stages: tuple[Stage, ...]
    classes: int
    group: int = 0
    project: bool = True
    remat: str = "none"

    @property
    def axes(self) -> Mapping[str, tuple[str, int]]:
        """Of each stage: channels inside its first block, those inside the others, the others' number, and the width.

        The width is that of the residual stream; it is left out with identity shortcuts, which tie the stages' streams together.
        With GroupNorm, channels are counted in groups.
        """
        found = {}
        for i, stage in enumerate(self.stages):
            found[f"stage_{i}/first_inner"] = (f"stage_{i}/first/conv1/kernel", 3)
            if stage.blocks:
                found[f"stage_{i}/blocks"] = (f"stage_{i}/rest/conv1/kernel", 0)
                found[f"stage_{i}/inner"] = (f"stage_{i}/rest/conv1/kernel", 4)
            if self.project:
                found[f"stage_{i}/width"] = (f"stage_{i}/first/conv2/kernel", 3)
        return found

    @property
    def rules(self) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        """Output channels over fsdp. Not over tensor too: on a mesh of three axes XLA's gradient is then wrong, without a word
        (seen with jax 0.10)."""
        return (
            ("stem/kernel", (None, None, None, "fsdp")),
            ("rest/conv./kernel", (None, None, None, None, "fsdp")),
            ("first/(conv.|projection)/kernel", (None, None, None, "fsdp")),
            ("head/kernel", ("fsdp",)),
            (".*", ()),
        )

    @property
    def features(self) -> tuple[str, ...]:
        """The stem and each block [B, H, W, C], and the pooled end [B, C]."""
        blocks = [f"stage_{i}/block_{j}" for i, stage in enumerate(self.stages) for j in range(stage.blocks + 1)]
        return ("stem", *blocks, "final")

    def resized(self, sizes: Mapping[str, int]) -> ResNetModule:
        """Other channels or blocks."""
        stages = list(self.stages)
        for name, size in sizes.items():
            stage, _, part = name.partition("/")
            index = int(stage.removeprefix("stage_"))
            stages[index] = stages[index]._replace(**{part: size})
        return self.clone(stages=tuple(stages))

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False, capture: tuple[str, ...] = ()) -> Outputs:
        """See `Model.apply`. "weights" [B], where given, count in the batch statistics."""
        x, weights = batch["inputs"], batch.get("weights")
        kind = _Kind(self.group, self.project, self.remat, train)
        x = nn.relu(kind.norm(_conv(x, self.stages[0].width * max(self.group, 1), 3, 1, "stem"), weights, "norm_stem"))
        features = {"stem": x}
        for i, sizes in enumerate(self.stages):
            stage = f"stage_{i}"
            wanted = tuple(name.removeprefix(f"{stage}/") for name in capture if name.startswith(f"{stage}/"))
            x, found = _StageBlocks(kind, sizes, 1 if i == 0 else 2, wanted, name=stage)(x, weights)
            features |= {f"{stage}/{block}": value for block, value in found.items()}
        x = features["final"] = x.mean(axis=(1, 2))
        return classified(self, x, self.classes, features, capture)


@dataclasses.dataclass
class ResNet:
    """Config of a residual network; the default is ResNet-20."""

    depth: int = field(20, "layers, 6n + 2", check=(lambda v: v > 7 and v % 6 == 2, "of the form 6n + 2: 8, 14, 20, 32, 56"))
    width: int = field(16, "channels of the first stage; the next ones have 2 and 4 times as many", check=above(0))
    norm: str = field("batch", "normalisation", choices=("batch", "group"))
    group: int = field(4, "channels in a group of the group normalisation; they divide the width", check=above(0))
    shortcut: str = field("projection", "where a stage begins: a 1x1 convolution, or zeros for new channels", choices=_SHORTCUTS)
    remat: str = remat_field()

    def validate(self) -> None:
        """Raises ValueError if groups of channels do not divide the width."""
        if self.norm == "group" and self.width % self.group:
            below = max(self.width // self.group, 1) * self.group
            raise ValueError(
                f"width {self.width} does not divide into groups of {self.group} channels; take a multiple, for example {below}"
            )

    def build(self, shape: tuple[int, ...], classes: int) -> LinenModel:
        """The model for images of one example's `shape` [H, W, C].

        Raises:
            ValueError: the shape is no image.
        """
        if len(shape) != 3:
            raise ValueError(f"a residual network needs images [H, W, C]; the data has {list(shape)}")
        group = self.group if self.norm == "group" else 0
        widths = [self.width // max(group, 1) * 2**i for i in range(3)]
        stages = tuple(Stage(width, width, (self.depth - 2) // 6 - 1, width) for width in widths)
        return LinenModel(ResNetModule(stages, classes, group, self.shortcut == "projection", self.remat))
