"""A directory that can prove that nothing in it changed: manifest.json lists every file's length and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

NAME = "manifest.json"


def write(directory: str | os.PathLike[str], data: dict[str, Any], names: Iterable[str] | None = None) -> pathlib.Path:
    """Writes manifest.json, atomically, over every file that is in the directory now, or those named; returns its path.

    Args:
        directory: where the files are; folders below it count.
        data: anything that JSON can hold, kept beside the hashes.
        names: of the files that count; None takes all.
    """
    directory = pathlib.Path(directory)
    path = directory / NAME
    temporary = directory / f"{NAME}.{os.getpid()}.tmp"  # another process may be writing the same
    there = sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": _sha256(directory / name)}
        for name in (there if names is None else sorted(names))
        if not name.startswith(NAME)
    }
    temporary.write_text(json.dumps({"data": data, "files": files}, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, path)
    return path


def verify(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest's data, once every file listed in it is found unchanged.

    Raises:
        ValueError: there is no readable manifest, or a file (the first one is named) is missing, shorter, longer or altered.
    """
    data, files = read(directory)
    for name, expected in files.items():
        check_file(directory, name, expected)
    return data


def read(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(the manifest's data, {file: {"bytes", "sha256"}}), the files not looked at.

    Raises:
        ValueError: there is no readable manifest.
    """
    directory = pathlib.Path(directory)
    try:
        manifest = json.loads((directory / NAME).read_text())
        return manifest["data"], manifest["files"]
    except FileNotFoundError:
        raise ValueError(f"{directory} has no {NAME}; was the export finished?") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{directory / NAME} is damaged; export again") from None


def check_file(directory: str | os.PathLike[str], name: str, expected: dict[str, Any], *, content: bool = True) -> None:
    """Raises ValueError if a file is not as the manifest lists it: its length, and with `content` its SHA-256."""
    file = pathlib.Path(directory) / name
    if not file.is_file():
        raise ValueError(f"{file} is missing, but the manifest lists it")
    if file.stat().st_size != expected["bytes"]:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, but the manifest says {expected['bytes']}")
    if content and _sha256(file) != expected["sha256"]:
        raise ValueError(f"{file} was altered: its SHA-256 is not the manifest's")


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
