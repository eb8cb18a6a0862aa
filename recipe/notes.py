"""What a recipe has to say to whoever wrote the job script, beside errors: a line on stderr, once a process."""

from __future__ import annotations

import sys

_said: set[str] = set()


def note(text: str) -> None:
    """Say it, unless it was said before."""
    if text not in _said:
        _said.add(text)
        print(f"note: {text}", file=sys.stderr)
