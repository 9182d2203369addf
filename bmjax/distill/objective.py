"""What a student is trained on: the task and the teacher, weighted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bmjax import losses
from bmjax.config import above, at_least, field, within
from bmjax.data import Dataset
from bmjax.distill import layer_map, vocabulary
from bmjax.distill.consistency import consistency
from bmjax.distill.decoupled import dkd
from bmjax.distill.divergences import jsd, reverse_kl, skew_kl, skew_reverse_kl, tvd
from bmjax.distill.features import hint
from bmjax.distill.logits import kd, logit_standardized_kd, soft_cross_entropy
from bmjax.distill.relations import dist
from bmjax.losses import Schedule, on_features, on_head, on_logits
from bmjax.types import LossTerm

_KL = (kd, dkd, logit_standardized_kd, soft_cross_entropy, reverse_kl, jsd, skew_kl, skew_reverse_kl)
LOSSES = {fn.__name__: fn for fn in (*_KL, dist, tvd, consistency)}


@dataclasses.dataclass
class Distill:
    """Config of a distilled objective: (1 - share) task + share kd + hint_weight hint.

    Each number with an `_end` goes there over the run, from the first step to exactly the last.
    """

    share: float = field(0.9, "weight of the teacher's softened outputs; the task has the rest", check=within(0, 1))
    temperature: float = field(2.0, "softens both distributions; most losses are multiplied by its square", check=above(0))
    hint_weight: float = field(0.0, "weight of matching a hidden feature through a learned projector", check=at_least(0))
    student_feature: str = field("final", "the student's feature for the hint")
    teacher_feature: str = field("final", "the teacher's feature for the hint")
    layers: str = field(
        "",
        "the hint's pairs of layers: uniform, last, auto (most alike on a batch), or a stride as 2i+1; empty: the two features",
    )
    part: str = field("", "with layers: what of each one, as in mlp; empty is its end")
    loss: str = field("kd", "the loss on the outputs, and its name in the metrics", choices=tuple(LOSSES))
    share_end: float | None = field(None, "share at the last step; none keeps it", check=within(0, 1))
    temperature_end: float | None = field(None, "temperature at the last step; none keeps it", check=above(0))
    hint_weight_end: float | None = field(None, "hint_weight at the last step; none keeps it", check=at_least(0))
    chunked: bool = field(
        False, "the loss on the outputs, and the task's, are fused with the last layers: whole logits never exist"
    )
    vocabulary: int | None = field(None, "classes from this one on are padding of one network, and left out", check=above(0))
    schedule: str = field("linear", "how share, temperature and hint_weight go to their ends", choices=losses.schedules.KINDS)

    def validate(self) -> None:
        """Raises ValueError if `layers` is no map, there is no chunked form of the loss, or a setting would do nothing."""
        if self.chunked and not hasattr(vocabulary, self.loss):
            there = ", ".join(name for name in LOSSES if hasattr(vocabulary, name))
            raise ValueError(f"there is no chunked form of {self.loss}; set chunked to False, or take one of {there}")
        if self.layers not in ("", "auto"):
            layer_map.from_text(self.layers, self.part)
        if self.layers and not self.hints:
            raise ValueError(f"layers is {self.layers}, and hint_weight 0 takes none; give a hint_weight, or leave layers out")
        if self.layers and (self.student_feature, self.teacher_feature) != ("final", "final"):
            raise ValueError(f"layers is {self.layers}, which names the features; leave student_feature and teacher_feature out")
        if self.part and not self.layers:
            raise ValueError(f"part is {self.part}, which is of layers; give layers, such as uniform, or leave part out")
        if self.schedule != "linear" and not self.scheduled:
            raise ValueError(
                f"schedule is {self.schedule}, and nothing goes to an end; give share_end, temperature_end or hint_weight_end"
            )

    def check_classes(self, dataset: Dataset) -> None:
        """Raises ValueError if `vocabulary` leaves out some of the data's classes; of token ids some may be padding."""
        if self.vocabulary is not None and dataset.kind == "classes" and self.vocabulary < dataset.classes:
            raise ValueError(
                f"distill.vocabulary is {self.vocabulary}, and the data have {dataset.classes} classes, of which none is "
                f"padding; give {dataset.classes} or more, or leave it out"
            )

    @property
    def hints(self) -> bool:
        """Whether features are matched at some step."""
        return self.hint_weight > 0 or (self.hint_weight_end or 0) > 0

    @property
    def teaches(self) -> bool:
        """Whether anything is learned from the teacher at some step."""
        return self.hints or self.share > 0 or (self.share_end or 0) > 0

    @property
    def seeks(self) -> bool:
        """Whether the layers are those most alike on a batch, which `layer_map.auto` is to find first."""
        return self.layers == "auto" and self.hints

    @property
    def scheduled(self) -> bool:
        """Whether something changes over the run."""
        return any(end is not None for end in (self.share_end, self.temperature_end, self.hint_weight_end))

    def terms(
        self, task: LossTerm, steps: int | None = None, found: Mapping[str, str] | None = None
    ) -> dict[str, tuple[float | Schedule, LossTerm]]:
        """{name: (weight, term)} of every part that has weight.

        Args:
            task: the loss against the labels.
            steps: of the run; needed only where something is `scheduled`.
            found: with layers=auto, what `layer_map.auto` found; without it the layers are spread uniformly, and are as many.

        Raises:
            ValueError: something is scheduled, and the steps are not given.
        """
        if self.scheduled and steps is None:
            raise ValueError("the objective changes over the run; give terms(task, steps) the run's number of steps")
        temperature = self._over(self.temperature, self.temperature_end, steps)
        maker, fn = (on_head, getattr(vocabulary, self.loss)) if self.chunked else (on_logits, LOSSES[self.loss])
        on_outputs = maker(fn, vocabulary=self.vocabulary, temperature=temperature)
        pairs: Any = {self.student_feature: self.teacher_feature}
        if self.layers:
            pairs = found or layer_map.from_text("uniform" if self.layers == "auto" else self.layers, self.part)
        on_hidden = on_features(hint, pairs, project="linear")
        task_end = None if self.share_end is None else 1 - self.share_end
        parts: dict[str, tuple[float, float | None, LossTerm]] = {
            "ce": (1 - self.share, task_end, task),
            self.loss: (self.share, self.share_end, on_outputs),
            "hint": (self.hint_weight, self.hint_weight_end, on_hidden),
        }
        return {name: (self._over(at, end, steps), term) for name, (at, end, term) in parts.items() if at > 0 or (end or 0) > 0}

    def _over(self, begin: float, end: float | None, steps: int | None) -> float | Schedule:
        return begin if end is None or steps is None else losses.ramp(begin, end, steps, self.schedule)
