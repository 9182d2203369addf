"""Scales, ticks and axes that the pictures share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from bmjax.report.markup import Markup, join, tag


class Scale(NamedTuple):
    """Values [low, high] to positions [start, end], linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, x: float) -> float:
        """The position of a value."""
        bend = math.log if self.log else float
        return self.start + (self.end - self.start) * (bend(x) - bend(self.low)) / (bend(self.high) - bend(self.low))


def scale(values: Iterable[float], start: float, end: float, *, log: bool = False, pad: float = 0.0) -> Scale:
    """A scale over all values, with a share `pad` of their span free at each end; one single value gets room around it."""
    found = list(values)
    low, high = min(found), max(found)
    if log:
        low, high = (low / 1.5, high * 1.5) if low == high else (low, high)
        factor = (high / low) ** pad
        return Scale(low / factor, high * factor, start, end, True)
    low, high = (low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)) if low == high else (low, high)
    room = (high - low) * pad
    return Scale(low - room, high + room, start, end)


def ticks(scale: Scale, about: int = 4) -> list[float]:
    """Round values inside the scale: powers of ten on a long logarithmic scale, else multiples of 1, 2 or 5."""
    if scale.log:
        decades = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            found = [s * 10.0**d for d in decades for s in steps if scale.low <= s * 10.0**d <= scale.high]
            if len(found) >= 3:
                return found[:: math.ceil(len(found) / (about + 2))]
        if found:
            return found
    raw = (scale.high - scale.low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= 0.7 * raw)
    first = math.ceil(scale.low / step - 1e-9)
    return [i * step for i in range(first, math.floor(scale.high / step + 1e-9) + 1)]


def text(x: float, y: float, words: Any, *, anchor: str = "middle", class_: str | None = None, **attributes: Any) -> Markup:
    """One line of text with its baseline at (x, y)."""
    return tag("text", words, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return tag("path", d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}", class_=class_)


def bottom(x: Scale, y: float, write: Callable[[float], str], label: str, about: int = 4) -> Markup:
    """A horizontal axis at height y: line, ticks, figures and label."""
    marks = [
        # The last figure ends at the axis, or it would leave the picture.
        join(line(x(t), y, x(t), y + 4, "axis"), text(x(t), y + 16, write(t), anchor="middle" if x.end - x(t) > 12 else "end"))
        for t in ticks(x, about)
    ]
    return join(line(x.start, y, x.end, y, "axis"), *marks, text((x.start + x.end) / 2, y + 32, label, class_="label"))


def left(y: Scale, x0: float, x1: float, write: Callable[[float], str], label: str, about: int = 3) -> Markup:
    """A vertical axis from x0, its grid lines to x1, and its label above it."""
    marks = [join(line(x0, y(t), x1, y(t), "grid"), text(x0 - 6, y(t) + 4, write(t), anchor="end")) for t in ticks(y, about)]
    return join(*marks, text(x0, min(y.start, y.end) - 8, label, anchor="start", class_="label"))


def svg(width: float, height: float, title: str, *children: Markup | None, fixed: bool = False) -> Markup:
    """A picture of that size, at most as wide as its place; `fixed` ones keep their size and scroll instead."""
    return tag(
        "svg",
        tag("title", title),
        *children,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=int(width),
        height=int(height) if fixed else None,
        role="img",
        class_="fixed" if fixed else None,
    )
