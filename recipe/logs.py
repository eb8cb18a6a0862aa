"""Logging of the command line: to standard error, readable on a terminal, JSON lines on request."""

from __future__ import annotations

import os

from ..serialization.errors import JobError

LEVELS = ("debug", "info", "warning", "error", "critical")
#: NVFLARE's names of how much is said.
ALIASES = {"msg_only": "warning", "concise": "info", "full": "info", "verbose": "debug"}
FORMATS = ("text", "json")
LEVEL_VARIABLE = "FEDLOOM_LOG_LEVEL"
FORMAT_VARIABLE = "FEDLOOM_LOG_FORMAT"


def check_level(level: str | None, default: str = "info") -> str:
    """The level in lower case; without one ``FEDLOOM_LOG_LEVEL``, else the default.

    Raises:
        JobError: there is no such level.
    """
    chosen = (level or os.environ.get(LEVEL_VARIABLE) or default).lower()
    chosen = ALIASES.get(chosen, chosen)
    if chosen not in LEVELS:
        raise JobError(f"log level {chosen!r}; allowed are {', '.join(LEVELS)}")
    return chosen


def check_format(format: str | None) -> str:
    """The format; without one ``FEDLOOM_LOG_FORMAT``, else text.

    Raises:
        JobError: there is no such format.
    """
    chosen = (format or os.environ.get(FORMAT_VARIABLE) or "text").lower()
    if chosen not in FORMATS:
        raise JobError(f"log format {chosen!r}; allowed are {' and '.join(FORMATS)}")
    return chosen


def setup(level: str | None = None, format: str | None = None, *, default: str = "info") -> tuple[str, bool]:
    """Set up logging in this process, and say by the environment how child processes shall.

    Returns:
        The level, and whether lines are JSON.

    Raises:
        JobError: no such level or format.
    """
    from ..serialization.processes import setup_logging

    chosen, as_json = check_level(level, default), check_format(format) == "json"
    os.environ[LEVEL_VARIABLE] = chosen
    os.environ[FORMAT_VARIABLE] = "json" if as_json else "text"
    setup_logging(chosen, as_json)
    return chosen, as_json
