"""The page: verdict first, then how small, how good, what was removed, how it was found, and how to do it again."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from bmjax.report import numbers, pictures, sensitivity
from bmjax.report.markup import Markup, join, tag
from bmjax.report.style import STYLE
from bmjax.report.table import Row, footnote, headline, model, rows, sentence

TONES = {"not worse": "good", "worse": "bad"}
LARGEST_MATRIX = 30  # with more classes the most confused pairs are listed instead
LISTED_PAIRS = 20


def write(results: Mapping[str, Any], path: str | os.PathLike[str]) -> pathlib.Path:
    """Writes one self-contained HTML file and returns its path.

    Args:
        results: JSON-like. `title`, `verdict` and `models` are needed; `task`, `command`, `seed`, `created`, `environment`,
            `class_names`, `candidates`, `structure`, `sensitivity`, `curves`, `files` and `notes` may be missing, and so may any
            figure.
        path: the file; its folder is made.

    Raises:
        ValueError: the title, the verdict or the models are missing.
    """
    missing = [key for key in ("title", "verdict", "models") if not results.get(key)]
    if missing:
        raise ValueError(f"results without {missing[0]!r}; a report needs a title, a verdict and at least one model")
    place = pathlib.Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(page(results), encoding="utf-8")
    return place


def page(results: Mapping[str, Any]) -> str:
    """The whole page as text."""
    head = tag(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", f"{headline(results)}: {results['title']}"),
        tag("style", Markup(STYLE)),
    )
    sections = [
        _verdict(results),
        _cards(results),
        _comparison(results),
        _structure(results.get("structure") or {}),
        sensitivity.section(results.get("sensitivity") or {}),
        _candidates(results.get("candidates") or ()),
        _curves(results.get("curves") or {}),
        _confusions(results),
        _origin(results),
    ]
    header = tag("header", tag("h1", results["title"]), tag("p", results["task"]) if results.get("task") else None)
    return "<!doctype html>\n" + tag("html", head, tag("body", tag("main", header, *sections)), lang="en") + "\n"


def _verdict(results: Mapping[str, Any]) -> Markup:
    verdict = results["verdict"]
    said = tag("div", tag("h2", headline(results)), tag("p", sentence(results)), _evidence(verdict))
    drawn = None
    if verdict.get("interval") and verdict.get("drop") is not None and verdict.get("margin") is not None:
        drawn = pictures.interval(verdict["drop"], verdict["interval"], verdict["margin"])
    return tag("section", said, drawn, class_=f"verdict {TONES.get(verdict['verdict'], 'open')}")


def _evidence(verdict: Mapping[str, Any]) -> Markup | None:
    """What the verdict rests on, where it is known."""
    said = []
    if verdict.get("big_only") is not None and verdict.get("small_only") is not None:
        of = f"Of {verdict['n']:,} test examples" if verdict.get("n") else "Of the test examples"
        said.append(
            f"{of}, {verdict['big_only']:,} are right with the big model only, {verdict['small_only']:,} with the small one only."
        )
    if verdict.get("power") is not None:
        said.append(f"A model that lost nothing would pass this test with a chance of {numbers.percent(verdict['power'])}.")
    return tag("p", " ".join(said), class_="soft") if said else None


def _cards(results: Mapping[str, Any]) -> Markup | None:
    big, small = model(results, "big"), model(results, "small")
    if big is None or small is None:
        return None
    latency = [(entry.get("latency") or {}) for entry in (big, small)]
    batch = latency[0].get("batch") if latency[0].get("batch") == latency[1].get("batch") else None
    medians = [entry.get("median_ms") if batch else None for entry in latency]
    accuracies = [(entry.get("metrics") or {}).get("accuracy") for entry in (big, small)]
    shown = [
        _card(big.get("parameters"), small.get("parameters"), "fewer", "more", "parameters", numbers.count),
        _card(big.get("flops"), small.get("flops"), "fewer", "more", "FLOPs per example", numbers.count),
        _card(medians[0], medians[1], "faster", "slower", f"for a batch of {batch}", numbers.milliseconds),
        _card(big.get("bytes"), small.get("bytes"), "smaller", "larger", "in bytes", numbers.nbytes),
    ]
    if None not in accuracies:
        before, after = map(numbers.percent, accuracies)
        shown.insert(
            0, tag("div", tag("b", after), tag("span", "test accuracy"), tag("span", f"the big model: {before}", class_="soft"))
        )
    return tag("div", *shown, class_="cards") if any(shown) else None


def _card(before: float | None, after: float | None, less: str, more: str, name: str, write: Any) -> Markup | None:
    ratio, _, change = numbers.times(before, after, less, more).partition("x ")
    if not ratio:
        return None
    figure = join(tag("b", f"{ratio}x"), tag("span", f"{change} {name}")) if change else join(tag("b", ratio), tag("span", name))
    return tag("div", figure, tag("span", f"{write(before)} → {write(after)}", class_="soft"))


def _comparison(results: Mapping[str, Any]) -> Markup:
    names = [entry["name"] for entry in results["models"]]
    marks = ["product" if name == "small" else None for name in names]
    about = [join(tag("dt", entry["name"]), tag("dd", entry["about"])) for entry in results["models"] if entry.get("about")]
    return tag(
        "section",
        tag("h2", "Side by side"),
        tag("p", footnote(results), class_="soft"),
        _table(["", *names], [(row.label, _cells(row)) for row in rows(results)], [None, *marks]),
        tag("dl", *about) if about else None,
    )


def _cells(row: Row) -> list[Markup]:
    return [join(cell.text, tag("small", cell.detail) if cell.detail else None) for cell in row.cells]


def _table(head: Sequence[Any], body: Sequence[tuple[Any, Sequence[Any]]], marks: Sequence[str | None] = ()) -> Markup:
    """A table whose first column names the rows; `marks` are classes of the columns."""
    marks = marks or [None] * len(head)
    top = tag("tr", *(tag("th", name, scope="col", class_=mark) for name, mark in zip(head, marks)))
    lines = [
        tag("tr", tag("th", name, scope="row"), *(tag("td", cell, class_=mark) for cell, mark in zip(cells, marks[1:])))
        for name, cells in body
    ]
    return tag("div", tag("table", tag("thead", top), tag("tbody", *lines)), class_="scroll")


def _structure(structure: Mapping[str, Any]) -> Markup | None:
    layers, shared = structure.get("layers") or [], structure.get("shared") or {}
    before, after = structure.get("sizes_before") or {}, structure.get("sizes_after") or {}
    if not (layers or shared or before):
        return None
    sizes = "; ".join(f"{name} {size:,} → {after.get(name, size):,}" for name, size in before.items())
    highest = max((layer.get("importance") or 0 for layer in layers), default=0)
    drawn = [_layer(layer, highest) for layer in layers]
    if shared:
        drawn += [
            tag(
                "div",
                tag("div", tag("b", name), tag("small", "shared by all layers") if layers else None),
                _parts({"": part}),
                class_="layer",
            )
            for name, part in shared.items()
        ]
    return tag(
        "section",
        tag("h2", "What was removed"),
        tag("p", sizes, class_="soft") if sizes else None,
        tag("div", tag("span", pictures.cells([True]), "kept"), tag("span", pictures.cells([False]), "removed"), class_="key")
        if drawn
        else None,
        *drawn,
    )


def _layer(layer: Mapping[str, Any], highest: float) -> Markup:
    kept, importance = layer.get("kept", True), layer.get("importance")
    said = [] if kept else [tag("small", "removed")]
    if importance is not None and highest > 0:
        said = [
            tag("small", f"{'' if kept else 'removed, '}importance {importance:.2g}"),
            pictures.bar(max(importance, 0) / highest),
        ]
    name = tag("div", tag("b", f"layer {layer['index']}"), *said)
    parts = layer.get("parts") or {}
    if not kept:  # whatever the masks say: nothing of it is left
        parts = {part: {"kept": [False] * len(entry["kept"])} for part, entry in parts.items()}
    return tag("div", name, _parts(parts), class_="layer" if kept else "layer removed")


def _parts(parts: Mapping[str, Any]) -> Markup:
    return tag("div", *(_part(name, entry["kept"]) for name, entry in parts.items() if len(entry["kept"])), class_="parts")


def _part(name: str, kept: Sequence[bool]) -> Markup:
    each = pictures.bin_size(len(kept))
    said = f"{name} {sum(kept):,} of {len(kept):,}".strip() + (f", {each} a cell" if each > 1 else "")
    return tag("figure", tag("small", said), pictures.cells(kept), class_="part")


def _candidates(tried: Sequence[Mapping[str, Any]]) -> Markup | None:
    if not tried:
        return None
    sizes = list(dict.fromkeys(name for candidate in tried for name in candidate.get("sizes") or {}))
    ordered = sorted(tried, key=lambda candidate: -(candidate.get("parameters") or 0))
    body = [
        (
            numbers.count(candidate.get("parameters")),
            [
                tag("b", "chosen") if candidate.get("chosen") else "holds" if candidate.get("holds") else "fails",
                *((candidate.get("sizes") or {}).get(name, numbers.MISSING) for name in sizes),
                numbers.percent(candidate.get("valid_accuracy")),
                numbers.points(candidate.get("valid_drop")),
            ],
        )
        for candidate in ordered
    ]
    drawn = pictures.candidates(tried)
    listed = _table(["parameters", "result", *sizes, "accuracy", "drop, points"], body)
    return tag(
        "section",
        tag("h2", "Sizes that were tried"),
        tag("p", "Compared on the validation split only; the test split was used once, for the verdict.", class_="soft"),
        tag("div", listed, tag("figure", drawn, _key(("dot small", "holds"), ("dot failed", "fails"))), class_="beside")
        if drawn
        else listed,
    )


def _curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Markup | None:
    known = ("loss", "valid_loss", "accuracy", "valid_accuracy")
    shown = {name: part for name, part in curves.items() if any(row.get(key) is not None for row in part for key in known)}
    if not shown:
        return None
    floor = pictures.accuracy_floor(shown)
    cut = f" The accuracy axis starts at {100 * floor:g}%; what lies below runs along its edge." if floor else ""
    panels = [tag("figure", tag("figcaption", name), pictures.curve(part, name, floor)) for name, part in shown.items()]
    return tag(
        "section",
        tag("h2", "Training"),
        tag("p", f"Every stage in its order. The loss of a stage has its own terms and scale.{cut}", class_="soft"),
        _key(("line train", "training batches"), ("line valid", "validation split")),
        tag("div", *panels, class_="panels"),
    )


def _key(*entries: tuple[str, str]) -> Markup:
    """A legend; the first word of each style says what is drawn, a line or a dot."""
    drawn = []
    for style, name in entries:
        mark = tag("circle", cx=7, cy=7, r=5, class_=style) if style.startswith("dot") else tag("path", d="M0 7h24", class_=style)
        width = 14 if style.startswith("dot") else 24
        drawn.append(tag("span", tag("svg", mark, viewBox=f"0 0 {width} 14", width=width, height=14, aria_hidden="true"), name))
    return tag("div", *drawn, class_="key")


def _confusions(results: Mapping[str, Any]) -> Markup | None:
    shown = {
        name: entry["metrics"]["confusion"]
        for name in ("big", "small")
        if (entry := model(results, name)) and (entry.get("metrics") or {}).get("confusion")
    }
    if not shown:
        return None
    classes = max(map(len, shown.values()))
    names = [str(name) for name in results.get("class_names") or range(classes)]
    if classes > LARGEST_MATRIX:
        return tag(
            "section",
            tag("h2", "What it confuses"),
            tag("p", f"The {LISTED_PAIRS} pairs of classes that are mistaken most often, of {classes:,} classes.", class_="soft"),
            _confused_pairs(shown, names),
        )
    drawn = [
        tag(
            "figure",
            tag("figcaption", name),
            tag("div", pictures.confusion(counts, names, f"Confusion matrix, {name}"), class_="scroll"),
        )
        for name, counts in shown.items()
    ]
    explained = "Test examples by true and predicted class; the diagonal is right."
    return tag(
        "section", tag("h2", "What it confuses"), tag("p", explained, class_="soft"), tag("div", *drawn, class_="matrices")
    )


def _confused_pairs(matrices: Mapping[str, Sequence[Sequence[int]]], names: Sequence[str]) -> Markup:
    pairs: dict[tuple[int, int], list[int]] = {}
    for column, counts in enumerate(matrices.values()):
        for i, row in enumerate(counts):
            for j, n in enumerate(row):
                if i != j and n:
                    pairs.setdefault((i, j), [0] * len(matrices))[column] = n
    worst = sorted(pairs, key=lambda pair: (-max(pairs[pair]), pair))[:LISTED_PAIRS]
    body = [(f"{names[i]} taken for {names[j]}", [numbers.count(n) for n in pairs[i, j]]) for i, j in worst]
    return _table(["class", *matrices], body)


def _origin(results: Mapping[str, Any]) -> Markup | None:
    facts = {name: results.get(name) for name in ("seed", "created")} | dict(results.get("environment") or {})
    listed = [join(tag("dt", name), tag("dd", value)) for name, value in facts.items() if value is not None]
    files = [join(tag("dt", name), tag("dd", tag("code", value))) for name, value in (results.get("files") or {}).items()]
    notes = [tag("li", note) for note in results.get("notes") or ()]
    parts = [
        tag("pre", results["command"]) if results.get("command") else None,
        tag("dl", *listed, *files) if listed or files else None,
        tag("ul", *notes) if notes else None,
    ]
    return tag("section", tag("h2", "How it was made"), *parts) if any(parts) else None
