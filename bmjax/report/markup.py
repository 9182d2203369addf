"""HTML and SVG elements as strings. Text is escaped here, once, so that nothing else has to think of it."""

from __future__ import annotations

import html
from typing import Any


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """One element.

    Args:
        name: its name.
        *children: Markup as it is, anything else escaped; None is left out.
        **attributes: `class_` is class, `stroke_width` is stroke-width; floats are rounded to 0.1; None is left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Any) -> Markup:
    """Markup of all children in a row; the rules of `tag`."""
    return Markup(
        "".join(child if isinstance(child, Markup) else html.escape(str(child)) for child in children if child is not None)
    )


def _value(value: Any) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
