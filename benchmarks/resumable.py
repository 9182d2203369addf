"""Runs of a benchmark, one JSON file each in a folder: it can be stopped, and the same command goes on with what is missing."""

import argparse
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

SETTINGS = "settings.json"


def check_folder(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Makes the folder these settings' own. Raises ValueError if it holds runs with others, which would not compare."""
    path = folder / SETTINGS
    settings = json.loads(json.dumps(settings))  # as they are read back
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(path, settings)
        return
    there = json.loads(path.read_text())
    for name in sorted({*there, *settings}):
        old, new = there.get(name), settings.get(name)
        if old != new:
            raise ValueError(f"{folder} holds runs with {name} {old!r}, and it is {new!r} now; give another folder as --out")


def write(path: pathlib.Path, content: Any) -> None:
    """JSON that is there as a whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, path)


def collect(
    folder: pathlib.Path,
    runs: dict[str, Callable[[], dict[str, Any]]],
    say: Callable[[str], None],
    describe: Callable[[dict[str, Any]], str],
) -> dict[str, dict[str, Any]]:
    """{name: result} of the runs in order: read where they are done, run where not. Ctrl-C ends with those that there are.

    Args:
        folder: where each is written as name.json.
        runs: {name: function that makes the result}.
        say: takes a line about each run that was made.
        describe: a result in a few words.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        for number, (name, make) in enumerate(runs.items(), 1):
            path = folder / f"{name}.json"
            if not path.exists():
                start = time.perf_counter()
                result = make()
                write(path, {**result, "wall_seconds": time.perf_counter() - start})
                say(f"{number} of {len(runs)}: {name}: {describe(result)}")
            found[name] = json.loads(path.read_text())
    except KeyboardInterrupt:
        say(f"stopped after {len(found)} of {len(runs)} runs; the same command goes on from here")
    return found


def names(text: str, known: Iterable[str], what: str) -> list[str]:
    """Names separated by commas. Raises ValueError for one that is not known, and lists those that are."""
    known, chosen = list(known), [name.strip() for name in text.split(",")]
    for name in chosen:
        if name not in known:
            raise ValueError(f"there is no {what} {name!r}; there are {', '.join(known)}")
    return chosen


def fractions(text: str, what: str) -> list[float]:
    """Numbers above 0 and below 1, separated by commas. Raises ValueError for anything else."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{what} is {text!r}; expected fractions separated by commas, as in 0.8,0.9") from None
    for value in found:
        if not 0 < value < 1:
            raise ValueError(f"{what} has {value:g}; expected fractions above 0 and below 1")
    return found


def parse(parser: argparse.ArgumentParser, presets: dict[str, dict[str, Any]], default: str = "cpu") -> argparse.Namespace:
    """The command line, with the preset's value where a flag is not given."""
    parser.add_argument("--preset", choices=presets, default=default, help="what the other flags are where they are not given")
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default=default)
    parser.set_defaults(**presets.get(first.parse_known_args()[0].preset, {}))
    return parser.parse_args()


def check_whole(arguments: argparse.Namespace, **least: int) -> None:
    """Raises ValueError where a number of the command line is below its least."""
    for name, value in least.items():
        if getattr(arguments, name) < value:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; expected at least {value}")


def mean_and_spread(values: list[float], digits: int = 2) -> str:
    """ "58.31 (0.42)": the mean, and the standard deviation over seeds."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ({spread:.{digits}f})"
