"""Dataclasses as absl flags: one flag a field, one for each group whose kind can be chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from bmjax.config import kinds
from bmjax.config.schema import elsewhere, groups, leaves, nearest


class _FieldParser(flags.ArgumentParser):
    """Reads one config field's text."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def parse(self, argument: str) -> Any:
        return kinds.read(argument, self.kind)

    def flag_type(self) -> str:
        return kinds.type_name(self.kind)


class _KindParser(flags.ArgumentParser):
    """Reads the name of a group's kind; the value is what makes one."""

    def __init__(self, makers: Any) -> None:
        self.makers = makers

    def parse(self, argument: str) -> Any:
        if argument not in self.makers:
            raise ValueError(f"expected one of {', '.join(self.makers)}")
        return self.makers[argument]


def override(config: Any, arguments: Sequence[str], values: flags.FlagValues, root: str = "config") -> flags.FlagValues:
    """Sets, in place, every field of a dataclass that the command line names.

    Groups come first, whatever their place on the line: `--config.model=Residual` makes a default Residual, and any flag below a
    group that is None makes its first kind. Then `--config.model.layers=2` is a field of what is there.

    Args:
        config: a dataclass instance that is not frozen.
        arguments: program and arguments.
        values: flags that the line may hold beside the fields; the fields are added to it.
        root: what all paths begin with.

    Returns:
        `values`, parsed.

    Raises:
        ValueError: an unknown flag (names the nearest), text that is no value of its field, or a stray argument.
    """
    choose_groups(config, arguments, root)
    for group in groups(config, root):
        _define(values, group.path, _KindParser(group.field.metadata["kinds"]), group.field)
    fields = {leaf.path: leaf for leaf in leaves(config, root)}
    for path, leaf in fields.items():
        if path not in values:
            _define(values, path, _FieldParser(leaf.type), leaf.field, leaf.type is bool)
    parse(arguments, values, hint=lambda name: elsewhere(config, name, root))
    for path, leaf in fields.items():
        if values[path].present and not leaf.field.metadata.get("kinds"):
            object.__setattr__(leaf.owner, leaf.field.name, values[path].value)
    return values


def _define(values: flags.FlagValues, path: str, parser: flags.ArgumentParser, entry: Any, boolean: bool = False) -> None:
    flags.DEFINE_flag(flags.Flag(parser, None, path, None, entry.metadata.get("help", ""), boolean=boolean), values)


def choose_groups(config: Any, arguments: Sequence[str], root: str) -> None:
    """Puts the chosen kind into every group, in place; outer groups first, since they bring the inner ones."""
    done: set[str] = set()
    while group := next((group for group in groups(config, root) if group.path not in done), None):
        done.add(group.path)
        values = empty_flags()
        _define(values, group.path, _KindParser(group.field.metadata["kinds"]), group.field)
        parse(arguments, values, known_only=True)
        found = values[group.path]
        below = (f"--{group.path}.", f"--no{group.path}.")
        if found.present:
            make: Any = found.value
            object.__setattr__(group.owner, group.field.name, make())
        elif group.value is None and any(argument.startswith(below) for argument in arguments):
            first = next(maker for name, maker in group.field.metadata["kinds"].items() if name != "none")
            object.__setattr__(group.owner, group.field.name, first())


def fill_groups(config: Any, root: str) -> None:
    """Puts the first kind into every group that is None, in place, so that its fields can be shown."""
    while group := next((group for group in groups(config, root) if group.value is None), None):
        first = next(maker for name, maker in group.field.metadata["kinds"].items() if name != "none")
        object.__setattr__(group.owner, group.field.name, first())


def empty_flags() -> flags.FlagValues:
    """A set of flags apart from absl's global ones, that goes on after a stray argument, so that it can be named."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    return values


def parse(
    arguments: Sequence[str],
    values: flags.FlagValues,
    known_only: bool = False,
    hint: Callable[[str], str] = lambda name: "",
) -> flags.FlagValues:
    """The flags with their values; a ValueError says what was wrong, unless only the known flags are looked for.

    Args:
        arguments: program and arguments.
        values: the flags.
        known_only: pass over what is no flag.
        hint: what to add to the error about a flag that there is not.
    """
    try:
        stray = values(list(arguments), known_only=known_only)[1:]
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unknown(error.flagname, list(values)) + hint(error.flagname)) from None
    except flags.Error as error:
        raise ValueError(str(error).removeprefix("flag ")) from None
    if stray and not known_only:
        example = "--config=<preset> or --config.<field>=<value>" if "config" in values else f"--{next(iter(values))}=<value>"
        raise ValueError(f"stray argument {stray[0]!r}; every option is a flag such as {example}")
    return values


def _unknown(name: str, known: list[str]) -> str:
    below = [other for other in known if other.startswith(f"{name}.")]
    if below:
        return f"{name} is a group of fields; set one of them: {', '.join(f'--{other}' for other in below)}"
    if name.startswith("config."):
        return f"the config has no field {name}; the nearest is {nearest(name, [o for o in known if o.startswith('config.')])}"
    return f"there is no flag --{name}; the nearest is --{nearest(name, known)}"
