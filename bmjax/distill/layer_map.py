"""Which layer of the student learns from which of the teacher, declared as data.

A map is `(the student's feature names, the teacher's) -> {student's: teacher's}`. `losses.on_features` takes one in the place of
a dict, and it is resolved where both models are known, before anything runs; a function of your own will do as well. The layers
of a part are the features whose names differ in one number, in its order: "layers/0/mlp", "layers/1/mlp", ...
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.losses.features import feature_names, nearest
from bmjax.measure import linear_cka
from bmjax.types import Batch, Model, Params

Names = Sequence[str]

_NUMBER = re.compile(r"\d+")


class Uniform(NamedTuple):
    """Student layer i learns from teacher layer round((i + 1) Lt / Ls) - 1, halves up: evenly spread, and last from last.

    This is the uniform strategy of Jiao et al. 2020 (TinyBERT), for depths of which one need not divide the other.

    Attributes:
        part: what of each layer, as "mlp" or "attention/scores"; "" is its end.
        teacher_part: the same in the teacher, where it is called otherwise; None for `part`.
    """

    part: str = ""
    teacher_part: str | None = None

    def __call__(self, student: Names, teacher: Names) -> dict[str, str]:
        """The pairs. Raises ValueError if a model has no such layers."""
        mine, theirs = _both(self, student, teacher)
        place = lambda i: max((2 * (i + 1) * len(theirs) + len(mine)) // (2 * len(mine)), 1) - 1
        return {name: theirs[place(i)] for i, name in enumerate(mine)}


class Last(NamedTuple):
    """The student's last layer learns from the teacher's last, as in MiniLM (Wang et al. 2020).

    Attributes:
        part, teacher_part: as in `Uniform`.
    """

    part: str = ""
    teacher_part: str | None = None

    def __call__(self, student: Names, teacher: Names) -> dict[str, str]:
        """The pair. Raises ValueError if a model has no such layers."""
        mine, theirs = _both(self, student, teacher)
        return {mine[-1]: theirs[-1]}


class Stride(NamedTuple):
    """Every feature of the student that a regex matches learns from the teacher's of number step * i + offset.

    `Stride(r"layers/(\\d+)/mlp", step=2, offset=1)` pairs layers 0, 1, 2 with 1, 3, 5.

    Attributes:
        pattern: regex over a whole name; its first group is the number i.
        step, offset: of the teacher's number.
        teacher: the teacher's name with "{}" for the number; "" for the student's own with another number.
    """

    pattern: str
    step: int = 1
    offset: int = 0
    teacher: str = ""

    def __call__(self, student: Names, teacher: Names) -> dict[str, str]:
        """The pairs.

        Raises:
            ValueError: the pattern is no regex with a group for a number or matches nothing, or the teacher has no such feature.
        """
        try:
            found = [match for match in (re.fullmatch(self.pattern, name) for name in student) if match]
        except re.error as error:
            raise ValueError(f"the layer pattern {self.pattern!r} is no regex: {error}") from None
        if not found:
            raise ValueError(
                f"the layer pattern {self.pattern!r} matches none of the student's features; {nearest(self.pattern, student)}"
            )
        pairs = {}
        for match in found:
            if not match.groups() or not _NUMBER.fullmatch(match[1] or ""):
                raise ValueError(
                    f"the first group of the layer pattern {self.pattern!r} must be a number, as in layers/(\\d+)/mlp"
                )
            number = self.step * int(match[1]) + self.offset
            begin, end = match.span(1)
            name = self.teacher.replace("{}", str(number)) if self.teacher else f"{match[0][:begin]}{number}{match[0][end:]}"
            if name not in teacher:
                raise ValueError(f"{match[0]} would learn from {name}, which the teacher has not; {nearest(name, teacher)}")
            pairs[match[0]] = name
        return pairs


def uniform(part: str = "", teacher_part: str | None = None) -> Uniform:
    """See `Uniform`."""
    return Uniform(part, teacher_part)


def last(part: str = "", teacher_part: str | None = None) -> Last:
    """See `Last`."""
    return Last(part, teacher_part)


def stride(pattern: str, step: int = 1, offset: int = 0, teacher: str = "") -> Stride:
    """See `Stride`. Raises ValueError on a step below 1."""
    if step < 1:
        raise ValueError(f"the layer map's step is {step}; expected 1 or more")
    return Stride(pattern, step, offset, teacher)


_STRIDE = re.compile(r"(\d*)i([+-]\d+)?")


def from_text(text: str, part: str = "") -> Uniform | Last | Stride:
    """The map that a flag names: "uniform", "last", or a stride as "2i+1": student layer i learns from teacher layer 2i + 1.

    Args:
        text: which.
        part: what of each layer, as in `Uniform`.

    Raises:
        ValueError: it is none of these.
    """
    if text in ("uniform", "last"):
        return Uniform(part) if text == "uniform" else Last(part)
    match = _STRIDE.fullmatch(text.replace(" ", "").replace("*", ""))
    if not match:
        raise ValueError(f"layers is {text!r}; expected uniform, last, auto, or a stride such as 2i+1")
    pattern = rf"(?:.*/)?\D*?(\d+){re.escape(f'/{part}' if part else '')}"
    return stride(pattern, int(match[1] or 1), int(match[2] or 0))


def layers(names: Names, part: str = "", whose: str = "the model") -> tuple[str, ...]:
    """The features that are this part of each layer, by number: ("layers/0/mlp", "layers/1/mlp", ...) for "mlp".

    A layer's name is any path that ends in a number, such as "layers/3", "blocks/3" or "stages/0/blocks/3".

    Args:
        names: of all features.
        part: what follows the number; "" for the layer's end.
        whose: for the message.

    Raises:
        ValueError: there is none (lists the nearest names).
    """
    suffix = f"/{part}" if part else ""
    found = [match for match in (re.fullmatch(rf"(?:.*/)?\D*?(\d+){re.escape(suffix)}", name) for name in names) if match]
    if not found:
        raise ValueError(f"{whose} has no layers with a part {part!r}; {nearest(f'layers/0{suffix}', names)}")
    members = {match[0].split("/")[0] for match in found if match[0][0].isdigit()}
    if len(members) > 1:
        raise ValueError(
            f"{whose} is {len(members)} networks; name the layers as {{student's: teacher's}}, as in {found[0][0]!r}"
        )
    return tuple(match[0] for match in sorted(found, key=lambda match: [int(n) for n in _NUMBER.findall(match[0])]))


def auto(
    student: Model,
    teacher: Model,
    params: Params,
    frozen: Mapping[str, Params],
    batch: Batch,
    *,
    model_state: Params | None = None,
    part: str = "",
    teacher_part: str | None = None,
) -> dict[str, str]:
    """The pairs of layers that see a batch most alike, decided once: the monotone map of the largest summed linear CKA.

    No two pairs cross, and where the teacher is at least as deep no two students' layers share a teacher's.

    Args:
        student, teacher: the models; their widths and depths may differ.
        params, model_state: of the student.
        frozen: {"params", "model_state"} of the teacher.
        batch: a batch that both see; examples of weight 0 do not count. Positions are examples where both networks have as many,
            otherwise each example's are averaged.
        part, teacher_part: as in `Uniform`.

    Returns:
        {student's feature: teacher's}, one for each layer of the student, for `losses.on_features`.

    Raises:
        ValueError: a model has no such layers, or does not say which features it has.
    """
    mine = layers(feature_names(student, "the student"), part, "the student")
    theirs = layers(feature_names(teacher, "the teacher"), part if teacher_part is None else teacher_part, "the teacher")
    likeness = _likeness(student, teacher, mine, theirs, params, model_state or {}, dict(frozen), dict(batch))
    return {mine[i]: theirs[j] for i, j in enumerate(monotone(np.asarray(likeness)))}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _likeness(
    student: Model,
    teacher: Model,
    mine: tuple[str, ...],
    theirs: tuple[str, ...],
    params: Params,
    model_state: Params,
    frozen: dict[str, Params],
    batch: dict[str, Any],
) -> jax.Array:
    """[Ls, Lt]: linear CKA of all pairs of layers."""
    s = student.apply(params, model_state, batch, capture=mine)[0].features
    t = teacher.apply(frozen["params"], frozen["model_state"], batch, capture=theirs)[0].features
    weights = jnp.ones(len(batch["inputs"])) if batch.get("weights") is None else batch["weights"]
    return jnp.stack([jnp.stack([_cka(s[a], t[b], weights) for b in theirs]) for a in mine])


def _cka(s: jax.Array, t: jax.Array, weights: jax.Array) -> jax.Array:
    counts = jnp.broadcast_to(weights.reshape(weights.shape + (1,) * (s.ndim - 1 - weights.ndim)), s.shape[:-1])
    if s.shape[:-1] != t.shape[:-1]:
        s, t = (x.reshape(len(x), -1, x.shape[-1]).mean(1) for x in (s, t))
        counts = weights.reshape(len(weights), -1).mean(1)
    return linear_cka(s.reshape(-1, s.shape[-1]), t.reshape(-1, t.shape[-1]), counts.reshape(-1))


def monotone(scores: np.ndarray) -> list[int]:
    """For each row a column, so that their scores add up to the most and columns never go back; of equals, the first.

    Columns are all different where there are at least as many as rows. Dynamic programming over both, O(rows columns).

    Args:
        scores: [rows, columns] float.
    """
    rows, columns = scores.shape
    apart = 1 if columns >= rows else 0
    best = np.full((rows, columns), -np.inf)  # the best sum of rows up to i whose last column is j
    best[0] = scores[0]
    for i in range(1, rows):
        before = np.maximum.accumulate(best[i - 1])
        best[i, apart:] = scores[i, apart:] + before[: columns - apart]
    chosen, end = [], columns
    for i in reversed(range(rows)):
        chosen.append(int(np.argmax(best[i, :end])))
        end = chosen[-1] + 1 - apart
    return chosen[::-1]


def _both(which: Uniform | Last, student: Names, teacher: Names) -> tuple[tuple[str, ...], tuple[str, ...]]:
    part = which.part if which.teacher_part is None else which.teacher_part
    return layers(student, which.part, "the student"), layers(teacher, part, "the teacher")
