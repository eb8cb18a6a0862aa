"""An executor's settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: What a script that waits between its tasks is taken to hold; one that has trained with torch has 220 MiB of its own.
PARKED_BYTES = 256 * 1024**2
_PARKED_SHARE = 2
_PARKED_RANGE = (8, 1024)


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """An executor's settings.

    Attributes:
        endpoint: the broker's control endpoint.
        workspace: a folder of its own: cache, outbox, jobs, site states, logs.
        sites: the sites it serves.
        pool: a name where it serves many sites; its node name is then ``pool/NAME``.
        capacity: how many tasks run at once.
        slot_envs: the slots' environments, given out in turn, such as ``{"CUDA_VISIBLE_DEVICES": "0"}``.
        queue_ahead: tasks taken on beyond the running ones, so that no slot waits for the broker; None: twice the
            capacity, at least 32, for a pool, else none.
        cache_bytes: the payload cache's bound.
        max_parked: scripts that may wait for their next task at once; the longest waiting one is ended above it. None:
            as many as half of the memory that is available at the start holds at 256 MiB each, 8 to 1024.
        partial_max_tasks: results in one partial, at most 512.
        partial_max_s: how long the first result of a partial waits for others.
        connect_s: how long to wait for the broker at the start.
        cancel_grace_s: how long a cancelled function may go on before its worker process is killed.
        stop_grace_s: how long hosts have to end by themselves when a job ends.
        share_logs: send what the sites' scripts print to the broker, where `fedloom job logs` shows it.
        log_bytes: how much of a site's log leaves for one job at most.
        keep_logs: the logs of so many ended jobs stay in the workspace.
        env: joins every host's environment.
    """

    endpoint: str
    workspace: Path
    sites: tuple[str, ...]
    pool: str = ""
    capacity: int = 1
    slot_envs: tuple[Mapping[str, str], ...] = ()
    queue_ahead: int | None = None
    cache_bytes: int = 8 * 1024**3
    max_parked: int | None = None
    partial_max_tasks: int = 256
    partial_max_s: float = 5.0
    connect_s: float = 30.0
    cancel_grace_s: float = 10.0
    stop_grace_s: float = 5.0
    share_logs: bool = True
    log_bytes: int = 1024**2
    keep_logs: int = 200
    env: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def node(self) -> str:
        """The executor's name at the broker."""
        return f"pool/{self.pool}" if self.pool else f"executor/{self.sites[0]}"

    @property
    def announced(self) -> int:
        """How many tasks the broker may have given out to this executor at once."""
        ahead = self.queue_ahead
        if ahead is None:
            ahead = max(32, 2 * self.capacity) if self.pool else 0
        return self.capacity + ahead


def parked_by_memory(available: int | None = None) -> int:
    """How many waiting scripts the memory holds; ``available`` bytes are asked of the system where not given."""
    if available is None:
        available = available_bytes()
    low, high = _PARKED_RANGE
    return max(low, min(high, available // _PARKED_SHARE // PARKED_BYTES))


def available_bytes() -> int:
    """Memory that processes could still have: of the machine, or of this process's control group if that is less."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found = [int(line.split()[1]) * 1024]
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit.isdigit():
            found.append(max(0, int(limit) - int((group / "memory.current").read_text())))
    except (OSError, ValueError):  # another system, or another layout of it
        pass
    return min(found)
