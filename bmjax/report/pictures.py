"""The pictures of the page, as inline SVG. Colours come from the page's style, so that they follow light and dark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bmjax.report import numbers
from bmjax.report.axes import Scale, bottom, left, line, scale, svg, text
from bmjax.report.markup import Markup, join, tag

COLUMNS = 64
CELLS = 8 * COLUMNS  # more neurons than that share cells
POINTS = 160  # a longer curve is thinned to about so many points


def interval(drop: float, ends: Sequence[float], margin: float) -> Markup:
    """The drop in accuracy and its interval against zero and the allowed margin; all are fractions."""
    width, top, base = 380, 30, 86
    x = scale([0.0, margin, *ends], 16, width - 16, pad=0.16)
    low, middle, high, limit = x(ends[0]), (top + base) / 2, x(ends[1]), x(margin)
    return svg(
        width,
        base + 40,
        f"Drop in accuracy {numbers.points(drop)} points, interval {numbers.points(ends[0])} to {numbers.points(ends[1])}, "
        f"allowed {numbers.points(margin)}",
        tag("rect", x=x.start, y=top, width=limit - x.start, height=base - top, class_="allowed"),
        tag("rect", x=limit, y=top, width=x.end - limit, height=base - top, class_="beyond"),
        line(x(0), top, x(0), base, "zero"),
        line(limit, top - 6, limit, base, "limit"),
        text(x(0), top - 10, "no change", anchor="middle"),
        text(limit, top - 10, f"allowed: {numbers.points(margin)}", anchor="middle", class_="strong"),
        tag("path", d=f"M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 8}v16M{high:.1f} {middle - 8}v16", class_="whisker"),
        tag("circle", cx=x(drop), cy=middle, r=6, class_="dot small"),
        bottom(
            x, base, lambda t: numbers.signless_zero(f"{100 * t:g}"), "drop in accuracy, percentage points (right is worse)", 5
        ),
    )


def cells(kept: Sequence[bool]) -> Markup:
    """Neurons or heads in their order, row by row: blue where kept, grey where removed, pale where a cell stands for both."""
    each = bin_size(len(kept))
    shares = [sum(kept[i : i + each]) / len(kept[i : i + each]) for i in range(0, len(kept), each)]
    columns = min(len(shares), COLUMNS)
    pitch = max(6, min(20, 384 // columns))
    gap = 1 if pitch < 10 else 3
    height = pitch * math.ceil(len(shares) / columns) - gap
    levels = sorted({math.ceil(4 * share) / 4 for share in shares} - {0.0})
    layers: list[tuple[str, str | None, list[bool]]] = [("gone", None, [True] * len(shares))]
    layers += [("kept", f"{level:g}", [math.ceil(4 * share) / 4 == level for share in shares]) for level in levels]
    return svg(
        columns * pitch - gap,
        height,
        f"{sum(kept)} of {len(kept)} kept",
        *(
            tag(
                "path",
                d=_runs(chosen, columns, pitch, gap),
                class_=style,
                stroke_width=pitch - gap,
                stroke_dasharray=f"{pitch - gap} {gap}",
                stroke_opacity=opacity,
            )
            for style, opacity, chosen in layers
        ),
    )


def _runs(chosen: Sequence[bool], columns: int, pitch: int, gap: int) -> str:
    """Cells as dashed lines, one line a run of neighbours: a page of deep networks stays small."""
    drawn = []
    for start in range(0, len(chosen), columns):
        middle, column = start // columns * pitch + (pitch - gap) / 2, 0
        for taken, run in itertools.groupby(chosen[start : start + columns]):
            length = len(list(run))
            drawn += [f"M{column * pitch} {middle:g}h{length * pitch - gap}"] if taken else []
            column += length
    return "".join(drawn)


def bin_size(length: int) -> int:
    """How many elements a cell of `cells` stands for."""
    return math.ceil(length / CELLS)


def bar(share: float) -> Markup:
    """A share of 1 as a small bar."""
    return svg(
        100,
        5,
        f"{share:.0%} of the highest",
        tag("rect", width=100, height=5, class_="beyond"),
        tag("rect", width=100 * share, height=5, class_="amount"),
    )


def curve(rows: Sequence[Mapping[str, Any]], title: str, floor: float) -> Markup:
    """One stage of training: accuracy above (from `floor` up), loss below, over the same steps."""
    width, x0, x1 = 300, 44, 290
    series = {key: _points(rows, key) for key in ("accuracy", "valid_accuracy", "loss", "valid_loss")}
    steps = scale((step for points in series.values() for step, _ in points), x0, x1)
    parts: list[Markup | None] = []
    top = 24.0
    if series["accuracy"] or series["valid_accuracy"]:
        y = Scale(floor, 1.0, top + 84, top)
        parts += [left(y, x0, x1, lambda t: f"{100 * t:g}", "accuracy, %")]
        parts += [_line(series[key], steps, y, style) for key, style in (("accuracy", "train"), ("valid_accuracy", "valid"))]
        top += 114
    losses = [value for key in ("loss", "valid_loss") for _, value in series[key]]
    if losses:
        y = scale(losses, top + 84, top, log=min(losses) > 0, pad=0.05)
        parts += [left(y, x0, x1, lambda t: f"{t:.3g}", "loss, logarithmic" if y.log else "loss")]
        parts += [_line(series[key], steps, y, style) for key, style in (("loss", "train"), ("valid_loss", "valid"))]
        top += 114
    base = top - 26
    return svg(width, base + 38, title, *parts, bottom(steps, base, numbers.tick, "step"))


def accuracy_floor(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """Where the accuracy axes of all stages start: what is interesting is at the top, not the first steps from chance."""
    lows = []
    for rows in curves.values():
        for key in ("accuracy", "valid_accuracy"):
            values = sorted(value for _, value in _points(rows, key))
            lows += [values[len(values) // 4]] if values else []
    return max(0.0, min(math.floor(20 * min(lows, default=0.0)) / 20, 0.9))


def candidates(tried: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Validation accuracy of every candidate over its parameters; None where fewer than two have both."""
    shown = [c for c in tried if c.get("parameters") and c.get("valid_accuracy") is not None]
    if len(shown) < 2:
        return None
    width, base = 380, 190
    x = scale((c["parameters"] for c in shown), 40, width - 16, log=True, pad=0.08)
    reference = [c["valid_accuracy"] + c["valid_drop"] for c in shown[:1] if c.get("valid_drop") is not None]
    y = scale([c["valid_accuracy"] for c in shown] + reference, base, 28, pad=0.1)
    dots = [
        tag(
            "circle",
            cx=x(c["parameters"]),
            cy=y(c["valid_accuracy"]),
            r=5,
            class_="dot small" if c.get("holds") else "dot failed",
        )
        for c in shown
    ]
    marks = [
        join(
            tag("circle", cx=x(c["parameters"]), cy=y(c["valid_accuracy"]), r=9, class_="ring"),
            text(x(c["parameters"]), y(c["valid_accuracy"]) + 24, "chosen", class_="strong"),
        )
        for c in shown
        if c.get("chosen")
    ]
    big = [join(line(x.start, y(r), x.end, y(r), "zero"), text(x.end, y(r) - 6, "big", anchor="end")) for r in reference]
    return svg(
        width,
        base + 40,
        "Validation accuracy over parameters",
        left(y, x.start, x.end, lambda t: numbers.signless_zero(f"{100 * t:.4g}"), "validation accuracy, %"),
        bottom(x, base, numbers.tick, "parameters, logarithmic"),
        *big,
        *dots,
        *marks,
    )


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str], title: str) -> Markup:
    """A confusion matrix with its counts: right answers on the diagonal in one colour, mistakes in another."""
    cell, longest = 27, max(map(len, names))
    turned = longest > 3
    x0 = 26 + 6.2 * longest
    y0 = 26 + (6.2 * longest if turned else 12)
    parts = []
    for i, row in enumerate(counts):
        total = sum(row) or 1
        middle = y0 + (i + 0.5) * cell
        top = x0 + (i + 0.5) * cell
        parts.append(text(x0 - 6, middle + 4, names[i], anchor="end"))
        turn = {"transform": f"rotate(-90 {top + 4:.1f} {y0 - 6:.1f})", "anchor": "start"} if turned else {}
        parts.append(text(top + 4 if turned else top, y0 - 6, names[i], **turn))
        parts += [_cell(x0 + j * cell, y0 + i * cell, cell, n, n / total, i == j) for j, n in enumerate(row)]
    side = cell * len(counts)
    return svg(
        x0 + side + 4,
        y0 + side + 4,
        title,
        text(x0 + side / 2, 12, "predicted", class_="label"),
        text(12, y0 + side / 2, "true class", class_="label", transform=f"rotate(-90 12 {y0 + side / 2:.1f})"),
        *parts,
        fixed=len(counts) > 12,
    )


def _cell(x: float, y: float, size: int, n: int, share: float, right: bool) -> Markup:
    # Mistakes are few, so their shade grows with the square root of the share; every shade leaves the figure readable.
    shade = 0.45 * share if right else min(0.85, 0.15 + 0.9 * math.sqrt(share))
    fill = "right" if right else "wrong"
    box = tag(
        "rect",
        x=x,
        y=y,
        width=size - 2,
        height=size - 2,
        class_=fill if n else "none",
        fill_opacity=f"{shade:.2f}" if n else None,
    )
    return join(box, text(x + size / 2 - 1, y + size / 2 + 3, numbers.count(n)) if n else None)


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have a finite one, thinned; the last one stays."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    stride = math.ceil(len(found) / POINTS) or 1
    return found[::-1][::stride][::-1]


def _line(points: Sequence[tuple[float, float]], x: Scale, y: Scale, style: str) -> Markup | None:
    """A line through the points; what lies below the frame runs along its lower edge."""
    if not points:
        return None
    places = [(x(step), min(y(value), y.start)) for step, value in points]
    if len(places) == 1:
        return tag("circle", cx=places[0][0], cy=places[0][1], r=3, class_=f"dot {style}")
    return tag("path", d="M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places), class_=f"line {style}")
