"""Annotated types: does a value fit, how is it called, how is it read from the command line's text."""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import types
import typing
from typing import Any


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type: a bool is no int, an int is a fine float, NaN and infinity are no floats."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any:
        return True
    if _is_union(kind):
        return any(fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is collections.abc.Callable:
        return callable(value)
    if origin in (int, float):
        return isinstance(value, (int, origin)) and not isinstance(value, bool) and math.isfinite(value)
    if not isinstance(value, origin):
        return False
    if isinstance(value, tuple) and arguments:
        kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        return len(value) == len(kinds) and all(map(fits, value, kinds))
    if isinstance(value, collections.abc.Mapping) and arguments:
        return all(fits(key, arguments[0]) and fits(item, arguments[1]) for key, item in value.items())
    if isinstance(value, list) and arguments:
        return all(fits(item, arguments[0]) for item in value)
    return True


_WORDS = {bool: "true or false", int: "an int", float: "a finite number", str: "text", types.NoneType: "none", Any: "anything"}


def words(kind: Any) -> str:
    """What an error says is expected."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind in _WORDS:
        return _WORDS[kind]
    if _is_union(kind):
        return " or ".join(words(option) for option in sorted(arguments, key=lambda option: option is not types.NoneType))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple and arguments:
        if arguments[1:] == (...,):
            return f"a tuple, each item {words(arguments[0])}"
        return f"a tuple of {len(arguments)}: {', '.join(map(words, arguments))}"
    if origin is dict and arguments:
        return f"a dict of names, each with {words(arguments[1])}"
    if origin is collections.abc.Callable:
        return "a function, set in a config file"
    name = getattr(origin, "__name__", str(origin))
    return f"{name}, set in a config file" if dataclasses.is_dataclass(origin) else f"a {name}"


def type_name(kind: Any) -> str:
    """What `--help` shows."""
    if kind is types.NoneType:
        return "none"
    if _is_union(kind):
        return " | ".join(type_name(option) for option in typing.get_args(kind))
    if (typing.get_origin(kind) or kind) is collections.abc.Callable:
        return "function"
    if kind is Ellipsis:
        return "..."
    if arguments := typing.get_args(kind):
        if typing.get_origin(kind) is typing.Literal:
            return " | ".join(map(str, arguments))
        return f"{typing.get_origin(kind).__name__}[{', '.join(map(type_name, arguments))}]"
    return getattr(kind, "__name__", str(kind))


def short_name(kind: Any) -> str:
    """What `--help` shows: text as the command line takes it, "int,..." for a tuple of ints."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if _is_union(kind):
        return " | ".join(dict.fromkeys(short_name(option) for option in arguments))
    if origin is tuple and arguments:
        return ",".join("..." if item is Ellipsis else short_name(item) for item in arguments)
    if origin is dict and arguments:
        simple = arguments[1] in (int, float, str, bool)
        return f"name={short_name(arguments[1])},..." if simple else "dict"
    if origin is list:
        return "list"
    return type_name(kind)


def read(text: str, kind: Any) -> Any:
    """A value of an annotated type from the command line's text; ValueError if the text does not say one."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if _is_union(kind):
        for option in sorted(arguments, key=lambda option: option is str):  # text is anything, so it comes last
            try:
                return read(text, option)
            except ValueError:
                continue
    elif kind is types.NoneType and text.lower() == "none":
        return None
    elif kind is bool and text.lower() in ("true", "false", "1", "0"):
        return text.lower() in ("true", "1")
    elif kind in (str, Any):
        return text
    elif origin is tuple and arguments:
        items = [item.strip() for item in text.strip("()[] ").split(",") if item.strip()]
        kinds = [arguments[0]] * len(items) if arguments[1:] == (...,) else arguments
        if len(items) == len(kinds):
            try:
                return tuple(map(read, items, kinds))
            except ValueError:
                pass  # what is expected is the whole tuple
    elif origin is dict and arguments and all("=" in item for item in text.split(",") if item):
        pairs = [item.split("=", 1) for item in text.split(",") if item]
        found = {key.strip(): read(item.strip(), arguments[1]) for key, item in pairs}
        if len(found) == len(pairs):
            return found
        raise ValueError(f"expected each name once, each with {words(arguments[1])}")
    elif origin is typing.Literal and text in map(str, arguments):
        return next(option for option in arguments if str(option) == text)
    elif kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise ValueError(f"expected {words(kind)}")
