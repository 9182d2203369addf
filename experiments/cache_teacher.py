"""Runs a teacher once over a data set and writes its largest log-probabilities, from which students learn while no teacher runs.

python -m experiments.cache_teacher --config=lm --config.teacher=runs/big --config.k=64 --workdir=runs/big_cache
python -m experiments.train --config=lm --config.teacher.cached=runs/big_cache

Each token, or example, takes about k x (2 bytes + log2 of the number of classes bits). A command that was stopped goes on where
it was. The data must be those that the student will be trained on: the same --config.data flags.
"""

import pathlib
from typing import Any

import rich.console
import rich.table

from bmjax import config
from bmjax.jobs.cache import Config, cache

PRESETS = pathlib.Path(__file__).parent / "configs" / "cache"


def main(settings: Config, workdir: pathlib.Path, command: str) -> None:
    """Runs the job and ends with a table and the cache's path."""
    results = cache(settings, workdir, command)
    console = rich.console.Console()
    console.print(table(results))
    console.print(f"cache: {workdir.absolute()}", soft_wrap=True)
    if not results["finished"]:
        console.print("other processes are still to write their shards; the last one finishes the cache", soft_wrap=True)


def table(results: dict[str, Any]) -> rich.table.Table:
    """What was cached."""
    shown = rich.table.Table("cached", results["split"])
    rows = {"examples": "examples", "tokens or examples": "items", "log-probabilities of each": "k", "files": "shards"}
    for name, key in rows.items():
        shown.add_row(name, f"{results[key]:,}")
    if results["bytes_per_item"] is not None:
        shown.add_row("bytes of each", f"{results['bytes_per_item']:.1f}")
    shown.add_row("seconds", f"{results['seconds']:.1f}")
    return shown


if __name__ == "__main__":
    config.launch(main, presets=PRESETS, default="article", about=__doc__)
