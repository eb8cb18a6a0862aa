"""The usual words of ``fedloom sim``, read without typer: what it imports takes as long as all else of the command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["read_sim"]

_PATHS = {"-w": "workspace", "--workspace": "workspace"}
_NUMBERS = {
    "-n": "n_clients",
    "--n-clients": "n_clients",
    "--n_clients": "n_clients",
    "-t": "threads",
    "--threads": "threads",
}
_FLAGS = {"--json": "as_json", "--profile": "profile"}


def read_sim(words: Sequence[str]) -> dict[str, Any] | None:
    """The arguments of `sim.sim`, or None for what only typer should read: other options, spellings and mistakes."""
    end = words.index("--") if "--" in words else len(words)
    options: dict[str, Any] = {"script_args": list(words[end + 1 :])}
    left = list(words[:end])
    while left:
        word = left.pop(0)
        if word in _FLAGS:
            name, value = _FLAGS[word], True
        elif word in _PATHS or word in _NUMBERS:
            given = left.pop(0) if left else ""
            if not given or given.startswith("-"):
                return None
            if word in _PATHS:
                name, value = _PATHS[word], Path(given)
            elif given.isascii() and given.isdecimal() and int(given) > 0:
                name, value = _NUMBERS[word], int(given)
            else:
                return None
        elif word and not word.startswith("-"):
            name, value = "job", Path(word)
        else:
            return None
        if name in options:
            return None
        options[name] = value
    return options if "job" in options else None
