"""What a plan is made of: what one client took, the fleet that is wanted, the machine, and what comes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..devices import GpuMemory
from ..gpus import Slot

__all__ = ["Fleet", "GpuRow", "Machine", "Measured", "Plan", "Row"]


@dataclass(frozen=True, slots=True)
class Measured:
    """One client's run through the whole pipeline; sizes in bytes, times in seconds.

    Attributes:
        site: who it was; ``rounds``: how many it did.
        model, result: payloads of the model and of one result.
        checkpoint: an aggregate of results, 8 bytes a number; ``state``: float32 masters beside a 16-bit model.
        archive: the job's files.
        memory: the most that each process had of its own: launcher, warm, broker, data, controller, job, agent.
        worker: the most that the client's processes had of their own; ``waiting``: the same between its tasks.
        gpu: the most that it took of one GPU; None: not known.
        startup_s: from the start to the first round, and from the last one to the end.
        first_round_s, round_s: the first round, and the last one measured.
        run_s: the client's own time for its last task; ``fold_s``: what adding its result took.
        cpu_s: CPU time of all of the client's processes for its last task; ``start_cpu_s``: for all before it.
    """

    site: str
    rounds: int
    model: int
    result: int
    checkpoint: int
    state: int
    archive: int
    memory: Mapping[str, int]
    worker: int
    waiting: int
    startup_s: float
    first_round_s: float
    round_s: float
    run_s: float
    fold_s: float
    cpu_s: float
    start_cpu_s: float = 0.0
    gpu: int | None = None

    @property
    def start_s(self) -> float:
        """What a client's first task takes longer than its others: imports, data, a process of its own."""
        return max(0.0, self.first_round_s - self.round_s)

    @property
    def turn_s(self) -> float:
        """What a round of one client takes beside its task and its result's fold."""
        return max(0.0, self.round_s - self.run_s - self.fold_s)


@dataclass(frozen=True, slots=True)
class Fleet:
    """What is to be simulated.

    Attributes:
        tasks: how many clients work in a round: all of them, or a sample.
        slots: the T places where they do, with their GPUs.
        waiting: how many scripts may wait between their tasks beside the running ones.
        functions: workers serve any client, one after another; else each client has a process of its own.
        kept: processes of scripts wait for their next task; False: there is one for each task.
        prefold: results are folded before they reach the controller.
        collects: the aggregator takes whole results, all of a round at once.
    """

    clients: int
    tasks: int
    rounds: int
    slots: Sequence[Slot]
    waiting: int = 0
    functions: bool = False
    kept: bool = True
    prefold: bool = True
    collects: bool = False

    @property
    def workers(self) -> int:
        """T."""
        return len(self.slots)

    @property
    def parked(self) -> int:
        """How many processes wait at most while all slots work."""
        return 0 if self.functions or not self.kept else max(0, min(self.waiting, self.clients - self.workers))

    @property
    def restarts(self) -> bool:
        """Whether a client's process is gone when its next task comes: not all of them may wait."""
        return not self.functions and (not self.kept or self.clients > self.workers + self.parked)


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is: ``memory`` that processes could still have, ``quota`` of the spool, ``gpus`` as far as known."""

    cores: int
    memory: int
    quota: int
    gpus: Mapping[str, GpuMemory] = field(default_factory=dict[str, GpuMemory])


@dataclass(frozen=True, slots=True)
class Row:
    """So many of something with so many bytes each, and ``more`` bytes once."""

    name: str
    each: int
    count: int = 1
    more: int = 0

    @property
    def bytes(self) -> int:
        """In all."""
        return self.each * self.count + self.more


@dataclass(frozen=True, slots=True)
class GpuRow:
    """One GPU: ``processes`` that may have memory on it, ``each`` so much of ``free`` bytes (None: not known)."""

    gpu: str
    workers: int
    processes: int
    share: float
    each: int | None
    free: int | None
    allowed: int | None

    @property
    def bytes(self) -> int | None:
        """In all."""
        return None if self.each is None else self.each * self.processes


@dataclass(frozen=True, slots=True)
class Plan:
    """What the fleet will take.

    Attributes:
        memory, gpus: what is needed where.
        spool: the most that the spool will hold; ``spool_least``: with less the job cannot run at all.
        down, up: bytes of a round to the clients and back.
        first_round_s, round_s, total_s: expected times.
        reasons: why it cannot run, each with its figures; () where it can.
        most_workers: the largest T that fits, where this one does not; 0: none does.
        notes: what else there is to know.
    """

    job: str
    measured: Measured
    fleet: Fleet
    machine: Machine
    memory: tuple[Row, ...]
    gpus: tuple[GpuRow, ...]
    spool: int
    spool_least: int
    down: int
    up: int
    first_round_s: float
    round_s: float
    total_s: float
    reasons: tuple[str, ...] = ()
    most_workers: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the machine holds it."""
        return not self.reasons

    @property
    def memory_bytes(self) -> int:
        """Memory of all processes together."""
        return sum(row.bytes for row in self.memory)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data: bytes, seconds, and the verdict."""
        fleet, machine = self.fleet, self.machine
        return {
            "job": self.job,
            "fits": self.fits,
            "reasons": list(self.reasons),
            "most_threads": self.most_workers,
            "notes": list(self.notes),
            "clients": fleet.clients,
            "tasks": fleet.tasks,
            "threads": fleet.workers,
            "rounds": fleet.rounds,
            "round": {
                "seconds": round(self.round_s, 6),
                "first_seconds": round(self.first_round_s, 6),
                "bytes_down": self.down,
                "bytes_up": self.up,
            },
            "total_seconds": round(self.total_s, 3),
            "memory": {
                "needed_bytes": self.memory_bytes,
                "available_bytes": machine.memory,
                "parts": [
                    {"name": row.name, "each_bytes": row.each, "count": row.count, "bytes": row.bytes}
                    for row in self.memory
                ],
            },
            "gpus": [asdict(row) | {"bytes": row.bytes} for row in self.gpus],
            "spool": {
                "needed_bytes": self.spool_least,
                "expected_bytes": self.spool,
                "quota_bytes": machine.quota,
            },
            "measured": {**asdict(self.measured), "memory": dict(self.measured.memory)},
        }
