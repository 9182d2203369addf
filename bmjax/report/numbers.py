"""Numbers as people read them: 536k, 12.6x, 97.9%. A missing or non-finite number is a dash."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

MISSING = "–"


def _dash_if_missing(write: Callable[[float], str]) -> Callable[[float | None], str]:
    @functools.wraps(write)
    def guarded(x: float | None) -> str:
        return write(x) if x is not None and math.isfinite(x) else MISSING

    return guarded


def _scaled(x: float, units: tuple[str, ...]) -> str:
    """Three significant digits and the unit of the matching power of 1000."""
    x = float(f"{x:.3g}")  # rounded first, so that 999,999 becomes 1.00M and not 1000k
    power = 0 if x < 1000 else min(int(math.log10(x) / 3 + 1e-9), len(units) - 1)
    x /= 1000**power
    digits = 0 if power == 0 else max(0, 2 - int(math.log10(x)))
    return f"{x:,.{digits}f}{units[power]}"


@_dash_if_missing
def count(x: float) -> str:
    """3,466 as it is; 10,000 and more in three digits: 536k, 2.14M."""
    return f"{x:,.0f}" if x < 10_000 else _scaled(x, ("", "k", "M", "G", "T", "P", "E"))


def tick(x: float) -> str:
    """`count` for an axis, without decimals that are zero: 30k, 1.5M."""
    return re.sub(r"(\.\d*?)0+(?=\D)", lambda found: found[1].rstrip("."), count(x))


@_dash_if_missing
def nbytes(x: float) -> str:
    """Bytes in decimal units: 2.14 MB."""
    return _scaled(x, (" B", " kB", " MB", " GB", " TB"))


@_dash_if_missing
def percent(x: float) -> str:
    """A fraction in percent; what is not quite 100% does not claim to be."""
    text = f"{100 * x:.1f}%"
    return f"{100 * x:.2f}%" if text == "100.0%" and x < 1 else text


@_dash_if_missing
def points(x: float) -> str:
    """A difference of fractions in percentage points, two digits: 0.28, −0.40."""
    return signless_zero(f"{100 * x:.2f}")


@_dash_if_missing
def milliseconds(x: float) -> str:
    """Three digits: 0.391 ms, 12.4 ms, 1,240 ms."""
    return (f"{x:,.0f}" if x >= 100 else f"{x:.3g}") + " ms"


@_dash_if_missing
def decimal(x: float) -> str:
    """Four decimals, for losses and calibration errors."""
    return f"{x:.4f}"


def signless_zero(text: str) -> str:
    """A typographic minus, and none before a zero."""
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def times(before: float | None, after: float | None, less: str, more: str) -> str:
    """How many times less (or more) `after` is than `before`: "12.6x fewer"; "" where either is missing or not above 0."""
    if not before or not after or before < 0 or after < 0:
        return ""
    ratio, word = (before / after, less) if before >= after else (after / before, more)
    text = f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.1f}"
    return "the same" if text == "1.0" else f"{text}x {word}"
