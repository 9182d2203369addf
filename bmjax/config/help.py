"""The page that `--help` prints: a config's fields in sections, wrapped to the terminal."""

from __future__ import annotations

import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from bmjax.config import kinds
from bmjax.config.record import plain
from bmjax.config.schema import Leaf, branches, groups, leaves, nearest

WIDEST, NARROWEST = 130, 60  # columns of a page
_COLUMN, _TEXT = 26, 34  # the widest type or default that the others wait for, and the least room for a description
Row = tuple[str, str, str, str]  # flag, type, default, what it is


def page(
    about: str,
    usage: str,
    flags: Sequence[Row],
    presets: Sequence[tuple[str, str]],
    config: Any,
    root: str,
    title: str,
    word: str,
) -> str:
    """All that `--help` prints; with a word only the fields whose flag has it.

    Args:
        about: what the program does.
        usage: a command line.
        flags: rows of the flags beside the fields.
        presets: (name, what it is) each.
        config: a dataclass instance, whose fields follow in sections.
        root: what their flags begin with, "config" or "".
        title: what the fields are called, "Fields of article".
        word: of `--help=<word>`; "" shows everything.

    Raises:
        ValueError: no field's flag has the word.
    """
    chosen = list(leaves(config, root))
    if word:
        chosen = [leaf for leaf in chosen if word in leaf.path]
        if not chosen:
            known = {part for leaf in leaves(config, root) for part in leaf.path.split(".")}
            raise ValueError(f"--help={word}: no field's flag has {word!r} in it; the nearest word is {nearest(word, known)!r}")
        return "\n".join([f"{title} with {word!r} in the flag:", *sections(config, root, chosen)])
    parts = [*wrapped(about.strip()), "", *wrapped(f"Usage: {usage}"), "", "Flags (type, default, what it is):", *table(flags)]
    if presets:
        parts += ["", "Presets (--config=<name>):", *table([(name, "", "", line) for name, line in presets])]
    if there := [_kinds(group) for group in groups(config, root)]:
        words = f"Kinds (now, what it is); --{there[0][0].removeprefix('--')}=<kind> puts another there, with fields of its own:"
        parts += ["", *wrapped(words), *table(there)]
    parts += ["", *wrapped(f"{title} (flag, type, default, what it is); --help=<word> shows those with the word in the flag:")]
    return "\n".join([*parts, *sections(config, root, chosen)])


def sections(config: Any, root: str, chosen: Iterable[Leaf]) -> list[str]:
    """Lines of some leaves of a config, those of one dataclass under one heading."""
    headings = {branch.path: f"{branch.path}: {branch.field.metadata.get('help', '')}" for branch in branches(config, root)}
    found: dict[str, list[Row]] = {}
    for leaf in chosen:
        found.setdefault(leaf.path.rpartition(".")[0], []).append(_row(leaf))
    lines: list[str] = []
    for path, rows in found.items():
        lines += ["", *wrapped(headings[path].removesuffix(": "))] if path in headings else [""] if lines else []
        lines += table(rows)
    return lines


def _row(leaf: Leaf) -> Row:
    about = leaf.field.metadata
    choices = [str(choice) for choice in about.get("choices") or about.get("kinds") or () if choice != ""]
    allowed = f" (one of {', '.join(choices)})" if choices else ""
    return f"--{leaf.path}", kinds.short_name(leaf.type), shown(leaf.value), about.get("help", "") + allowed


def _kinds(group: Leaf) -> Row:
    kind, about = group.value, group.field.metadata
    there = "none" if kind is None else str(getattr(kind, "__name__", type(kind).__name__))
    return f"--{group.path}", "", there, f"{about['help']} (one of {', '.join(about['kinds'])})"


def shown(value: Any) -> str:
    """A value as the command line takes it; an empty one as quotes."""
    if isinstance(value, (tuple, list)) and value:
        return ",".join(map(shown, value))
    if isinstance(value, dict) and value:
        return ",".join(f"{key}={shown(item)}" for key, item in value.items())
    if isinstance(value, (bool, types.NoneType)):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    return (value or '""') if isinstance(value, str) else str(plain(value)) if value else '""'


def table(rows: Sequence[Row]) -> list[str]:
    """Aligned columns; what a flag is is wrapped beside them, or below where there is no room."""
    widths = [max((len(row[0]) for row in rows), default=0)]
    widths += [max((len(row[column]) for row in rows if len(row[column]) <= _COLUMN), default=0) for column in (1, 2)]
    lines: list[str] = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths) if width or cell]
        start = f"  {'  '.join(cells)}  "
        indent = 2 + sum(width + 2 for width in widths if width)
        beside = columns() - indent >= _TEXT
        if beside and len(start) <= indent:
            lines += textwrap.wrap(row[3], columns(), initial_indent=start, subsequent_indent=" " * indent, **_WRAP) or [start]
        else:  # an entry wider than its column, or a narrow terminal
            below = " " * (indent if beside else 6)
            lines += [start, *textwrap.wrap(row[3], columns(), initial_indent=below, subsequent_indent=below, **_WRAP)]
    return [line.rstrip() for line in lines]


_WRAP: dict[str, typing.Any] = {"break_long_words": False, "break_on_hyphens": False}


def wrapped(text: str) -> list[str]:
    """Paragraphs wrapped to the terminal; lines of commands stay as they are."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        whole = paragraph.startswith(("python", " "))
        lines += ["", *(paragraph.splitlines() if whole else textwrap.wrap(paragraph, columns(), **_WRAP))]
    return lines[1:]


def columns() -> int:
    """The terminal's width, within limits; that of a page where there is none."""
    return min(WIDEST, max(NARROWEST, shutil.get_terminal_size((WIDEST, 24)).columns))
