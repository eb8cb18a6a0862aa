"""What every fedloom process does at its start: die with its parent, and log the same way."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from typing import Any

import structlog

from .loglimit import LINES

__all__ = ["die_with_parent", "setup_logging"]

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None, signum: int = signal.SIGKILL) -> None:
    """Have the kernel end this process when its parent dies, so that nothing is left behind. Linux; elsewhere nothing.

    Args:
        parent: the pid that the parent had when it started this process, to see whether it is gone already.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signum)


def setup_logging(level: str = "info", json_lines: bool = False) -> None:
    """structlog to standard error: readable on a terminal, JSON lines on request."""
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    processors: list[Any] = [
        LINES,
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso" if json_lines else "%H:%M:%S", utc=json_lines),
    ]
    if json_lines:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        # plain tracebacks: the default draws boxes, and prints the values of all locals, payloads and tokens among them
        plain = structlog.dev.plain_traceback
        processors.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
