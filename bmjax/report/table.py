"""The models side by side: one list of rows, shown in the terminal, in Markdown and in the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from bmjax.report import numbers

if TYPE_CHECKING:
    import rich.table

HEADLINES = {
    "not worse": "The small model is not worse",
    "worse": "The small model is worse",
    "inconclusive": "Inconclusive: the test set cannot decide",
    "nothing passed": "No smaller model passed",
}


class Cell(NamedTuple):
    """A figure, and what belongs below it in smaller print."""

    text: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.detail}".strip()


class Row(NamedTuple):
    """One measure, one cell a model."""

    label: str
    cells: tuple[Cell, ...]


def headline(results: Mapping[str, Any]) -> str:
    """The verdict as a short sentence."""
    verdict = results["verdict"]["verdict"]
    return HEADLINES.get(verdict, str(verdict))


def sentence(results: Mapping[str, Any]) -> str:
    """The verdict's own sentence, without the verdict in front of it, as the headline says it already."""
    verdict = results["verdict"]
    text = str(verdict.get("sentence") or "").removeprefix(f"{verdict['verdict']}: ")
    return text[:1].upper() + text[1:] + ("." if text and text[-1] not in ".!?" else "")


def model(results: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The model of that name, or None."""
    return next((entry for entry in results["models"] if entry["name"] == name), None)


def rows(results: Mapping[str, Any]) -> list[Row]:
    """The rows of the comparison, one cell for each of `results["models"]`; a measure that no model has is left out."""
    models, big = results["models"], model(results, "big") or {}
    drawn = [Row(label, tuple(write(entry, big) for entry in models)) for label, write in MEASURES.items()]
    return [row for row in drawn if any(cell.text != numbers.MISSING for cell in row.cells)]


def _metric(*path: str, write: Callable[[float | None], str]) -> Callable[..., Cell]:
    def cell(entry: Mapping[str, Any], _: Mapping[str, Any]) -> Cell:
        value: Any = entry.get("metrics")
        for key in path:
            value = (value or {}).get(key)
        return Cell(write(value))

    return cell


def _accuracy(entry: Mapping[str, Any], _: Mapping[str, Any]) -> Cell:
    interval = entry.get("accuracy_interval")
    detail = f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return Cell(numbers.percent((entry.get("metrics") or {}).get("accuracy")), detail)


def _agreement(entry: Mapping[str, Any], _: Mapping[str, Any]) -> Cell:
    return Cell(numbers.percent((entry.get("metrics") or {}).get("teacher_agreement")))


def _cost(key: str, write: Callable[[float | None], str], less: str, more: str) -> Callable[..., Cell]:
    def cell(entry: Mapping[str, Any], big: Mapping[str, Any]) -> Cell:
        value = entry.get(key)
        return Cell(write(value), "" if entry is big else numbers.times(big.get(key), value, less, more))

    return cell


def _latency(entry: Mapping[str, Any], big: Mapping[str, Any]) -> Cell:
    measured, reference = entry.get("latency") or {}, big.get("latency") or {}
    median = measured.get("median_ms")
    same_batch = entry is not big and measured.get("batch") == reference.get("batch")
    return Cell(
        numbers.milliseconds(median),
        numbers.times(reference.get("median_ms"), median, "faster", "slower") if same_batch else "",
    )


def _latency_range(entry: Mapping[str, Any], _: Mapping[str, Any]) -> Cell:
    measured = entry.get("latency") or {}
    ends = [measured.get("low_ms"), measured.get("high_ms")]
    return Cell(numbers.MISSING if None in ends else f"{ends[0]:.3g}–{ends[1]:.3g}")


def _plain(key: str) -> Callable[..., Cell]:
    return lambda entry, _: Cell(numbers.count(entry.get(key)))


MEASURES: dict[str, Callable[..., Cell]] = {
    "accuracy": _accuracy,
    "precision (macro)": _metric("precision", "macro", write=numbers.percent),
    "recall (macro)": _metric("recall", "macro", write=numbers.percent),
    "F1 (macro)": _metric("f1", "macro", write=numbers.percent),
    "NLL, nats": _metric("nll", write=numbers.decimal),
    "ECE": _metric("ece", write=numbers.decimal),
    "agrees with big": _agreement,
    "parameters": _cost("parameters", numbers.count, "fewer", "more"),
    "size": _cost("bytes", numbers.nbytes, "smaller", "larger"),
    "FLOPs per example": _cost("flops", numbers.count, "fewer", "more"),
    "latency": _latency,
    "latency range, ms": _latency_range,
    "training steps": _plain("train_steps"),
    "training FLOPs": _plain("train_flops"),
}


def footnote(results: Mapping[str, Any]) -> str:
    """What the figures were measured on, in one line."""
    tests = {entry["metrics"]["count"] for entry in results["models"] if (entry.get("metrics") or {}).get("count")}
    batches = {entry["latency"]["batch"] for entry in results["models"] if (entry.get("latency") or {}).get("batch")}
    said = [f"Quality on {count:,} test examples" for count in sorted(tests)]
    if any(entry.get("accuracy_interval") for entry in results["models"]):
        said.append("accuracy with its 95% interval in percent")
    said += [f"latency is the median for a batch of {batch:,}" for batch in sorted(batches)]
    return "; ".join(said)[:1].upper() + "; ".join(said)[1:] + ("." if said else "")


def table(results: Mapping[str, Any]) -> rich.table.Table:
    """The comparison for the terminal: `rich.print(report.table(results))`."""
    import rich.box
    import rich.table
    import rich.text

    drawn = rich.table.Table(
        title=rich.text.Text(f"{results['title']}: {headline(results)}"),
        caption=rich.text.Text(sentence(results)),
        title_justify="left",
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    drawn.add_column("", no_wrap=True)
    for entry in results["models"]:
        drawn.add_column(rich.text.Text(entry["name"]), justify="right")
    for row in rows(results):
        cells = [rich.text.Text.assemble(cell.text, (f"\n{cell.detail}" if cell.detail else "", "dim")) for cell in row.cells]
        drawn.add_row(row.label, *cells)
    return drawn


def markdown(results: Mapping[str, Any]) -> str:
    """The verdict and the comparison as Markdown."""
    models: Sequence[Mapping[str, Any]] = results["models"]
    lines = [
        _line("", *(entry["name"] for entry in models)),
        _line("---", *("---:" for _ in models)),
        *(_line(row.label, *row.cells) for row in rows(results)),
    ]
    parts = [
        f"## {_flat(results['title'])}",
        f"**{_flat(headline(results))}.** {_flat(sentence(results))}".rstrip(),
        "\n".join(lines),
    ]
    return "\n\n".join([*parts, footnote(results)]).rstrip() + "\n"


def _line(*cells: Any) -> str:
    return "| " + " | ".join(_flat(cell).replace("|", "\\|") for cell in cells) + " |"


def _flat(text: Any) -> str:
    return " ".join(str(text).split())
