"""Trains one model, dense or pruned, alone or with a teacher, over many devices, and exports it.

Classes and tokens alike: --config.data.source chooses the data, --config.model=<kind> the architecture. A teacher is turned on by
any flag below it: --config.teacher.pretrained=<export or workdir>. A config file of your own (--config=my_experiment.py) may hold
functions: loss terms, transforms of the optimiser, param views, the model, the data.

python -m experiments.train --config.run.steps=300 --config.run.optimizer.learning_rate=3e-3
python -m experiments.train --config=lm --config.data.source=text:<folder> --config.model.layers=6 --workdir=runs/mine
python -m experiments.train --config.teacher.pretrained=runs/big --config.model.hidden=32,16
python -m experiments.train --config.teacher.pretrained=runs/a,runs/b --config.teacher.precision=int8
python -m experiments.train --config.teacher.generations=3
python -m experiments.train --config.teacher=mean --config.teacher.decay=0.99
python -m experiments.train --config=lm --help=optimizer
"""

import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import rich.console
import rich.table

from bmjax import config
from bmjax.jobs.train import EXPORT, TEST, Config, train

PRESETS = pathlib.Path(__file__).parent / "configs" / "train"


def main(settings: Config, workdir: pathlib.Path, command: str) -> None:
    """Runs the job and ends with a table and the export's path."""
    results = train(settings, workdir, command)
    console = rich.console.Console()
    console.print(table(results))
    if results["dense"]:
        console.print(dense(results["dense"]), soft_wrap=True)
    if results["bytes_note"]:
        console.print(results["bytes_note"], soft_wrap=True)
    console.print(f"export: {(workdir / EXPORT).absolute()}", soft_wrap=True)
    if settings.predict:
        predict(workdir, "npz" if results["kind"] == "tokens" else "csv")


def table(results: dict[str, Any]) -> rich.table.Table:
    """The test metrics of each model."""
    shown = rich.table.Table("test split", *(model["name"] for model in results["models"]))
    for name, write in {**figures(results["kind"]), **COSTS}.items():
        shown.add_row(name, *map(write, results["models"]))
    for name, write in STEPS.items():
        if any(cells := [write(model.get("step") or {}) for model in results["models"]]):
            shown.add_row(name, *[cell or "-" for cell in cells])
    if any(model["weights"] != "last step" for model in results["models"]):
        shown.add_row("parameters of", *[model["weights"] for model in results["models"]])
    if results.get("bigram_bits") is not None:
        shown.add_row("a bigram's bits per token", *[f"{results['bigram_bits']:.4f}"] * len(results["models"]))
    if results.get("bigram_bits_per_byte") is not None:
        shown.add_row("a bigram's bits per byte", *[f"{results['bigram_bits_per_byte']:.4f}"] * len(results["models"]))
    return shown


def dense(rows: list[dict[str, Any]]) -> str:
    """What pruning left out, by reason; the parameters' names are in results.json."""
    sizes: dict[str, list[int]] = {}
    for row in rows:
        sizes.setdefault(row["why"], []).append(row["size"])
    said = [f"{why} ({sum(found):,} parameters in {len(found)} array{'s'[: len(found) > 1]})" for why, found in sizes.items()]
    return f"left dense: {', '.join(said)}"


def figures(kind: str) -> dict[str, Any]:
    """{row: how a model's result is written there} of data of classes or tokens."""
    return TOKENS if kind == "tokens" else CLASSES


CLASSES = {
    "accuracy": lambda model: f"{model['metrics']['accuracy']:.2%}",
    "recall (macro)": lambda model: f"{model['metrics']['recall']['macro']:.2%}",
    "F1 (macro)": lambda model: f"{model['metrics']['f1']['macro']:.2%}",
    "NLL, nats": lambda model: f"{model['metrics']['nll']:.4f}",
}
TOKENS = {
    "bits per token": lambda model: f"{model['metrics']['bits_per_token']:.4f}",
    "bits per byte": lambda model: _or_dash(model["metrics"]["bits_per_byte"]),
    "perplexity": lambda model: f"{model['metrics']['perplexity']:.4g}",
    "next token right": lambda model: f"{model['metrics']['accuracy']:.2%}",
}
COSTS = {
    "parameters": lambda model: f"{model['parameters']:,}",
    "zero kernel weights": lambda model: f"{model['sparsity']:.1%}",
    "training steps": lambda model: f"{model['train_steps']:,}",
}

STEPS = {  # of one step, on each device; the teacher's parts of it
    "step memory, MiB": lambda step: _if_there(step, "peak_bytes", lambda value: f"{value / 2**20:.3g}"),
    "teacher's FLOPs": lambda step: _if_there(step, "teacher_flops_share", "{:.1%}".format),
    "teacher's time": lambda step: _if_there(step, "teacher_time_share", "{:.1%}".format),
}


def _if_there(step: dict[str, Any], name: str, write: Callable[[Any], str]) -> str:
    return write(step[name]) if name in step else ""


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def predict(workdir: pathlib.Path, ending: str) -> None:
    """Predicts the test split from the exported file, in a process that does not know bmjax."""
    flags = {"model": workdir / EXPORT, "input": workdir / TEST, "output": workdir / f"predictions.{ending}"}
    arguments = [f"--{name}={path}" for name, path in flags.items()]
    subprocess.run([sys.executable, "-m", "experiments.predict", *arguments], check=True)


if __name__ == "__main__":
    config.launch(main, presets=PRESETS, default="article", about=__doc__, short={"profile": "config.run.profile"})
