"""The figures of the main job, as the report takes them."""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bmjax import measure, trees
from bmjax.jobs import common
from bmjax.jobs.common import Net
from bmjax.jobs.search import Analysis, Candidate
from bmjax.train import log
from bmjax.train.run import Bench, predictor
from bmjax.train.throughput import MACHINE

ABOUT = {
    "big": "the original",
    "small": "pruned, compacted, distilled",
    "from scratch": "the small architecture on labels alone, equal compute",
    "without teacher": "the pruned model retrained on labels alone, equal compute",
}


def gather(
    bench: Bench,
    nets: Mapping[str, Net],
    tried: Sequence[Candidate],
    analysis: Analysis,
    *,
    max_drop: float,
    level: float,
    latency: Mapping[str, int],
) -> dict[str, Any]:
    """All that is measured at the end: the test split once for every network, the verdict, and the costs.

    Args:
        bench: where.
        nets: {"big", "small", "from scratch", "without teacher"}, or the big one alone when nothing held.
        tried: the candidates.
        analysis: what could be removed.
        max_drop, level: of the verdict.
        latency: {"batch", "repeats"}.
    """
    found = {name: common.evaluate(bench, net, bench.dataset.test, nets["big"]) for name, net in nets.items()}
    times = _latency(bench, nets, **latency)
    models = []
    for name, net in nets.items():
        cost = {"parameters": trees.size(net.params), "bytes": trees.nbytes(net.params), "flops": common.flops(bench, net)}
        spent = {"train_steps": net.steps, "train_flops": net.flops, "latency": times[name]}
        models.append({"name": name, "about": ABOUT[name], **common.scores(found[name]), **cost, **spent})
    chosen = next((candidate for candidate in reversed(tried) if candidate.holds), None)
    return {
        "verdict": _verdict(found, tried, max_drop, level),
        "models": models,
        "candidates": [_candidate(candidate, found_big(bench, nets), candidate is chosen) for candidate in tried],
        "structure": None if chosen is None else structure(analysis, chosen.keeps),
        "curves": _curves(bench.directory),
        "class_names": list(bench.dataset.class_names),
        "environment": common.environment(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "notes": [f"{name} was left whole: {why}" for name, why in analysis.left_out.items()],
    }


def _curves(directory: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """What was logged of training, without what depends on the machine: the same run has the same results."""
    rows = log.read(directory)
    return {name: [{key: row[key] for key in row if key not in MACHINE} for row in part] for name, part in rows.items()}


def found_big(bench: Bench, nets: Mapping[str, Net]) -> float:
    """The big model's accuracy on the validation split."""
    return common.evaluate(bench, nets["big"], bench.dataset.valid).summary["accuracy"]


def _verdict(found: Mapping[str, Any], tried: Sequence[Candidate], max_drop: float, level: float) -> dict[str, Any]:
    if "small" not in found:
        why = "no candidate held on the validation split" if tried else "no sizes of this model reach a ratio that was asked for"
        return {"verdict": "nothing passed", "sentence": why, "margin": max_drop}
    verdict = measure.non_inferiority(found["big"].correct, found["small"].correct, max_drop, level)
    fields = verdict._asdict()
    return {**fields, "big_only": fields.pop("b"), "small_only": fields.pop("c"), "sentence": verdict.sentence}


def _latency(bench: Bench, nets: Mapping[str, Net], batch: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of one forward pass on one device, the networks timed in turn."""
    inputs = np.resize(bench.dataset.test.take(slice(batch))["inputs"], (batch, *bench.dataset.shape))
    device = jax.devices()[0]

    def call(net: Net) -> Any:
        placed = jax.device_put((jax.device_get(net.params), net.model_state, {"inputs": inputs}), device)
        forward = predictor(net.model)
        return lambda: forward(*placed)

    timed = measure.interleaved({name: call(net) for name, net in nets.items()}, repeats=repeats)
    return {name: {"batch": batch, **figures} for name, figures in timed.items()}


def _candidate(candidate: Candidate, reference: float, chosen: bool) -> dict[str, Any]:
    return {
        "sizes": candidate.proposal.sizes,
        "parameters": candidate.proposal.parameters,
        "valid_accuracy": candidate.accuracy,
        "valid_drop": reference - candidate.accuracy,
        "holds": candidate.holds,
        "chosen": chosen,
    }


def structure(analysis: Analysis, keeps: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What was removed where: every layer with its parts, and what all layers share."""
    groups = {group.name: group for group in analysis.groups}
    layers = keeps.get("layers", np.zeros(0, bool))
    parts = {name: keep for name, keep in keeps.items() if groups[name].stack}
    return {
        "sizes_before": {name: group.size for name, group in groups.items()},
        "sizes_after": {name: int(np.max(np.sum(keep, axis=-1))) for name, keep in keeps.items()},
        "layers": [
            {
                "index": i,
                "kept": bool(kept),
                "importance": float(analysis.importance[i]),
                "parts": {name: {"kept": keep[i].tolist()} for name, keep in parts.items()},
            }
            for i, kept in enumerate(layers)
        ],
        "shared": {name: {"kept": keep.tolist()} for name, keep in keeps.items() if name not in parts and name != "layers"},
    }
