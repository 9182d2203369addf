"""Many runs of one program, each with other values of some config fields; a table, a picture and the figures at the end."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from absl import logging

from bmjax import config as configs
from bmjax.config import at_least, field
from bmjax.jobs import common
from bmjax.jobs.points import points, short_names

RECORD, RESULTS, TABLE, PICTURE, OUTPUT = "sweep.json", "results.json", "results.csv", "sweep.png", "output.txt"
_MEASURES = ("accuracy", "nll", "ece", "bits_per_token", "bits_per_byte", "perplexity", "teacher_agreement")
METRICS = (*(f"{split}_{name}" for split in ("valid", "test") for name in _MEASURES), "parameters", "sparsity", "train_steps")
_FALLING = ("nll", "ece", "bits_per_token", "bits_per_byte", "perplexity", "parameters", "train_steps")


@dataclasses.dataclass
class Config:
    """What is swept, and how. Every --config... flag is handed on to the runs."""

    program: str = field("train", "the program to run: experiments.<program>", choices=("train", "compress"))
    grid: str = field("", 'fields and values, all combinations: "learning_rate=1e-3,3e-3; config.seed=0,1; hidden=64|64,32"')
    random: str = field("", 'fields and ranges to draw from: "learning_rate=log(1e-4,1e-1); label_smoothing=uniform(0,0.2)"')
    trials: int = field(10, "random draws", check=at_least(1))
    seed: int = field(0, "of the random draws", check=at_least(0))
    parallel: int = field(1, "runs at a time", check=at_least(1))
    metric: str = field("", "what runs are sorted by; empty is the validation split's main figure", choices=("", *METRICS))
    workdir: str = field("", "folder for everything written; runs/sweep if not given")


def sweep(config: Config, base: Sequence[str], presets: pathlib.Path, default: str, command: str) -> dict[str, Any]:
    """Runs, or goes on with, a sweep; returns {"fields", "metric", "runs": [...]}, best first and failed runs last.

    Every point is parsed and validated before the first run starts. A run that is finished is read, any other is started or gone
    on with; one that fails is a row with its error.

    Args:
        config: the sweep.
        base: `--config...` arguments of all runs.
        presets, default: of the program, as for `config.launch`.
        command: for the record.

    Raises:
        ValueError: a field or value does not fit the config, or the workdir holds another sweep.
    """
    settings = configs.from_arguments(base, presets, default)
    tried = points(settings, config.grid, config.random, config.trials, config.seed)
    short = short_names(list(tried[0]))
    for point in tried:
        _check(base, point, presets, default)
    workdir = pathlib.Path(config.workdir or "runs/sweep").expanduser()
    code = getattr(settings, "code", {})  # an edited config file would make other runs of the same names
    _claim(workdir, {"program": config.program, "base": list(base), "code": code})
    folders = {workdir / _folder(point, short): point for point in tried}
    rows = _run_all(config, base, folders)
    metric = config.metric or _main_metric(rows)
    for row in rows:
        row["values"] = {short[path]: text for path, text in row["values"].items()}
    rows.sort(key=lambda row: _rank(row, metric))
    results = {"command": command, "fields": list(short.values()), "metric": metric, "runs": rows}
    common.write_json(workdir / RESULTS, results)
    _write_table(workdir / TABLE, results)
    if any(metric in row["figures"] for row in rows):
        draw(results, workdir / PICTURE)
    return results


def _check(base: Sequence[str], point: dict[str, str], presets: pathlib.Path, default: str) -> None:
    configs.validate(configs.from_arguments([*base, *_flags(point)], presets, default))


def _flags(point: dict[str, str]) -> list[str]:
    return [f"--{path}={text}" for path, text in point.items()]


def _claim(workdir: pathlib.Path, about: dict[str, Any]) -> None:
    """Makes the folder this sweep's. Raises ValueError if it is another's; more values of one sweep may follow."""
    record = workdir / RECORD
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        there = json.loads(record.read_text()) if record.exists() else None
    except (OSError, ValueError) as error:
        raise ValueError(f"workdir {workdir} cannot be used ({error}); choose another --workdir") from None
    if there not in (None, about):
        raise ValueError(f"workdir {workdir} holds a sweep of other runs ({there}); choose another --workdir or delete it")
    common.write_json(record, about)


def _folder(point: dict[str, str], short: dict[str, str]) -> str:
    """A run's folder, named after its values."""
    whole = ",".join(f"{short[path]}={text}" for path, text in point.items())
    name = re.sub(r"[^\w.=,+-]", "_", whole)
    if len(name) > 100 or name != whole:  # two might have become one
        name = f"{name[:90]}-{hashlib.sha256(json.dumps(point).encode()).hexdigest()[:8]}"
    return name


def _run_all(config: Config, base: Sequence[str], folders: dict[pathlib.Path, dict[str, str]]) -> list[dict[str, Any]]:
    """All runs, some at a time. After Ctrl-C those that are running are told once, and save where they are."""
    children: list[subprocess.Popen[bytes]] = []
    stopped, starting = threading.Event(), threading.Lock()  # none starts while those that run are told

    def one(folder: pathlib.Path, point: dict[str, str]) -> dict[str, Any]:
        row = {"values": point, "folder": str(folder)}
        if (done := _figures(folder)) is not None:
            return {**row, "seconds": None, "error": "", "figures": done}
        program = [sys.executable, "-m", f"experiments.{config.program}", *base, *_flags(point), f"--workdir={folder}"]
        start = time.monotonic()
        with starting:
            if stopped.is_set():
                raise KeyboardInterrupt
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / OUTPUT).open("wb") as output:  # the child has it from then on
                child = subprocess.Popen(program, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            children.append(child)
        code = child.wait()
        found = _figures(folder) if code == 0 else None
        error = "" if found is not None else _error(folder / OUTPUT, code)
        logging.info("%s: %s", folder.name, error or "done")
        return {**row, "seconds": round(time.monotonic() - start, 1), "error": error, "figures": found or {}}

    with ThreadPoolExecutor(config.parallel) as pool:
        waiting = [pool.submit(one, folder, point) for folder, point in folders.items()]
        try:
            return [future.result() for future in waiting]
        except KeyboardInterrupt:
            with starting:
                stopped.set()
                for child in children:
                    if child.poll() is None:
                        child.send_signal(signal.SIGINT)
            raise


def _figures(folder: pathlib.Path) -> dict[str, float] | None:
    """The figures of a finished run; None if it is not finished, or what it left is broken."""
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        models = {model["name"]: model for model in results["models"]}
        model = models.get("small") or models.get("big") or results["models"][-1]
        chosen = [candidate["valid_accuracy"] for candidate in results.get("candidates", ()) if candidate["chosen"]]
        valid = model.get("valid") or ({"accuracy": chosen[0]} if chosen else {})
        found = {f"valid_{name}": value for name, value in valid.items()}
        found |= {f"test_{name}": value for name, value in common.scalars(model["metrics"]).items()}
        return {**found, **{name: model[name] for name in ("parameters", "sparsity", "train_steps") if name in model}}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _error(output: pathlib.Path, code: int) -> str:
    """One line about a run that failed."""
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines or [""]
    return f"{said[-1]} (exit code {code})".strip()


def _main_metric(rows: Sequence[dict[str, Any]]) -> str:
    """Of language models bits per byte where all have them: bits per token mean another thing with each tokenizer."""
    figures = [row["figures"] for row in rows if row["figures"]]
    names = ("valid_bits_per_byte", "valid_bits_per_token")
    return next((name for name in names if figures and all(name in found for found in figures)), "valid_accuracy")


def falls(metric: str) -> bool:
    """Whether less is better."""
    return metric.endswith(_FALLING)


def _rank(row: dict[str, Any], metric: str) -> tuple[bool, float]:
    value = row["figures"].get(metric)
    return value is None, 0.0 if value is None else value if falls(metric) else -value


def _write_table(path: pathlib.Path, results: dict[str, Any]) -> None:
    names = list(dict.fromkeys(name for row in results["runs"] for name in row["figures"]))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*results["fields"], *names, "seconds", "error", "folder"])
        for row in results["runs"]:
            values = [row["values"][field] for field in results["fields"]]
            writer.writerow(
                [*values, *(row["figures"].get(name, "") for name in names), row["seconds"], row["error"], row["folder"]]
            )


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """One picture: the metric against each swept field, the best run marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric, fields = results["metric"], results["fields"]
    rows = [row for row in results["runs"] if metric in row["figures"]]
    heights = [row["figures"][metric] for row in rows]
    figure = Figure(figsize=(3.6 * len(fields) + 0.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(fields), sharey=True, squeeze=False)[0], fields):
        places = [row["values"][name] for row in rows]
        numbers = _numbers(places)
        if numbers is None:
            order = sorted(set(places))
            axes.set_xticks(range(len(order)), order, rotation=20 if max(map(len, order)) > 6 else 0)
            numbers = [float(order.index(place)) for place in places]
        elif min(numbers) > 0 and max(numbers) >= 10 * min(numbers):
            axes.set_xscale("log")
        axes.scatter(numbers, heights, s=26, color="#3b6ea8", alpha=0.75)
        axes.scatter(numbers[:1], heights[:1], s=70, facecolors="none", edgecolors="#c4572e", linewidths=1.8)
        axes.set_xlabel(name)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel(metric.replace("_", " "))
    figure.savefig(path, dpi=150)


def _numbers(texts: Sequence[str]) -> list[float] | None:
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None
