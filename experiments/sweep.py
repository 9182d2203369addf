"""Runs a program many times with other values of some config fields; a run that fails is a row, and the same command goes on.

python -m experiments.sweep --config=article --config.run.steps=300 --grid="learning_rate=1e-3,1e-2; config.seed=0,1" --parallel=2
python -m experiments.sweep --random="learning_rate=log(1e-4,1e-1); label_smoothing=uniform(0,0.2)" --trials=20

A field goes by the end of its path. Runs are sorted by the validation split; the test split is shown beside it.
"""

import pathlib
import sys
from typing import Any

import rich.console
import rich.table

from bmjax import config
from bmjax.jobs.sweep import PICTURE, Config, sweep
from experiments import compress, train

PROGRAMS = {"train": (train.PRESETS, "article"), "compress": (compress.PRESETS, "digits")}


def main(settings: Config, rest: list[str], command: str) -> None:
    """Runs the sweep and ends with its table and the picture's path."""
    presets, default = PROGRAMS[settings.program]
    results = sweep(settings, rest, presets, default, command)
    console = rich.console.Console()
    console.print(table(results))
    picture = pathlib.Path(settings.workdir or "runs/sweep").expanduser() / PICTURE
    if picture.exists():
        console.print(f"picture: {picture.absolute()}", soft_wrap=True)
    if all(row["error"] for row in results["runs"]):
        sys.exit(1)


def table(results: dict[str, Any]) -> rich.table.Table:
    """One row a run, the best first."""
    metric = results["metric"]
    names = [metric, metric.replace("valid_", "test_"), "parameters"]
    names = [name for name in dict.fromkeys(names) if any(name in row["figures"] for row in results["runs"])]
    shown = rich.table.Table(*results["fields"], *(name.replace("_", " ") for name in names), "seconds", "error")
    for row in results["runs"]:
        figures = [_number(row["figures"].get(name)) for name in names]
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        shown.add_row(*row["values"].values(), *figures, seconds, row["error"])
    for column in shown.columns:
        column.overflow = "fold"
    return shown


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


if __name__ == "__main__":
    config.launch_settings(main, settings=lambda _: Config(), forwards="config", about=__doc__)
