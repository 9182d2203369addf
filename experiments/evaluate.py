"""All metrics of a trained model: of an exported file, or of a checkpoint.

python -m experiments.evaluate --model=runs/article/export
python -m experiments.evaluate --model=runs/article --best --split=valid
"""

from typing import Any

import rich.console
import rich.table

from bmjax import config
from bmjax.jobs.evaluate import Config, defaults, evaluate, output

CLASSES_SHOWN = 20


def main(settings: Config, rest: list[str], command: str) -> None:
    """Evaluates and ends with a table and the path of the JSON file."""
    results = evaluate(settings, command)
    console = rich.console.Console()
    for shown in tables(results):
        console.print(shown)
    for note in filter(None, (results["note"], results["bytes_note"])):
        console.print(note, soft_wrap=True)
    console.print(f"figures: {output(settings).absolute()}", soft_wrap=True)


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
    config.launch_settings(main, settings=defaults, by="model", about=__doc__)
