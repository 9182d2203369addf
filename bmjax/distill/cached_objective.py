"""What a student is trained on where its teacher's outputs are cached."""

from __future__ import annotations

from bmjax.data import RecordLayout
from bmjax.distill.cached import HEAD_LOSSES, LOSSES
from bmjax.distill.objective import Distill
from bmjax.losses import Schedule, on_cached, on_cached_head
from bmjax.types import LossTerm


def cached_terms(
    settings: Distill, task: LossTerm, layout: RecordLayout, steps: int | None = None
) -> dict[str, tuple[float | Schedule, LossTerm]]:
    """`settings.terms(task, steps)` with the loss on the outputs taken from a cache: {name: (weight, term)}.

    Args:
        settings: what is learned from the teacher.
        task: the loss against the labels.
        layout: the cache's.
        steps: of the run.

    Raises:
        ValueError: the objective needs what no cache holds: features, all logits, fewer classes than were cached, or a
            temperature whose tail is not stored.
    """
    terms = settings.terms(task, steps)
    if "hint" in terms:
        raise ValueError("hint_weight is above 0, and a cache holds the teacher's outputs, no features; set it to 0")
    if settings.loss not in terms:
        return terms
    if settings.loss not in LOSSES:
        raise ValueError(
            f"the loss {settings.loss} needs all of the teacher's logits, and a cache holds the largest; take {', '.join(LOSSES)}"
        )
    if settings.temperature_end is not None:
        raise ValueError("temperature_end changes the temperature at every step, and a cache holds a few; leave it out")
    weight = terms[settings.loss][0]
    if settings.vocabulary not in (None, layout.vocabulary):
        raise ValueError(
            f"distill.vocabulary is {settings.vocabulary} and the cached outputs are of {layout.vocabulary} classes, which "
            "cannot be taken apart again; leave it out"
        )
    maker, fn = (on_cached_head, HEAD_LOSSES[settings.loss]) if settings.chunked else (on_cached, LOSSES[settings.loss])
    term = maker(fn, layout, temperature=settings.temperature)
    return {**terms, settings.loss: (weight, term)}
