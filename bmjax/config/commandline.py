"""The command line of every experiment."""

from __future__ import annotations

import dataclasses
import logging as python_logging
import pathlib
import shlex
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags, logging

from bmjax.config import flagged, help
from bmjax.config.load import described, load
from bmjax.config.schema import freeze, validate
from bmjax.config.tracebacks import of_user

_OURS = ("bmjax", "experiments")  # a ValueError raised in these packages is a message to the user


def launch(
    main: Callable[[Any, pathlib.Path, str], object],
    *,
    presets: pathlib.Path,
    default: str,
    about: str,
    short: Mapping[str, str] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Parses the command line, then calls `main(frozen config, workdir, command)`.

    Exits with 2 and one line on stderr after a mistake of the user's, with 130 after Ctrl-C. An exception in a function of the
    user's exits with 1 and the part of the traceback that lies in her files; `--debug` keeps all.

    Args:
        main: the experiment.
        presets: folder of <name>.py files, each with `get_config()` that returns a dataclass.
        default: name of the preset used without `--config`.
        about: what the experiment does, for `--help`.
        short: {flag: the field that it stands for}, {"profile": "config.run.profile"}.
        argv: program and arguments; `sys.argv` if not given.
    """

    def run(given: list[str], chosen: flags.FlagValues, word: str) -> None:
        arguments = [_long(argument, short or {}) for argument in given]
        config = load(chosen.config, presets)
        _check_kind(chosen.config, config, main)
        if chosen.help:
            flagged.choose_groups(config, arguments, "config")
            if word:
                flagged.fill_groups(config, "config")
            stands = [(f"--{name}", "", "", f"is --{path}") for name, path in (short or {}).items()]
            rows = [*_rows(_preset_flags(default)), *stands]
            usage = f"{_program(given)} [--config=<preset>] [--config.<field>=<value> ...] [--workdir=<folder>]"
            there = list(described(presets).items())
            print(help.page(about, usage, rows, there, config, "config", f"Fields of {chosen.config}", word))
            return
        flagged.override(config, arguments, _preset_flags(default))
        validate(config)
        workdir = pathlib.Path(chosen.workdir or f"runs/{pathlib.Path(chosen.config).stem}").expanduser()
        main(freeze(config), workdir, command(given))

    _guarded(run, _preset_flags(default), argv)


def _long(argument: str, short: Mapping[str, str]) -> str:
    """`--profile=1:2` as `--config.run.profile=1:2`."""
    name, equals, value = argument.removeprefix("--").partition("=")
    return f"--{short[name]}={value}" if argument.startswith("--") and equals and name in short else argument


def _check_kind(name: str, config: Any, main: Callable[..., object]) -> None:
    """Raises ValueError unless the config is of the class that `main` says its first argument is."""
    kind = next(iter(typing.get_type_hints(main).values()), Any)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and not isinstance(config, kind):
        found, wanted = (f"{cls.__module__}.{cls.__qualname__}" for cls in (type(config), kind))
        raise ValueError(f"{name} makes a {found}; this experiment takes a {wanted}")


def from_arguments(arguments: Sequence[str], presets: pathlib.Path, default: str) -> Any:
    """The config that `launch` would make of `--config...` arguments, not validated and not frozen.

    Raises:
        ValueError: as `launch` would say.
    """
    line = ["", *arguments]
    chosen = _preset_flags(default)
    flagged.parse(line, chosen, known_only=True)
    config = load(chosen.config, presets)
    flagged.override(config, line, _preset_flags(default))
    return config


def launch_settings(
    main: Callable[[Any, list[str], str], object],
    *,
    settings: Callable[[str], Any],
    about: str,
    by: str = "",
    forwards: str = "",
    argv: Sequence[str] | None = None,
) -> None:
    """Parses the command line of a program without presets, then calls `main(frozen settings, forwarded arguments, command)`.

    The settings' fields are flags by their own names: `--data.batch=64`. Ends as `launch` does.

    Args:
        main: the program.
        settings: value of the flag `by` -> dataclass instance with the defaults.
        about: what the program does, for `--help`.
        by: name of a field that is looked at first, because defaults depend on it; "" is passed where it is not given.
        forwards: arguments `--<forwards>...` are handed on as they are.
        argv: program and arguments; `sys.argv` if not given.
    """

    def run(arguments: list[str], chosen: flags.FlagValues, word: str) -> None:
        rest = [a for a in arguments[1:] if forwards and a.startswith((f"--{forwards}", f"--no{forwards}"))]
        own = [a for a in arguments if a not in rest]
        first = flagged.empty_flags()
        flags.DEFINE_string(by or "-", "", "", flag_values=first)
        flagged.parse(own, first, known_only=True)
        found = settings(first[by or "-"].value or "")
        if chosen.help:
            flagged.choose_groups(found, own, "")
            usage = f"{_program(arguments)} [--<field>=<value> ...]" + (f" [--{forwards}...]" if forwards else "")
            print(help.page(about, usage, _rows(_settings_flags()), [], found, "", "Settings", word))
            return
        flagged.override(found, own, _settings_flags(), "")
        validate(found, "")
        main(freeze(found), rest, command(arguments))

    _guarded(run, _settings_flags(), argv)


_HELP = {
    "config": "name of a preset, or path of a .py file with get_config()",
    "workdir": "folder for everything written; runs/<preset> if not given",
}
_TYPES = {"string": "str", "bool": "bool"}


def _settings_flags() -> flags.FlagValues:
    """The flags that every program has."""
    values = flagged.empty_flags()
    flags.DEFINE_boolean("debug", False, "keep the full traceback of every error", flag_values=values)
    flags.DEFINE_boolean(
        "help", False, "show this; --help=<word> shows the fields with the word in their flag", short_name="h", flag_values=values
    )
    return values


def _preset_flags(default: str) -> flags.FlagValues:
    """The flags of every program with presets, in a set of their own: absl's global flags stay out of it."""
    values = _settings_flags()
    flags.DEFINE_string("config", default, _HELP["config"], flag_values=values)
    flags.DEFINE_string("workdir", None, _HELP["workdir"], flag_values=values)
    return values


def _guarded(
    run: Callable[[list[str], flags.FlagValues, str], None], common: flags.FlagValues, argv: Sequence[str] | None
) -> None:
    """Calls `run(arguments, common flags, word of --help=<word>)`; what goes wrong ends as `launch` says."""
    arguments, word = _help_word(sys.argv if argv is None else argv)
    flags.FLAGS(arguments[:1])  # absl's own flags keep their defaults; its logging warns until they are parsed
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    python_logging.getLogger("jax").setLevel(python_logging.WARNING)  # else it tells of every backend that is not there
    debug = False
    try:
        chosen = flagged.parse(arguments, common, known_only=True)
        debug = chosen.debug
        run(arguments, chosen, word)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not debug and isinstance(error, ValueError) and _is_ours(error):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        if debug or not (shown := of_user(error)):
            raise
        print(shown, file=sys.stderr)
        sys.exit(1)


def _rows(common: flags.FlagValues) -> list[help.Row]:
    """The flags beside the fields."""
    names = [name for name in ("config", "workdir", "debug", "help") if name in common]
    return [
        (f"--{name}", _TYPES[common[name].flag_type()], help.shown(common[name].default), common[name].help) for name in names
    ]


def _help_word(arguments: Sequence[str]) -> tuple[list[str], str]:
    """(arguments with `--help` in place of `--help=<word>`, the word or "")."""
    asked = [argument for argument in arguments if argument.startswith("--help=")]
    words = [word for argument in asked if (word := argument.partition("=")[2]) not in ("true", "1")]
    return ["--help" if argument in asked else argument for argument in arguments], words[-1] if words else ""


def _program(arguments: Sequence[str]) -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return shlex.join(["python", "-m", spec.name.removesuffix(".__main__")] if spec else ["python", arguments[0]])


def command(arguments: Sequence[str]) -> str:
    """The command line as a person would type it."""
    return " ".join([_program(arguments), *map(shlex.quote, arguments[1:])])


def _is_ours(error: BaseException) -> bool:
    """Whether the innermost frame of a traceback lies in these packages."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    package = "" if trace is None else trace.tb_frame.f_globals.get("__package__") or ""
    return package.split(".")[0] in _OURS
