"""Fields with help and checks; validation and freezing of nested dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from bmjax.config import kinds

Config = TypeVar("Config")
Check = tuple[Callable[[Any], bool], str] | Callable[[Any], None]  # (predicate, "above 0"), or a function that raises ValueError


def field(
    default: Any,
    help: str,
    *,
    choices: Iterable[Any] | None = None,
    check: Check | None = None,
    kinds: Mapping[str, Callable[[], Any]] | None = None,
) -> Any:
    """A dataclass field with its one-line help; a mutable default is copied for each instance.

    Args:
        default: the value when none is given.
        help: one line for `--help`.
        choices: the only values allowed.
        check: `(predicate, words)`, the words following the type in an error ("above 0"), or a function that raises ValueError.
        kinds: for a field that holds a dataclass: {name: what makes one, or None}. `--config.<field>=<name>` puts it in place,
            and a flag below a field that is None puts the first kind that is not "none" there.
    """
    metadata = {"help": help, "choices": None if choices is None else tuple(choices), "check": check, "kinds": kinds}
    return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)


def recorded(help: str) -> Any:
    """A dict field that `launch` fills: it stands in the record and in the fingerprint, and is no flag."""
    return dataclasses.field(default_factory=dict, metadata={"help": help, "recorded": True})


def above(low: float) -> Check:
    """Check for numbers greater than `low`."""
    return (lambda value: value > low), f"above {low:g}"


def at_least(low: float) -> Check:
    """Check for numbers not less than `low`."""
    return (lambda value: value >= low), f"of at least {low:g}"


def within(low: float, high: float, *, open_high: bool = False) -> Check:
    """Check for numbers in [low, high], or in [low, high) with `open_high`."""
    bracket = ")" if open_high else "]"
    return (lambda value: low <= value < high or (value == high and not open_high)), f"in [{low:.10g}, {high:.10g}{bracket}"


class Leaf(NamedTuple):
    """One field that holds a value and not more fields.

    Attributes:
        path: dotted, "config.optimizer.learning_rate".
        owner: the dataclass instance that has it.
        field: its dataclass field.
        type: its annotation, resolved.
        value: what it holds.
    """

    path: str
    owner: Any
    field: dataclasses.Field
    type: Any
    value: Any


def leaves(config: Any, path: str = "config") -> Iterator[Leaf]:
    """Every leaf below a dataclass instance, in the order of definition; tuples and dicts of dataclasses are entered too.

    Paths begin with `path`, or with the field's own name where it is empty.
    """
    hints = typing.get_type_hints(type(config))
    for entry in dataclasses.fields(config):
        if entry.metadata.get("recorded"):
            continue
        value, where = getattr(config, entry.name), _below(path, entry.name)
        children = list(_children(value, where))
        for child, child_path in children:
            yield from leaves(child, child_path)
        if not children:
            yield Leaf(where, config, entry, hints[entry.name], value)


def groups(config: Any, path: str = "config") -> Iterator[Leaf]:
    """Every field below a dataclass instance that has `kinds` to choose from, outer ones first; its value may be None."""
    hints = typing.get_type_hints(type(config))
    for entry in dataclasses.fields(config):
        value, where = getattr(config, entry.name), _below(path, entry.name)
        if entry.metadata.get("kinds"):
            yield Leaf(where, config, entry, hints[entry.name], value)
        for child, child_path in _children(value, where):
            yield from groups(child, child_path)


def branches(config: Any, path: str = "config") -> Iterator[Leaf]:
    """Every field below a dataclass instance that holds more fields, outer ones first; each item of a tuple or dict is one."""
    hints = typing.get_type_hints(type(config))
    for entry in dataclasses.fields(config):
        for child, child_path in _children(getattr(config, entry.name), _below(path, entry.name)):
            yield Leaf(child_path, config, entry, hints[entry.name], child)
            yield from branches(child, child_path)


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _children(value: Any, path: str) -> Iterator[tuple[Any, str]]:
    """The dataclass instances that a field's value is made of, with their paths."""
    if is_config(value):
        yield value, path
    elif isinstance(value, (tuple, list)) and all(map(is_config, value)):
        yield from ((item, f"{path}.{index}") for index, item in enumerate(value))
    elif isinstance(value, dict) and all(map(is_config, value.values())):
        yield from ((item, f"{path}.{name}") for name, item in value.items())


def is_config(value: Any) -> bool:
    """Whether a value is a dataclass instance."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def validate(config: Any, path: str = "config") -> None:
    """Checks types, choices and checks of every field, then each dataclass's own `validate(self)`.

    Raises:
        ValueError: names the first wrong field by its dotted path, what it holds and what was expected.
    """
    hints = typing.get_type_hints(type(config))
    for entry in dataclasses.fields(config):
        value, where, kind = getattr(config, entry.name), _below(path, entry.name), hints[entry.name]
        choices, check = entry.metadata.get("choices"), entry.metadata.get("check")
        predicate, words = check if isinstance(check, tuple) else (None, "")
        expected = f"expected {kinds.words(kind)} {words}".rstrip()
        if not kinds.fits(value, kind):
            raise ValueError(f"{where} is {value!r}; {expected}")
        for child, child_path in _children(value, where):
            validate(child, child_path)
        if value is None:
            continue
        if choices is not None and value not in choices:
            listed = ", ".join("nothing" if choice == "" else str(choice) for choice in choices)
            raise ValueError(f"{where} is {value!r}; expected one of {listed}")
        if predicate is not None and not predicate(value):
            raise ValueError(f"{where} is {value!r}; {expected}")
        if check is not None and predicate is None:
            _prefixed(where, check, value)
    if hasattr(config, "validate"):
        _prefixed(path, config.validate)


def _prefixed(path: str, check: Callable[..., Any], *arguments: Any) -> None:
    try:
        check(*arguments)
    except ValueError as error:
        raise ValueError(str(error) if not path or str(error).startswith(path) else f"{path}: {error}") from None


def freeze(config: Config) -> Config:
    """The same values in instances whose fields cannot be assigned; `dataclasses.replace` gives another frozen one."""
    return rebuild(config, _frozen_class)


def rebuild(config: Config, class_of: Callable[[type], type] = lambda cls: cls) -> Config:
    """A copy in which no two fields share an instance, made of the classes that `class_of` gives for the original ones."""
    copied: Any = object.__new__(class_of(type(config)))
    for entry in dataclasses.fields(config):  # type: ignore[arg-type]
        object.__setattr__(copied, entry.name, _rebuild_value(getattr(config, entry.name), class_of))
    return copied


def _rebuild_value(value: Any, class_of: Callable[[type], type]) -> Any:
    if is_config(value):
        return rebuild(value, class_of)
    if type(value) in (tuple, list):
        return type(value)(_rebuild_value(item, class_of) for item in value)
    if isinstance(value, dict):
        return {key: _rebuild_value(item, class_of) for key, item in value.items()}
    return value


@functools.cache
def _frozen_class(cls: type) -> type:
    """A subclass that refuses assignment, under the same name."""
    if getattr(cls, "_is_frozen", False):
        return cls

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        frozen = freeze(cls(*args, **kwargs))
        for entry in dataclasses.fields(cls):
            object.__setattr__(self, entry.name, getattr(frozen, entry.name))

    def refuse(self: Any, name: str, *value: Any) -> None:
        raise dataclasses.FrozenInstanceError(f"the config is frozen; {cls.__name__}.{name} cannot be set any more")

    body = {"__init__": init, "__setattr__": refuse, "__delattr__": refuse, "_is_frozen": True}
    return type(cls.__name__, (cls,), {**body, "__module__": cls.__module__, "__qualname__": cls.__qualname__})


def elsewhere(config: Any, name: str, path: str = "config") -> str:
    """A hint for a path that no field has: " (there is one with --config.model=Decoder, Encoder)"; "" if no kind has it."""
    for group in groups(config, path):
        rest, makers = name.removeprefix(f"{group.path}."), group.field.metadata["kinds"]
        if rest == name:
            continue
        made = {kind: make() for kind, make in makers.items()}
        fits = [kind for kind, one in made.items() if is_config(one) and any(leaf.path == rest for leaf in leaves(one, ""))]
        if (fits and group.value is not None) or (fits and "none" in makers):
            return f" (there is one with --{group.path}={', '.join(fits)})"
    return ""


def nearest(name: str, names: Iterable[str]) -> str:
    """The most similar of some dotted names; a name whose last part is the same counts as very near."""

    def likeness(other: str) -> float:
        last = difflib.SequenceMatcher(None, name.rsplit(".", 1)[-1], other.rsplit(".", 1)[-1]).ratio()
        return difflib.SequenceMatcher(None, name, other).ratio() + last

    return max(names, key=likeness, default="")
