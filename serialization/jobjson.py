"""JSON, strictly: the files of a job folder, and the types that belong in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from .errors import JobError

MAX_CONFIG_BYTES = 4 * 1024**2


def read_json(path: Path) -> dict[str, Any]:
    """The map in a file.

    Raises:
        JobError: it is missing, too large, no JSON, or no map; a key stands twice, or a number is not finite.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise JobError(f"{path}: {path.stat().st_size} bytes; at most {MAX_CONFIG_BYTES}")
        text = path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise JobError(f"{path} is missing: is this a job folder, as `recipe.export(job_dir)` writes it?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path} cannot be read: {error}") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_float=_float, parse_constant=_no_constant)
        return map_of(value, str(path))
    except (ValueError, RecursionError) as error:
        raise JobError(f"{path} is not valid JSON: {error}") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a map so that people can read it.

    Raises:
        JobError: a value that JSON cannot hold.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise JobError(f"{path.name} cannot hold these settings: {error}; allowed are JSON's types") from None
    path.write_text(text + "\n", "utf-8")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        raise ValueError(f"key {next(key for key, _ in pairs if key in seen or seen.add(key))!r} twice")
    return out


def _float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_constant(text[:40])  # JSON has no largest number


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name}; numbers must be finite")


def map_of(value: object, where: str) -> dict[str, Any]:
    """The value, if it is a map; else a JobError that names the place. So with those below."""
    if not isinstance(value, dict):
        raise JobError(f"{where}: {type(value).__name__} where a map belongs")
    return cast("dict[str, Any]", value)


def list_of(value: object, where: str) -> list[Any]:
    """The value, if it is a list."""
    if not isinstance(value, list):
        raise JobError(f"{where}: {type(value).__name__} where a list belongs")
    return cast("list[Any]", value)


def text_of(value: object, where: str) -> str:
    """The value, if it is text."""
    if not isinstance(value, str):
        raise JobError(f"{where}: {type(value).__name__} where text belongs")
    return value


def texts_of(value: object, where: str) -> list[str]:
    """The value, if it is a list of texts."""
    return [text_of(item, where) for item in list_of(value, where)]


def whole(value: object, what: str, low: int, high: int) -> None:
    """Let a whole number from ``low`` to ``high`` pass."""
    if type(value) is not int or not low <= value <= high:
        raise JobError(f"{what}={value!r}; a whole number from {low} to {high} belongs here")
