"""Random changes of training batches: whole-batch NumPy, drawn from one generator."""

from __future__ import annotations

import dataclasses

import numpy as np

from bmjax.config import at_least, field, within
from bmjax.data.dataset import Split
from bmjax.data.teacher_record import BATCH_KEY

_HOW = ("shifted", "beside_cache")  # fields that change nothing by themselves


@dataclasses.dataclass
class Augment:
    """Random changes of training inputs; student and teacher see the same ones."""

    shift: int = field(0, "largest move of an image each way, pixels; filled with 0", check=at_least(0))
    shifted: float = field(0.5, "fraction of the images that are moved by shift", check=within(0, 1))
    crop: int = field(
        0, "pixels of padding (0 after normalisation) round every image before a crop of its size", check=at_least(0)
    )
    flip: float = field(0.0, "fraction of the images that are mirrored left to right", check=within(0, 1))
    mixup: float = field(
        0.0, "alpha of mixup: pairs of examples are averaged with weights from Beta(alpha, alpha)", check=at_least(0)
    )
    cutmix: float = field(
        0.0,
        "alpha of CutMix: a box of each image comes from another; beside mixup each batch takes one of the two",
        check=at_least(0),
    )
    noise: float = field(0.0, "standard deviation of Gaussian noise on the normalised inputs", check=at_least(0))
    beside_cache: bool = field(
        False, "allow changes, not mixed ones, beside a teacher's cached outputs, which are of the unchanged inputs"
    )

    @property
    def moves(self) -> bool:
        """Whether images are needed: something moves or cuts pixels."""
        return bool(self.shift or self.crop or self.flip or self.cutmix)

    @property
    def mixes(self) -> bool:
        """Whether batches carry two targets an example: "targets_b" and "mix"."""
        return bool(self.mixup or self.cutmix)

    @property
    def works(self) -> bool:
        """Whether anything is changed at all."""
        return bool(self.moves or self.mixes or self.noise)

    def validate(self) -> None:
        """Raises ValueError where two fields exclude each other."""
        if self.shift and self.crop:
            raise ValueError(
                f"shift is {self.shift} and crop is {self.crop}; crop moves every image, shift some: set one of them to 0"
            )


def check(augment: Augment, split: Split, *, mixable: bool = True, loss: str = "the task loss") -> None:
    """Raises ValueError where a split, or the loss, cannot be augmented so.

    Args:
        augment: the changes.
        split: what would be changed.
        mixable: whether the task loss reads "targets_b" and "mix", as `losses.cross_entropy_term` does.
        loss: its name, for the message.
    """
    augment.validate()
    on = [entry.name for entry in dataclasses.fields(Augment) if entry.name not in _HOW and getattr(augment, entry.name)]
    if BATCH_KEY in split.extra and augment.works and (augment.mixes or not augment.beside_cache):
        meant = "" if augment.mixes else ", or augment.beside_cache to True if that is meant"
        raise ValueError(
            f"{' and '.join(on)} would change the inputs, and the teacher's cached outputs are those of the unchanged ones; set "
            f"{'it' if len(on) == 1 else 'them'} to 0{meant}"
        )
    if split.tokens and augment.works:
        raise ValueError(f"{' and '.join(on)} cannot change token ids; set {'it' if len(on) == 1 else 'them'} to 0")
    images = split.inputs.ndim == 4
    for name in ("flip", "cutmix"):
        if getattr(augment, name) and not images:
            raise ValueError(
                f"{name} is {getattr(augment, name):g} for inputs {list(split.inputs.shape[1:])}; expected images [H, W, C]"
            )
    for name in ("shift", "crop"):
        pixels = getattr(augment, name)
        if pixels and (not images or pixels >= min(split.inputs.shape[1:3])):
            raise ValueError(
                f"{name} is {pixels} for inputs {list(split.inputs.shape[1:])}; expected images [H, W, C] larger than the {name}"
            )
    if augment.mixes and not mixable:
        name = "mixup" if augment.mixup else "cutmix"
        raise ValueError(
            f"{name} gives each example two targets, and {loss} takes one class only; set {name} to 0 or use cross-entropy"
        )


def apply(batch: dict[str, np.ndarray], augment: Augment, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A batch with the changes that the generator draws.

    Args:
        batch: {"inputs": float32 [B, ...], "targets": int32 [B], ...}; its inputs may be overwritten.
        augment: the changes.
        rng: where they are drawn from.

    Returns:
        The batch with new inputs. Mixup and CutMix add "targets_b" int32 [B], the partner's class, and "mix" float32 [B], the
        weight of `targets` beside it; weights and ids stay those of the example that gave `targets`.
    """
    inputs, count = batch["inputs"], len(batch["inputs"])
    if room := augment.shift or augment.crop:
        move = rng.integers(0, 2 * room + 1, (2, count))
        if augment.shift:
            move = np.where(rng.random(count) >= augment.shifted, room, move)
        inputs = _moved(inputs, move, room)
    if augment.flip:
        mirrored = np.flatnonzero(rng.random(count) < augment.flip)
        inputs[mirrored] = inputs[mirrored].take(np.arange(inputs.shape[2])[::-1], axis=2)  # twice as fast as a slice
    if augment.mixes:
        partner = rng.permutation(count)
        takes_mixup = bool(augment.mixup) and (not augment.cutmix or rng.random() < 0.5)
        inputs, mix = (_mixup if takes_mixup else _cutmix)(inputs, inputs[partner], augment, rng)
        batch = {**batch, "targets_b": batch["targets"][partner], "mix": mix}
    if augment.noise:
        inputs = inputs + augment.noise * rng.standard_normal(inputs.shape, np.float32)
    return {**batch, "inputs": inputs}


def _moved(images: np.ndarray, corner: np.ndarray, room: int) -> np.ndarray:
    """Crops of the images' own size out of images padded by `room`: corner (y, x) moves one by (room - y, room - x) pixels."""
    count, height, width, channels = images.shape
    padded = np.zeros((count, height + 2 * room, width + 2 * room, channels), images.dtype)
    padded[:, room : room + height, room : room + width] = images
    image, row, column, _ = padded.strides
    # A view [B, 2 room + 1, 2 room + 1, height, width * channels]: all the windows of each image.
    shape = (count, 2 * room + 1, 2 * room + 1, height, width * channels)
    strides = (image, row, column, row, padded.itemsize)
    windows = np.lib.stride_tricks.as_strided(padded, shape, strides, writeable=False)
    return windows[np.arange(count), corner[0], corner[1]].reshape(images.shape)


def _mixup(inputs: np.ndarray, others: np.ndarray, augment: Augment, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """mix * inputs + (1 - mix) * others, a weight each (Zhang et al. 2018, equation 1)."""
    mix = rng.beta(augment.mixup, augment.mixup, len(inputs)).astype(np.float32)
    others -= inputs
    others *= (1 - mix).reshape(-1, *(1,) * (inputs.ndim - 1))
    return np.add(inputs, others, out=others), mix


def _cutmix(images: np.ndarray, others: np.ndarray, augment: Augment, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A box of about 1 - Beta of each image from its partner (Yun et al. 2019, section 3.1); mix is the share that stays."""
    count, height, width = images.shape[:3]
    side = np.sqrt(1 - rng.beta(augment.cutmix, augment.cutmix, count))

    def inside(size: int) -> np.ndarray:
        """[B, size]: which rows or columns are in the box, whose centre lies anywhere and whose ends may lie outside."""
        half, centre = (side * size).astype(np.int64) // 2, rng.integers(0, size, count)
        place = np.arange(size)
        return (place >= (centre - half)[:, None]) & (place < (centre + half)[:, None])

    box = inside(height)[:, :, None] & inside(width)[:, None, :]
    mix = 1 - box.mean((1, 2), dtype=np.float32)
    return np.where(box[..., None], others, images), mix
