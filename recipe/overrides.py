"""What `fedloom sim job.py` says over the script's own `SimEnv`, and what came of the runs."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True)
class Overrides:
    """Options of the command line; None leaves the script's own. ``statuses`` gathers the ends of the runs."""

    num_clients: int | None = None
    clients: tuple[str, ...] | None = None
    num_threads: int | None = None
    gpu_config: str | None = None
    workspace_root: Path | None = None
    max_clients: int | None = None
    seed: int | None = None
    log_level: str | None = None
    log_json: bool | None = None
    show_progress: bool | None = None
    statuses: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # (job id, status)


_active: Overrides | None = None


def active() -> Overrides | None:
    """The overrides in force, or None."""
    return _active


@contextmanager
def applied(overrides: Overrides) -> Generator[Overrides]:
    """Have environments follow these overrides within the block."""
    global _active
    before, _active = _active, overrides
    try:
        yield overrides
    finally:
        _active = before
