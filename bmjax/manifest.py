"""A directory that can prove that nothing in it changed: manifest.json lists every file's length and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

NAME = "manifest.json"


def write(directory: str | os.PathLike[str], data: dict[str, Any]) -> pathlib.Path:
    """Writes manifest.json, atomically, over every file that is in the directory now; returns its path.

    Args:
        directory: where the files are; folders below it count.
        data: anything that JSON can hold, kept beside the hashes.
    """
    directory = pathlib.Path(directory)
    path = directory / NAME
    temporary = directory / f"{NAME}.tmp"
    names = sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": _sha256(directory / name)}
        for name in names
        if name not in (path.name, temporary.name)
    }
    temporary.write_text(json.dumps({"data": data, "files": files}, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, path)
    return path


def verify(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest's data, once every file listed in it is found unchanged.

    Raises:
        ValueError: there is no readable manifest, or a file (the first one is named) is missing, shorter, longer or altered.
    """
    directory = pathlib.Path(directory)
    try:
        manifest = json.loads((directory / NAME).read_text())
        data, files = manifest["data"], manifest["files"]
    except FileNotFoundError:
        raise ValueError(f"{directory} has no {NAME}; was the export finished?") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{directory / NAME} is damaged; export again") from None
    for name, expected in files.items():
        file = directory / name
        if not file.is_file():
            raise ValueError(f"{file} is missing, but the manifest lists it")
        if file.stat().st_size != expected["bytes"]:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, but the manifest says {expected['bytes']}")
        if _sha256(file) != expected["sha256"]:
            raise ValueError(f"{file} was altered: its SHA-256 is not the manifest's")
    return data


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
