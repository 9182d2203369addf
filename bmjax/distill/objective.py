"""What a student is trained on: the task and the teacher, weighted."""

from __future__ import annotations

import dataclasses

from bmjax.config import above, at_least, field, within
from bmjax.distill.features import hint
from bmjax.distill.logits import kd
from bmjax.types import LossTerm


@dataclasses.dataclass
class Distill:
    """Config of a distilled objective: (1 - share) task + share kd + hint_weight hint."""

    share: float = field(0.9, "weight of the teacher's softened outputs; the task has the rest", check=within(0, 1))
    temperature: float = field(2.0, "softens both distributions; the loss is multiplied by its square", check=above(0))
    hint_weight: float = field(0.0, "weight of matching a hidden feature through a learned projector", check=at_least(0))
    student_feature: str = field("final", "the student's feature for the hint")
    teacher_feature: str = field("final", "the teacher's feature for the hint")

    def terms(self, task: LossTerm) -> dict[str, tuple[float, LossTerm]]:
        """{name: (weight, term)} of every part that has weight."""
        parts: dict[str, tuple[float, LossTerm]] = {
            "ce": (1 - self.share, task),
            "kd": (self.share, kd(self.temperature)),
            "hint": (self.hint_weight, hint(self.student_feature, self.teacher_feature)),
        }
        return {name: part for name, part in parts.items() if part[0] > 0}
