"""The picture of a sensitivity analysis: quality against sparsity, a line a layer, a panel for what is alike."""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bmjax.report import numbers
from bmjax.report.axes import Scale, bottom, left, line, scale, svg, text
from bmjax.report.markup import Markup, join, tag
from bmjax.report.style import STYLE

LEGEND = 'A number at the end of a line is the layer; "all" is the part in all layers at once.'
LABELLED = 10  # lines of a panel that carry a label: those of the lowest quality
APART = 11  # between labels

Curve = tuple[str, list[tuple[float, float]]]  # label, points (sparsity, quality)


def write_sensitivity(record: Mapping[str, Any], path: str | os.PathLike[str], title: str = "Sensitivity") -> pathlib.Path:
    """Writes the picture alone, as one self-contained HTML file, and returns its path.

    Args:
        record: of `prune.Sensitivity.as_dict`.
        path: the file; its folder is made.
        title: of the page.
    """
    place = pathlib.Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    head = tag("head", Markup('<meta charset="utf-8">'), tag("title", title), tag("style", Markup(STYLE)))
    explained = tag("p", f"Quality when one layer alone is pruned to a sparsity; the rest is whole. {LEGEND}", class_="soft")
    body = tag("body", tag("main", tag("section", tag("h2", title), explained, panels(record, "quality", "{:.3g}".format))))
    place.write_text("<!doctype html>\n" + tag("html", head, body, lang="en") + "\n", encoding="utf-8")
    return place


def section(record: Mapping[str, Any]) -> Markup | None:
    """The section of the main job's page; None without an analysis."""
    if not record:
        return None
    explained = (
        "Validation accuracy of the big model when one part alone is pruned, without any training. The sizes to try follow from "
        f"these curves: what loses least gives most. {LEGEND}"
    )
    drawn = panels(record, "accuracy, %", lambda value: numbers.signless_zero(f"{100 * value:.4g}"))
    return tag("section", tag("h2", "How much each part matters"), tag("p", explained, class_="soft"), drawn)


def panels(record: Mapping[str, Any], label: str, write: Callable[[float], str]) -> Markup:
    """All curves, those of like layers together, on the same axes."""
    lines = {name: _points(record, i) for i, name in enumerate(record["names"])}
    values = [value for points in lines.values() for _, value in points] or [0.0]
    y = scale(values, 174, 24, pad=0.04)
    drawn = [
        tag(
            "figure",
            tag("figcaption", title),
            panel(title, [(words, lines[name]) for name, words in members.items()], y, label, write),
        )
        for title, members in families(record["names"]).items()
    ]
    return tag("div", *drawn, class_="panels")


def families(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """{title of a panel: {name: its label there}}: a group with its layers, or paths that differ in their last number only."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        whole, _, index = name.rpartition("/")
        number = list(re.finditer(r"\d+", name))
        if whole in names and index.isdigit():
            title, label = whole, index
        elif f"{name}/0" in names or not number:
            title, label = name, "all" if f"{name}/0" in names else ""
        else:
            title, label = f"{name[: number[-1].start()]}*{name[number[-1].end() :]}", number[-1][0]
        found.setdefault(title, {})[name] = label
    # A panel of one line carries its full name and needs no label.
    alone = {title: next(iter(members)) for title, members in found.items() if len(members) == 1}
    return {alone.get(title, title): {alone[title]: ""} if title in alone else members for title, members in found.items()}


def panel(title: str, curves: Sequence[Curve], y: Scale, label: str, write: Callable[[float], str]) -> Markup:
    """One panel. The line of a whole group, or the only line, is the strong one; the lowest lines are labelled at their ends."""
    width, base = 300, y.start
    x = Scale(0.0, 1.0, 44, 262)
    drawn = []
    for words, points in curves:
        style = "valid" if words in ("all", "") else "train"
        path = "L".join(f"{x(sparsity):.1f} {y(value):.1f}" for sparsity, value in points)
        drawn.append(tag("path", d=f"M{path}", class_=f"line {style}") if points else None)
    return svg(
        width,
        base + 38,
        f"{title}: {label} against sparsity",
        left(y, x.start, x.end, write, label),
        *drawn,
        *_labels(curves, x, y),
        bottom(x, base, lambda t: f"{100 * t:g}", "sparsity, %"),
    )


def _labels(curves: Sequence[Curve], x: Scale, y: Scale) -> list[Markup]:
    """At the ends of the lowest lines, moved apart, with a hair line to those that were moved far."""
    ends = sorted((points[-1][1], words, points[-1][0]) for words, points in curves if points and words)[:LABELLED]
    wanted = sorted((y(value), words, x(sparsity)) for value, words, sparsity in ends)
    drawn, free = [], -math.inf
    # The lowest label must stay above the axis, so all start high enough.
    for i, (at, words, end) in enumerate(wanted):
        place = max(free, min(at, y.start - APART * (len(wanted) - 1 - i)))
        free = place + APART
        hair = line(end + 1, at, x.end + 8, place, "grid") if abs(place - at) > 3 or end < x.end - 20 else None
        drawn.append(join(hair, text(x.end + 10, place + 4, words, anchor="start", class_="strong" if words == "all" else None)))
    return drawn


def _points(record: Mapping[str, Any], at: int) -> list[tuple[float, float]]:
    """(sparsity, quality) of a layer, from nothing dropped; what is not finite is left out."""
    pairs = [(0.0, record["dense"]), *zip(record["sparsities"][at], record["quality"][at])]
    known = {float(sparsity): float(value) for sparsity, value in pairs if value is not None and math.isfinite(value)}
    return sorted(known.items())
