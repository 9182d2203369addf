"""What a config says about itself: JSON, fingerprint, help, and the copy in the workdir."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import types
from typing import Any

from bmjax.config import kinds
from bmjax.config.schema import is_config, leaves


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dicts, lists and scalars for JSON; a dataclass's name stands under "class", a function is "module:name"."""
    return _plain(config)


def _plain(value: Any) -> Any:
    if is_config(value):
        return {"class": type(value).__name__, **{f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(value)  # 1 and 1.0 are one config
    if isinstance(value, functools.partial):
        return {"partial": _plain(value.func), "args": _plain(value.args), "kwargs": _plain(value.keywords)}
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"


def fingerprint(config: Any) -> str:
    """sha256 (hex) of the canonical JSON: the same in every process, whatever the order of dict entries."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def describe(config: Any) -> str:
    """Aligned lines, one for each field: dotted name, type, value, help."""
    rows = []
    for leaf in leaves(config):
        choices = leaf.field.metadata.get("choices")
        allowed = f" (one of {', '.join(map(str, choices))})" if choices else ""
        rows.append((leaf.path, kinds.type_name(leaf.type), _shown(leaf.value), leaf.field.metadata.get("help", "") + allowed))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]).rstrip() for row in rows)


def _shown(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    if isinstance(value, dict):
        return ",".join(f"{key}={_shown(item)}" for key, item in value.items())
    if isinstance(value, (bool, types.NoneType)):
        return str(value).lower()
    return str(value) if isinstance(value, (int, float, str)) else str(_plain(value))


def check_workdir(config: Any, workdir: pathlib.Path) -> pathlib.Path:
    """Makes the folder where it is missing; returns the path of its config.json, which is of this config if it is there.

    Raises:
        ValueError: the workdir holds a run of another config (names the first field that differs), or cannot be written to.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        there = json.loads(path.read_text()) if path.exists() else None
    except OSError as error:
        raise ValueError(f"workdir {workdir} cannot be made: {error.strerror}; choose another --workdir") from None
    except ValueError:
        raise ValueError(f"{path} is not readable as JSON; choose another --workdir or delete it") from None
    if not os.access(workdir, os.W_OK):
        raise ValueError(f"workdir {workdir} cannot be written to; choose another --workdir")
    if there is not None and (difference := _first_difference(there, to_dict(config))):
        raise ValueError(f"workdir {workdir} holds a run of another config ({difference}); choose another --workdir or delete it")
    return path


def write_resolved(config: Any, workdir: pathlib.Path) -> pathlib.Path:
    """Writes `workdir/config.json`, from which on the folder is this config's, unless it is there. Returns its path.

    Raises:
        ValueError: as `check_workdir`.
    """
    path = check_workdir(config, workdir)
    if not path.exists():
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(to_dict(config), indent=2) + "\n")
        draft.replace(path)
    return path


def _first_difference(there: Any, here: Any, path: str = "") -> str:
    """ "field x.y: 3 there, 4 here", or "" if the two are equal."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *(key for key in there if key not in here)]:
            below = f"{path}.{key}" if path else key
            if key not in there or key not in here:
                return f"field {below}: {'only here' if key in here else 'only there'}"
            if found := _first_difference(there[key], here[key], below):
                return found
        return ""
    return "" if there == here else f"field {path}: {_json(there)} there, {_json(here)} here"


def _json(value: Any) -> str:
    return json.dumps(value)
