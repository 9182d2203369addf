"""Every distillation loss as the terms of an objective, with the weights that the docstrings name.

Losses on logits share the objective with the labels, the others stand beside the whole task loss. `dkd` is warmed up over the
paper's 20 epochs, however long the run is.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Pair(NamedTuple):
    """What a loss may look at of a student and its teacher.

    Attributes:
        stages: {student's map: teacher's}, stage by stage or layer by layer.
        final: {student's last feature: teacher's}.
        attention: {student's layer: teacher's}, prefixes such as "layers/1/attention".
        examples: ids of the training split, for a memory bank.
        batch: examples a step, which a paper's weight may be counted in.
    """

    stages: Mapping[str, str]
    final: Mapping[str, str]
    attention: Mapping[str, str]
    examples: Any
    batch: int


def terms(name: str, pair: Pair) -> dict[str, tuple[float, Any]]:
    """The objective of a loss, or of the labels "alone"."""
    from bmjax import losses

    task = losses.cross_entropy_term()
    if name == "alone":
        return {"ce": (1.0, task)}
    share, make = LOSSES[name]
    return {"ce": (1.0 - share, task), name: (1.0, make(pair))}


def _logits(name: str, weight: float, **kw: Any) -> Callable[[Pair], Any]:
    def make(pair: Pair) -> Any:
        from bmjax import distill, losses

        return losses.on_logits(getattr(distill, name), weight, **kw)

    return make


def _stages(name: str, weight: float, *, only: slice = slice(None), **kw: Any) -> Callable[[Pair], Any]:
    """On the map of each stage, or of some."""

    def make(pair: Pair) -> Any:
        from bmjax import distill, losses

        layers = dict(list(pair.stages.items())[only])
        trained = {argument: getattr(distill, init) for argument, init in kw.get("trained", {}).items()}
        return losses.on_features(getattr(distill, name), layers, weight=weight, **{**kw, "trained": trained})

    return make


def _final(name: str, weight: float, **kw: Any) -> Callable[[Pair], Any]:
    def make(pair: Pair) -> Any:
        from bmjax import distill, losses

        return losses.on_features(getattr(distill, name), pair.final, weight=weight, **kw)

    return make


def _attention(name: str, weight: float, part: str, *, last: bool) -> Callable[[Pair], Any]:
    def make(pair: Pair) -> Any:
        from bmjax import distill, losses

        pairs = list(pair.attention.items())[-1:] if last else pair.attention.items()
        layers = {f"{mine}/{part}": f"{theirs}/{part}" for mine, theirs in pairs}
        return losses.on_features(getattr(distill, name), layers, weight=weight)

    return make


def _crd(pair: Pair) -> Any:
    from bmjax import distill

    (mine, theirs), *_ = pair.final.items()
    return distill.crd_term(mine, theirs, examples=pair.examples, weight=0.8)


def _correlation(pair: Pair) -> Any:
    return _final("correlation", 0.02 * pair.batch**2)(pair)


def _dkd(pair: Pair) -> Any:
    import optax

    from bmjax import distill, losses

    warmup = optax.linear_schedule(0.0, 1.0, max(20 * pair.examples // pair.batch, 1))  # the paper's 20 epochs
    return losses.on_logits(distill.dkd, warmup)


# {name: (share of the labels' loss that it takes, what makes the term)}
ON_LOGITS: dict[str, tuple[float, Callable[[Pair], Any]]] = {
    "kd": (0.9, _logits("kd", 0.9, temperature=4.0)),
    "soft_cross_entropy": (0.9, _logits("soft_cross_entropy", 0.9, temperature=4.0)),
    "reverse_kl": (0.9, _logits("reverse_kl", 0.9, temperature=4.0)),
    "jsd": (0.9, _logits("jsd", 0.9, temperature=4.0)),
    "skew_kl": (0.9, _logits("skew_kl", 0.9, temperature=4.0)),
    "skew_reverse_kl": (0.9, _logits("skew_reverse_kl", 0.9, temperature=4.0)),
    "tvd": (0.5, _logits("tvd", 1.0)),
    "dkd": (0.0, _dkd),
    "dist": (0.0, _logits("dist", 1.0, beta=2.0, gamma=2.0, temperature=4.0)),
    "logit_standardized_kd": (0.9, _logits("logit_standardized_kd", 9.0)),
    "label_smoothing_teacher": (0.1, _logits("label_smoothing_teacher", 0.1)),
}
ON_VECTORS: dict[str, tuple[float, Callable[[Pair], Any]]] = {
    "cosine": (0.0, _final("cosine", 1.0, project="linear")),
    "similarity": (0.0, _final("similarity", 3000.0)),
    "correlation": (0.0, _correlation),
    "rkd": (0.0, _final("rkd", 1.0)),
    "pkt": (0.0, _final("pkt", 30000.0)),
    "crd": (0.0, _crd),
}
ON_MAPS: dict[str, tuple[float, Callable[[Pair], Any]]] = {
    "hint": (0.0, _stages("hint", 1.0, project="linear")),
    "attention_transfer": (0.0, _stages("attention_transfer", 1000.0)),
    "factor_transfer": (0.0, _stages("factor_transfer", 200.0)),
    "nst": (0.0, _stages("nst", 50.0)),
    "fsp": (0.0, _stages("fsp", 50.0, only=slice(2), project="auto", together=True)),
    "vid": (0.0, _stages("vid", 1.0, project="linear", trained={"log_variance": "vid_variance"})),
    "activation_boundary": (0.0, _stages("activation_boundary", 1.0, only=slice(-1, None), project="linear")),
    "review_kd": (0.0, _stages("review_kd", 1.0, together=True, trained={"fusion": "review_fusion"})),
}
ON_TRANSFORMERS: dict[str, tuple[float, Callable[[Pair], Any]]] = {
    "attention_relation": (0.0, _attention("attention_relation", 1.0, "scores", last=True)),
    "value_relation": (0.0, _attention("value_relation", 1.0, "value", last=True)),
    "attention_scores": (0.0, _attention("attention_scores", 1.0, "scores", last=False)),
    "hidden_states": (0.0, _stages("hidden_states", 1.0, project="linear")),
}
LOSSES = {**ON_LOGITS, **ON_VECTORS, **ON_MAPS, **ON_TRANSFORMERS}
