"""What a student is trained on: the task and the teacher, weighted."""

from __future__ import annotations

import dataclasses

from bmjax.config import above, at_least, field, within
from bmjax.distill.decoupled import dkd
from bmjax.distill.divergences import jsd, reverse_kl, skew_kl, skew_reverse_kl, tvd
from bmjax.distill.features import hint
from bmjax.distill.logits import kd, logit_standardized_kd, soft_cross_entropy
from bmjax.distill.relations import dist
from bmjax.losses import on_features, on_logits
from bmjax.types import LossTerm

_ON_LOGITS = (kd, dkd, logit_standardized_kd, dist, soft_cross_entropy, reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd)
LOSSES = {fn.__name__: fn for fn in _ON_LOGITS}


@dataclasses.dataclass
class Distill:
    """Config of a distilled objective: (1 - share) task + share kd + hint_weight hint."""

    share: float = field(0.9, "weight of the teacher's softened outputs; the task has the rest", check=within(0, 1))
    temperature: float = field(2.0, "softens both distributions; the loss is multiplied by its square (not tvd)", check=above(0))
    hint_weight: float = field(0.0, "weight of matching a hidden feature through a learned projector", check=at_least(0))
    student_feature: str = field("final", "the student's feature for the hint")
    teacher_feature: str = field("final", "the teacher's feature for the hint")
    loss: str = field("kd", "the loss on the outputs, and its name in the metrics", choices=tuple(LOSSES))

    def terms(self, task: LossTerm) -> dict[str, tuple[float, LossTerm]]:
        """{name: (weight, term)} of every part that has weight."""
        parts: dict[str, tuple[float, LossTerm]] = {
            "ce": (1 - self.share, task),
            self.loss: (self.share, on_logits(LOSSES[self.loss], temperature=self.temperature)),
            "hint": (self.hint_weight, on_features(hint, {self.student_feature: self.teacher_feature}, project="linear")),
        }
        return {name: part for name, part in parts.items() if part[0] > 0}
