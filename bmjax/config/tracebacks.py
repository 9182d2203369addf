"""The part of a traceback that lies in the user's own files."""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from typing import Any

from bmjax.config.schema import nearest

_OF_JAX = ("-" * 20, "For simplicity, JAX has removed")  # its note on its own frames, which are not shown either way
_PACKAGES = ("bmjax", "experiments")
_INSTALLED = tuple(str(pathlib.Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib"))
_HERE = str(pathlib.Path(__file__).resolve().parents[1])


def own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of an exception, outermost first, that are neither ours nor those of an installed library."""
    found = []
    trace = error.__traceback__
    for summary, (frame, _) in zip(traceback.extract_tb(trace), traceback.walk_tb(trace)):
        package = (frame.f_globals.get("__package__") or frame.f_globals.get("__name__") or "").split(".")[0]
        file = summary.filename
        if not file.startswith("<") and package not in _PACKAGES and not str(pathlib.Path(file).resolve()).startswith(_INSTALLED):
            found.append(summary)
    return [frame for frame in found if not frame.filename.startswith(_HERE)]


def of_user(error: BaseException) -> str:
    """The traceback of an exception as the user's files see it; "" if none of them had a part in it."""
    frames = own_frames(error)
    if not frames:
        return ""
    head = "Traceback (most recent call last), your files only; --debug shows all:\n"
    lines = list(traceback.TracebackException.from_exception(error, compact=True).format_exception_only())
    lines = [line for line in lines if not line.startswith(_OF_JAX)]
    return "".join([head, *traceback.format_list(frames), *lines]).rstrip()


def misfit(function: Any, arguments: tuple[str, ...]) -> str:
    """What is wrong if a user's function cannot be called with so many arguments, named for the message; "" if it can be."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # compiled ones have none
        return ""
    try:
        signature.bind(*arguments)
    except TypeError:
        name = getattr(function, "__qualname__", type(function).__name__)
        return f"the function {name}{signature} cannot be called with ({', '.join(arguments)})"
    return ""


def misspelt(error: TypeError) -> str:
    """What is wrong, where a config's class was called with a field that it has not: "file:line: ..."; "" if it was not that."""
    found = re.match(r"(?:.*\.)?(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    frames = own_frames(error)
    if not found or not frames:
        return ""
    for cls in _configs(found[1]):
        names = [entry.name for entry in dataclasses.fields(cls)]
        if found[2] not in names:
            where = f"{frames[-1].filename}:{frames[-1].lineno}"
            return f"{where}: {found[1]} has no field {found[2]!r}; the nearest is {nearest(found[2], names)!r}"
    return ""


def _configs(name: str) -> Iterator[type]:
    for module in list(sys.modules.values()):
        cls = getattr(module, name, None)
        if isinstance(cls, type) and cls.__name__ == name and dataclasses.is_dataclass(cls):
            yield cls
