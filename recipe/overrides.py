"""What `fedloom sim job.py` says over the script's own `SimEnv`, and what came of the runs."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one run: its status, the result folder where there is one, and whether a client failed in it."""

    job_id: str
    status: str
    path: str | None = None
    failures: bool = False


@dataclass(slots=True)
class Overrides:
    """Options of the command line; None leaves the script's own. ``runs`` gathers what came of the script's runs."""

    num_clients: int | None = None
    clients: tuple[str, ...] | None = None
    num_threads: int | None = None
    gpu_config: str | None = None
    gpu_memory_share: str | None = None
    plan: bool = False
    workspace_root: Path | None = None
    max_clients: int | None = None
    seed: int | None = None
    profile: bool = False
    resume: bool = False
    log_level: str | None = None
    log_json: bool | None = None
    show_progress: bool | None = None
    runs: list[Outcome] = field(default_factory=list[Outcome])


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
