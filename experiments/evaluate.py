"""All metrics of a trained model: of an exported file, or of a checkpoint.

python -m experiments.evaluate --model=runs/article/export
python -m experiments.evaluate --model=runs/article --best --split=valid
python -m experiments.evaluate --model=runs/mine --config=mine.py

A run whose model, views or data are functions of a config file takes that file again, and the --config flags it was given.
"""

from typing import Any

import rich.console
import rich.table

from bmjax import config
from bmjax.jobs.evaluate import Config, defaults, evaluate, output
from experiments import train

CLASSES_SHOWN = 20


def main(settings: Config, rest: list[str], command: str) -> None:
    """Evaluates and ends with a table and the path of the JSON file."""
    results = evaluate(settings, command, again(rest) if rest else None)
    console = rich.console.Console()
    for shown in tables(results):
        console.print(shown)
    for note in filter(None, (results["note"], results["bytes_note"])):
        console.print(note, soft_wrap=True)
    console.print(f"figures: {output(settings).absolute()}", soft_wrap=True)


def again(arguments: list[str]) -> Any:
    """The config of a training, of the same arguments.

    Raises:
        ValueError: they name no config file, or as `config.launch` would say.
    """
    if not any(argument.startswith("--config=") and argument.endswith(".py") for argument in arguments):
        raise ValueError(f"{arguments[0]} is of a training; give its config file too, --config=<file.py>, or leave it out")
    given = config.from_arguments(arguments, train.PRESETS, "article")
    config.validate(given)
    return given


def tables(results: dict[str, Any]) -> list[rich.table.Table]:
    """All figures that are one number, and those of each class where there are few."""
    metrics, step = results["metrics"], results["step"]
    title = f"{results['data']}, {results['split']} split" + ("" if step is None else f", step {step:,}")
    title += ", moving average" if results["weights"] == "moving average" else ""
    whole = rich.table.Table("metric", "value", title=title)
    for name, value in metrics.items():
        if isinstance(value, dict):
            for kind, part in value.items():
                whole.add_row(f"{name} ({kind})", f"{part:.4f}")
        elif isinstance(value, (int, float)):
            whole.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    if interval := results.get("accuracy_interval"):
        whole.add_row("accuracy, 95% interval", f"{interval[0]:.4f} to {interval[1]:.4f}")
    each = metrics.get("per_class", ())
    if not 0 < len(each) <= CLASSES_SHOWN:
        return [whole]
    by_class = rich.table.Table("class", *each[0])
    for name, row in zip(results["class_names"], each):
        by_class.add_row(str(name), *(f"{value:,}" if isinstance(value, int) else f"{value:.4f}" for value in row.values()))
    return [whole, by_class]


if __name__ == "__main__":
    config.launch_settings(main, settings=defaults, by="model", forwards="config", about=__doc__)
