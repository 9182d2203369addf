"""What a config says about itself: JSON, fingerprint, and the copy in the workdir."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import typing
from collections.abc import Mapping
from typing import Any

from bmjax.config import kinds
from bmjax.config.schema import is_config, validate

RECORD, DATA, TEACHERS = "config.json", "data_fingerprint", "teachers"


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dicts, lists and scalars for JSON; a dataclass's name stands under "class", a function is "module:name"."""
    return plain(config)


def plain(value: Any) -> Any:
    """A value for JSON, as `to_dict` writes it."""
    if is_config(value):
        return {"class": type(value).__name__, **{f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(value)  # 1 and 1.0 are one config
    if isinstance(value, functools.partial):
        return {"partial": plain(value.func), "args": plain(value.args), "kwargs": plain(value.keywords)}
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"


def fingerprint(config: Any) -> str:
    """sha256 (hex) of the canonical JSON: the same in every process, whatever the order of dict entries."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def from_dict(plain: Mapping[str, Any], classes: Mapping[str, type]) -> Any:
    """The dataclass instance that `to_dict` wrote, its own and inner classes looked up by name.

    Args:
        plain: of `to_dict`, perhaps from JSON.
        classes: {name: dataclass}.

    Raises:
        ValueError: a class that is not among them, a field that is none of its class, or a value that does not fit.
    """
    name = str(plain.get("class"))
    if name not in classes:
        raise ValueError(f"there is no config class {name!r} here; there are {', '.join(classes)}")
    hints, given = typing.get_type_hints(classes[name]), {key: value for key, value in plain.items() if key != "class"}
    if unknown := [key for key in given if key not in hints]:
        raise ValueError(f"{name} has no field {unknown[0]!r}; it was written by another version of bmjax")
    instance = classes[name](**{key: _restored(value, hints[key], classes) for key, value in given.items()})
    validate(instance, name)
    return instance


def _restored(value: Any, kind: Any, classes: Mapping[str, type]) -> Any:
    if isinstance(value, Mapping):
        inner = "class" in value
        return from_dict(value, classes) if inner else {key: _restored(item, Any, classes) for key, item in value.items()}
    if (isinstance(value, list) and not kinds.fits(value, kind)) or (isinstance(value, list) and kind is Any):
        return tuple(_restored(item, Any, classes) for item in value)
    return value


def make_workdir(workdir: pathlib.Path) -> None:
    """Makes the folder where it is missing. Raises ValueError if that cannot be done, or it cannot be written to."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"workdir {workdir} cannot be made: {error.strerror}; choose another --workdir") from None
    if not os.access(workdir, os.W_OK):
        raise ValueError(f"workdir {workdir} cannot be written to; choose another --workdir")


def check_workdir(config: Any, workdir: pathlib.Path, data: str = "", teachers: Mapping[str, str] | None = None) -> pathlib.Path:
    """Makes the folder where it is missing; returns the path of its config.json, which is of this config if it is there.

    Args:
        config: of the run.
        workdir: its folder.
        data: fingerprint of the data it is run on; "" if it has none.
        teachers: {folder: SHA-256} of the networks that it begins with or learns from, or of their cached outputs; None if not
            known.

    Raises:
        ValueError: the workdir holds a run of another config (names the first field that differs), of other code in the
            config file, on other data or of other teachers, or it cannot be written to.
    """
    make_workdir(workdir)
    path = workdir / RECORD
    if not path.exists():
        return path
    there = read_resolved(workdir)
    known, advice = there.get(DATA, ""), "choose another --workdir or delete it"
    if found := difference(there, config):
        advice = f"restore the file, or {advice}" if found.startswith("with") else advice
        raise ValueError(f"workdir {workdir} holds a run {found}; {advice}")
    if data and known and data != known:
        raise ValueError(
            f"workdir {workdir} holds a run on other data: the fingerprint is {known[:12]} there, {data[:12]} here; "
            f"restore the data, or {advice}"
        )
    for folder, now in (teachers or {}).items():
        before = there.get(TEACHERS, {}).get(folder, now)
        if before != now:
            raise ValueError(
                f"workdir {workdir} holds a run of another pretrained network: the SHA-256 of {folder} is {before[:12]} there, "
                f"{now[:12]} here; restore it, or {advice}"
            )
    return path


def difference(there: Mapping[str, Any], config: Any) -> str:
    """What is said of a run whose record is not this config's: "with another version of <file>, ..." where the config file or
    what it imports was edited since, "of another config (<first field>)", or "" where it is.

    Args:
        there: of `read_resolved`.
        config: a config, whose `code` is compared where both have one.
    """
    here = to_dict(config)
    before, now = there.get("code"), here.get("code")
    if before and now and before != now:
        edited = next(name for name in [*now, *before] if before.get(name) != now.get(name))
        return f"with another version of {edited}, which was edited since (its SHA-256 differs)"
    known = {key: value for key, value in there.items() if key not in (DATA, TEACHERS)}
    return f"of another config ({found})" if (found := _first_difference(known, here)) else ""


def read_resolved(workdir: pathlib.Path) -> dict[str, Any]:
    """What `write_resolved` wrote.

    Raises:
        ValueError: it is not readable as JSON.
        OSError: it is not there.
    """
    try:
        found = json.loads((workdir / RECORD).read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{workdir / RECORD} is not readable as JSON; choose another --workdir or delete it")
    return found


def write_resolved(config: Any, workdir: pathlib.Path, data: str = "", teachers: Mapping[str, str] | None = None) -> pathlib.Path:
    """Writes `workdir/config.json`, from which on the folder is this config's, unless it is there. Returns its path.

    Args:
        config, workdir, data, teachers: as for `check_workdir`; the last two stand under "data_fingerprint" and "teachers".

    Raises:
        ValueError: as `check_workdir`.
    """
    path = check_workdir(config, workdir, data, teachers)
    if not path.exists():
        draft = path.with_suffix(".tmp")
        made_of = {**({DATA: data} if data else {}), **({TEACHERS: dict(teachers)} if teachers else {})}
        draft.write_text(json.dumps({**to_dict(config), **made_of}, indent=2) + "\n")
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
