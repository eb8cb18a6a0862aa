"""An executor's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


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
        max_parked: scripts that may wait for their next task at once; the longest waiting one is ended above it.
        partial_max_tasks: results in one partial, at most 512.
        partial_max_s: how long the first result of a partial waits for others.
        connect_s: how long to wait for the broker at the start.
        cancel_grace_s: how long a cancelled function may go on before its worker process is killed.
        stop_grace_s: how long hosts have to end by themselves when a job ends.
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
    max_parked: int = 256
    partial_max_tasks: int = 256
    partial_max_s: float = 5.0
    connect_s: float = 30.0
    cancel_grace_s: float = 10.0
    stop_grace_s: float = 5.0
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
