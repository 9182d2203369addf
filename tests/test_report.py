"""The page, the table and the Markdown: figures against the fixtures' own, HTML against the standard parser."""

from __future__ import annotations

import copy
import html.parser
import json

import numpy as np
import pytest
import rich.console

from bmjax import report
from bmjax.report import axes, numbers, pictures
from bmjax.report.markup import Markup, tag

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Balanced(html.parser.HTMLParser):
    """Collects elements and text; fails where an end tag does not match."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open and self.open[-1] == name, f"</{name}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "title"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def confusion(errors: int, seed: int, classes: int = 10, n: int = 719) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    counts = np.diag(np.full(classes, n // classes) + (np.arange(classes) < n % classes))
    for _ in range(errors):
        i, j = rng.choice(classes, 2, replace=False)
        counts[i, i] -= 1
        counts[i, j] += 1
    return counts.tolist()


def entry(name, about, accuracy, interval, parameters, flops, median, errors, seed, agreement=None, steps=900):
    average = {"macro": accuracy - 0.0002, "micro": accuracy, "weighted": accuracy}
    quality = {"accuracy": accuracy, "precision": average, "recall": average, "f1": average, "nll": 0.0812, "ece": 0.0123}
    return {
        "name": name,
        "about": about,
        "metrics": {**quality, "teacher_agreement": agreement, "confusion": confusion(errors, seed), "count": 719},
        "accuracy_interval": interval,
        "parameters": parameters,
        "bytes": 4 * parameters,
        "flops": flops,
        "latency": {"batch": 256, "median_ms": median, "low_ms": 0.9 * median, "high_ms": 1.2 * median},
        "train_steps": steps,
        "train_flops": 3 * 256 * steps * flops,
    }


def training(seed, steps=900, start=2.3, end=0.03, accuracy=0.985, first=0.12):
    rng, rows = np.random.default_rng(seed), []
    for i, step in enumerate(range(10, steps + 1, 10)):
        left = np.exp(-6 * step / steps)
        loss = (end + (start - end) * left) * np.exp(0.1 * rng.normal())
        reached = accuracy - (accuracy - first) * left**2
        row = {"step": step, "loss": loss, "accuracy": min(1.0, reached + 0.012 * rng.normal())}
        rows.append(row | ({"valid_accuracy": reached - 0.006} if i % 9 == 8 else {}))
    return rows


def mlp() -> dict:
    """A residual MLP, 4 layers x 512 neurons made 2 x 64."""
    rng = np.random.default_rng(0)

    def neurons():
        kept = np.zeros(512, bool)
        kept[rng.choice(512, 64, replace=False)] = True
        return {"neurons": {"kept": kept.tolist()}}

    importance = [0.31, 0.04, 0.02, 0.22]
    tried = [(4, 256, 271882, 0.9889, -0.0), (3, 128, 112330, 0.9889, 0.0), (2, 128, 79306, 0.9833, 0.0056)]
    tried += [(2, 64, 42474, 0.9833, 0.0056), (2, 32, 25994, 0.9667, 0.0222), (1, 32, 17674, 0.9444, 0.0445)]
    return {
        "title": "digits, residual MLP",
        "task": "Handwritten digits of 8 x 8 pixels, 10 classes; 898 examples to train on, 180 to validate, 719 to test.",
        "command": "python -m experiments.compress --config=digits --config.seed=0 --workdir=runs/digits",
        "seed": 0,
        "created": "2026-01-31 12:00 UTC",
        "environment": {"jax": "0.10.2", "devices": "2 x cpu", "python": "3.11.9"},
        "verdict": {
            "verdict": "not worse",
            "sentence": "not worse: accuracy changed by -0.28 points on 719 examples, and the drop lies between -0.40 and 1.09 "
            "points (90% interval), within the allowed 2 points",
            "margin": 0.02,
            "drop": 0.0028,
            "interval": [-0.0040, 0.0109],
            "n": 719,
            "big_only": 5,
            "small_only": 3,
            "power": 0.934,
            "needed": None,
            "level": 0.05,
        },
        "models": [
            entry("big", "4 residual layers of 512 neurons", 0.9861, [0.9746, 0.9924], 536074, 1070000, 4.213, 10, 1),
            entry("small", "pruned, distilled", 0.9833, [0.9711, 0.9904], 42474, 84480, 0.612, 12, 2, 0.9889),
            entry("from scratch", "same sizes, same compute", 0.9694, [0.9541, 0.9797], 42474, 84480, 0.612, 22, 3, 0.9722, 3100),
            entry(
                "without teacher", "pruned, no distillation", 0.9736, [0.9591, 0.9831], 42474, 84480, 0.612, 19, 4, 0.9764, 3100
            ),
        ],
        "candidates": [
            {"sizes": {"layers": n, "neurons": k}, "parameters": p, "valid_accuracy": a, "valid_drop": d}
            | {"holds": d < 0.02, "chosen": p == 42474}
            for n, k, p, a, d in tried
        ],
        "structure": {
            "sizes_before": {"layers": 4, "neurons": 512},
            "sizes_after": {"layers": 2, "neurons": 64},
            "layers": [{"index": i, "kept": i in (0, 3), "importance": importance[i], "parts": neurons()} for i in range(4)],
            "shared": {},
        },
        "curves": {
            "big": training(1),
            "prune 2 x 64": training(2, 600, 0.5, 0.09, 0.978, 0.93),
            "retrain": training(3, 300, 0.12, 0.04, 0.981, 0.965),
            "from scratch": training(4, 3100, 2.3, 0.002, 0.97),
            "without teacher": training(5, 900, 0.9, 0.01, 0.974, 0.8),
        },
        "files": {"export": "export/", "predict": "python -m experiments.predict --model=runs/digits/export input.npz"},
        "notes": ["Latency was measured on the devices above, both models in turn."],
    }


def vit() -> dict:
    """A ViT whose heads, FFN neurons, layers and width shrink, and whose verdict is open."""
    results, rng = mlp(), np.random.default_rng(1)

    def some(n, k):
        kept = np.zeros(n, bool)
        kept[rng.choice(n, k, replace=False)] = True
        return {"kept": kept.tolist()}

    results["title"] = "digits, ViT"
    results["verdict"] |= {"verdict": "inconclusive", "interval": [-0.004, 0.031], "drop": 0.0139, "needed": 2900, "power": 0.41}
    results["verdict"]["sentence"] = "inconclusive: about 2,900 examples needed"
    results["class_names"] = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    results["structure"] = {
        "sizes_before": {"layers": 6, "heads": 8, "neurons": 384, "width": 96},
        "sizes_after": {"layers": 4, "heads": 3, "neurons": 96, "width": 96},
        "layers": [
            {
                "index": i,
                "kept": i not in (2, 4),
                "importance": 0.4 - 0.05 * i,
                "parts": {"heads": some(8, 3), "neurons": some(384, 96)},
            }
            for i in range(6)
        ],
        "shared": {"width": some(96, 96)},
    }
    return results


def nothing_passed() -> dict:
    results = mlp()
    results["verdict"] = {"verdict": "nothing passed", "sentence": "nothing passed: every candidate lost more than 2 points"}
    results["models"] = [{key: value for key, value in results["models"][0].items() if key != "latency"}]
    for key in ("candidates", "structure", "curves", "files", "notes", "command", "environment", "seed", "created", "task"):
        del results[key]
    return results


FIXTURES = {"mlp": mlp, "vit": vit, "nothing passed": nothing_passed}


def written(results: dict, tmp_path) -> str:
    results = json.loads(json.dumps(results))  # a report may be written from the file that a run left
    return report.write(results, tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
