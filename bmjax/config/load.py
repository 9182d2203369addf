"""Configs from presets and from a user's own Python files."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.util
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from bmjax.config.schema import is_config, nearest, rebuild
from bmjax.config.tracebacks import misspelt

_PACKAGE = pathlib.Path(__file__).parents[1]


def load(name: str, presets: pathlib.Path) -> Any:
    """The dataclass that a preset or a config file makes, fields not overridden yet.

    A config file may import modules that lie beside it. Its own SHA-256 and theirs are put into the config's `code`, if it has
    that field, so that the functions which a config names by module stand for their source.

    Args:
        name: of a preset, or the path of a .py file with `get_config()`.
        presets: folder of the presets.

    Raises:
        ValueError: there is no such preset or file, it has no `get_config`, or that returns no dataclass.
    """
    own = name.endswith(".py")
    path = pathlib.Path(name).expanduser() if own else presets / f"{name}.py"
    if not path.is_file():
        if own:
            raise ValueError(f"there is no config file {name}")
        there = described(presets)
        raise ValueError(
            f"there is no preset {name!r}; the nearest is {nearest(name, there)!r} of {', '.join(there)}; a path ends in .py"
        )
    if own and (folder := str(path.parent.absolute())) not in sys.path:
        sys.path.insert(0, folder)  # as `python file.py` does
    module_name = f"{path.stem}_config"  # the same in every process: it stands in the fingerprint of functions
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]  # the path ends in .py, so there is a loader
    sys.modules[module_name] = module  # dataclasses look their annotations up here
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        if not callable(getattr(module, "get_config", None)):
            raise ValueError(f"{path} has no function get_config()")
        config = module.get_config()
    except SyntaxError as error:  # it has no frame in the file, so it would end as a traceback of ours
        where = f"{error.filename}:{error.lineno}"
        raise ValueError(f"{where}: {error.msg}: {(error.text or '').strip()}") from None
    except TypeError as error:
        if message := misspelt(error):
            raise ValueError(message) from None
        raise
    if not is_config(config):
        raise ValueError(f"get_config() of {path} returned {type(config).__name__}; expected a dataclass instance")
    _check_attributes(config, str(path))
    config = rebuild(config)  # an override of one field must not reach another that shares its instance
    if own and "code" in (entry.name for entry in dataclasses.fields(config)):
        config.code = hashes(path)
    return config


def _check_attributes(config: Any, where: str) -> None:
    """Raises ValueError for an attribute that was set beside the fields: a misspelt `config.optimizer.lerning_rate = 1`."""
    names = [entry.name for entry in dataclasses.fields(config)]
    for name in vars(config):
        if name not in names:
            kind = type(config).__name__
            raise ValueError(
                f"{where} sets {name!r} of a {kind}, which has no such field; the nearest is {nearest(name, names)!r}"
            )
    for child in (getattr(config, name) for name in names):
        if is_config(child):
            _check_attributes(child, where)


def hashes(path: pathlib.Path) -> dict[str, str]:
    """{file name within the folder: SHA-256} of a config file and of all that it imports, directly or not, from its folder."""
    folder, found, waiting = path.parent.absolute(), set[pathlib.Path](), [path.absolute()]
    while waiting:
        file = waiting.pop()
        if file not in found and not file.is_relative_to(_PACKAGE):
            found.add(file)
            waiting += [other for name in _imported(file, folder) for other in _files(name, folder)]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(found)}


def _imported(file: pathlib.Path, folder: pathlib.Path) -> Iterator[str]:
    """The dotted names that a file imports, wherever in the file; `from a import b` may name a module or not."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = file.relative_to(folder).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _files(name: str, folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files in a folder that importing a dotted name runs."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        place = folder.joinpath(*parts[:end])
        yield from (file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file())


def described(folder: pathlib.Path) -> dict[str, str]:
    """{name: first line of the docstring} of the presets in a folder."""
    files = sorted(path for path in folder.glob("*.py") if not path.stem.startswith("_"))
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0] for path in files}
