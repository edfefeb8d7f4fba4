"""Reading the small JSON files beside a model: bounded, and every failure a ``StartupError`` of one line."""

from __future__ import annotations

import json
from pathlib import Path

from vserve.errors import StartupError, shorten


def read_object(path: Path, most_bytes: int = 1 << 24) -> dict[str, object]:
    """The JSON object in a file of at most most_bytes."""
    value = _read(path, most_bytes)
    if not isinstance(value, dict):
        raise StartupError(f"{shorten(str(path))}: must hold a JSON object")
    return value


def read_objects(path: Path, most_bytes: int = 1 << 24) -> list[dict[str, object]]:
    """The list of JSON objects in a file of at most most_bytes."""
    value = _read(path, most_bytes)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise StartupError(f"{shorten(str(path))}: must hold a list of JSON objects")
    return value


def _read(path: Path, most_bytes: int) -> object:
    where = shorten(str(path))
    try:
        with path.open("rb") as opened:
            raw = opened.read(most_bytes + 1)
    except OSError as error:
        raise StartupError(f"{where}: cannot be read: {error.strerror}") from None
    if len(raw) > most_bytes:
        raise StartupError(f"{where}: longer than the limit of {most_bytes} bytes")
    try:
        value: object = json.loads(raw)
    except (ValueError, RecursionError) as error:
        # ValueError covers bad JSON, bad UTF-8 and integers of too many digits.
        raise StartupError(f"{where}: not valid JSON: {shorten(str(error))}") from None
    return value
