"""The command line of every experiment."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags, logging

from bmjax.config import kinds
from bmjax.config.record import describe
from bmjax.config.schema import Leaf, freeze, is_config, leaves, nearest, rebuild, validate

_OURS = ("bmjax", "experiments")  # a ValueError raised in these packages is a message to the user


def launch(
    main: Callable[[Any, pathlib.Path, str], object],
    *,
    presets: pathlib.Path,
    default: str,
    about: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Parses the command line, then calls `main(frozen config, workdir, command)`.

    Exits with 2 and one line on stderr after a mistake of the user's, with 130 after Ctrl-C. An exception from code outside
    bmjax and experiments keeps its traceback; `--debug` keeps all.

    Args:
        main: the experiment.
        presets: folder of <name>.py files, each with `get_config()` that returns a dataclass.
        default: name of the preset used without `--config`.
        about: what the experiment does, for `--help`.
        argv: program and arguments; `sys.argv` if not given.
    """
    arguments = list(sys.argv if argv is None else argv)
    flags.FLAGS(arguments[:1])  # absl's own flags keep their defaults; its logging warns until they are parsed
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    debug = False
    try:
        chosen = _parse(arguments, _common_flags(default), known_only=True)
        debug = chosen.debug
        config = _load(chosen.config, presets)
        if chosen.help:
            print(_help(about, _common_flags(default), chosen.config, config, presets))
            return
        fields = {leaf.path: leaf for leaf in leaves(config)}
        values = _parse(arguments, _field_flags(fields, _common_flags(default)))
        for path, leaf in fields.items():
            if values[path].present:
                object.__setattr__(leaf.owner, leaf.field.name, values[path].value)
        validate(config)
        workdir = pathlib.Path(chosen.workdir or f"runs/{pathlib.Path(chosen.config).stem}").expanduser()
        main(freeze(config), workdir, _command(arguments))
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as error:
        if debug or not _is_ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _common_flags(default: str) -> flags.FlagValues:
    """The flags that every experiment has, in a set of their own: absl's global flags stay out of it."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # go on after a stray argument, so that it can be named
    flags.DEFINE_string("config", default, "name of a preset, or path of a .py file with get_config()", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder for everything written; runs/<preset> if not given", flag_values=values)
    flags.DEFINE_boolean("debug", False, "keep the full traceback of every error", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this", short_name="h", flag_values=values)
    return values


class _FieldParser(flags.ArgumentParser):
    """Reads one config field's text."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def parse(self, argument: str) -> Any:
        return kinds.read(argument, self.kind)

    def flag_type(self) -> str:
        return kinds.type_name(self.kind)


def _field_flags(fields: dict[str, Leaf], values: flags.FlagValues) -> flags.FlagValues:
    """The common flags and one flag for each field."""
    for path, leaf in fields.items():
        words = leaf.field.metadata.get("help", "")
        flag = flags.Flag(_FieldParser(leaf.type), None, path, None, words, boolean=leaf.type is bool)
        flags.DEFINE_flag(flag, values)
    return values


def _parse(arguments: list[str], values: flags.FlagValues, known_only: bool = False) -> flags.FlagValues:
    """The flags with their values; a ValueError says what was wrong, unless only the known flags are looked for."""
    try:
        stray = values(arguments, known_only=known_only)[1:]
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unknown(error.flagname, list(values))) from None
    except flags.Error as error:
        raise ValueError(str(error).removeprefix("flag ")) from None
    if stray and not known_only:
        raise ValueError(
            f"stray argument {stray[0]!r}; every option is a flag such as --config=<preset> or --config.<field>=<value>"
        )
    return values


def _unknown(name: str, known: list[str]) -> str:
    below = [other for other in known if other.startswith(f"{name}.")]
    if below:
        return f"{name} is a group of fields; set one of them: {', '.join(f'--{other}' for other in below)}"
    if name.startswith("config."):
        return f"the config has no field {name}; the nearest is {nearest(name, [o for o in known if o.startswith('config.')])}"
    return f"there is no flag --{name}; the nearest is --{nearest(name, known)}"


def _load(name: str, presets: pathlib.Path) -> Any:
    """The dataclass that a preset or a config file makes."""
    path = pathlib.Path(name).expanduser() if name.endswith(".py") else presets / f"{name}.py"
    if not path.is_file():
        if name.endswith(".py"):
            raise ValueError(f"there is no config file {name}")
        there = _presets(presets)
        raise ValueError(
            f"there is no preset {name!r}; the nearest is {nearest(name, there)!r} of {', '.join(there)}; a path ends in .py"
        )
    module_name = f"{path.stem}_config"  # the same in every process: it stands in the fingerprint of functions
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]  # the path ends in .py, so there is a loader
    sys.modules[module_name] = module  # dataclasses look their annotations up here
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(f"{path} has no function get_config()")
    config = module.get_config()
    if not is_config(config):
        raise ValueError(f"get_config() of {path} returned {type(config).__name__}; expected a dataclass instance")
    return rebuild(config)  # an override of one field must not reach another that shares its instance


def _presets(folder: pathlib.Path) -> dict[str, str]:
    """{name: first line of the docstring} of the presets in a folder."""
    files = sorted(path for path in folder.glob("*.py") if not path.stem.startswith("_"))
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0] for path in files}


def _help(about: str, common: flags.FlagValues, chosen: str, config: Any, presets: pathlib.Path) -> str:
    there = _presets(presets)
    width = max(map(len, there), default=0)
    options = [
        f"  --{name:<8}  {common[name].flag_type():<6}  {str(common[name].default).lower():<7}  {common[name].help}"
        for name in ("config", "workdir", "debug", "help")
    ]
    names = [f"  {name.ljust(width)}  {line}" for name, line in there.items()]
    fields = [f"  --{line}" for line in describe(config).splitlines()]
    parts = [
        about.strip(),
        "",
        "Flags (type, default, what it is):",
        *options,
        "",
        "Presets:",
        *names,
        "",
        f"Fields of {chosen} (flag, type, default, what it is):",
    ]
    return "\n".join([*parts, *fields])


def _command(arguments: list[str]) -> str:
    """The command line as a person would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else ["python", arguments[0]]
    return shlex.join([*program, *arguments[1:]])


def _is_ours(error: BaseException) -> bool:
    """Whether the innermost frame of a traceback lies in these packages."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    package = "" if trace is None else trace.tb_frame.f_globals.get("__package__") or ""
    return package.split(".")[0] in _OURS
