"""The rows of the fault matrix: what each fault is, how it is brought about, and when it counts as one that hit.

A fault hits when it met a party at work: a round was open that had not all its results, the victim was alive at that
moment and is gone (or frozen, or cut off) behind it. Of faults on the wire the proxy counts what it altered.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siblings import load

parties = load(__file__, "parties")

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of fault.

    Attributes:
        inject: brings one about; how many processes, connections or frames it hit (0: nobody was at work).
        heal: ends it, for those that last; called when the fault has lasted ``lasts_s``.
        wire: it goes on all the time once ``inject`` was called; hits are read from this.
        elements: float32 numbers of the model.
        streamed: results and models go through the proxy rather than by files.
        work_s, rounds: how long a site trains, and another number of rounds: many short ones make many messages.
        medium: where the store lies on a small file system of its own: ``"spool"``, ``"journal"``.
    """

    name: str
    inject: Callable[[Any, Any], int]
    heal: Callable[[Any], None] | None = None
    wire: Callable[[Any], int] | None = None
    lasts_s: float = 0.0
    elements: int = 100_000
    streamed: bool = False
    function: bool = False
    second: bool = False
    medium: str = ""
    work_s: float = 0.25
    rounds: int = 0


def _site(fleet: Any, chance: Any) -> str:
    """A site, rather one that trains just now."""
    busy = [site for site in fleet.training() if fleet.pid(site)]
    return chance.choice(busy or list(fleet.sites))


def _executor(fleet: Any, chance: Any) -> int:
    return fleet.kill(fleet.pid(_site(fleet, chance)))


def _host(fleet: Any, chance: Any) -> int:
    pid = fleet.part(_site(fleet, chance), "executor.host")
    return fleet.kill(pid) if pid else 0


def _job(fleet: Any, _: Any) -> int:
    pid = fleet.part("controller", "controller.job")
    return fleet.kill(pid) if pid else 0


def _controller(fleet: Any, _: Any) -> int:
    return fleet.kill(fleet.pid("controller"))


def _control(fleet: Any, _: Any) -> int:
    return fleet.kill(fleet.pid("broker"))


def _data(fleet: Any, _: Any) -> int:
    pid = fleet.part("broker", "broker.data")
    return fleet.kill(pid) if pid else 0


def _broker(fleet: Any, _: Any) -> int:
    return fleet.kill(*fleet.tree("broker"))


def _everything(fleet: Any, _: Any) -> int:
    return fleet.kill_all()


def _freeze(fleet: Any, chance: Any) -> int:
    """Freeze an executor with all its processes; another machine takes its site over meanwhile."""
    site = _site(fleet, chance)
    pids = fleet.tree(site)
    for pid in reversed(pids):
        os.kill(pid, signal.SIGSTOP)
    fleet.frozen = pids
    return len(pids)


def _thaw(fleet: Any) -> None:
    for pid in fleet.frozen:
        if parties.alive(pid):
            os.kill(pid, signal.SIGCONT)
    fleet.frozen = []


def _cut(fleet: Any, _: Any) -> int:
    return fleet.control.cut() + fleet.data.cut()


def _stall(fleet: Any, _: Any) -> int:
    fleet.data.weather.bytes_per_s = 4 * MIB
    return fleet.data.stall(1.5 * parties.TIMES["stall_s"])


def _flip_chunks(fleet: Any, _: Any) -> int:
    fleet.data.weather.flip, fleet.data.weather.least = 0.01, 16 * 1024
    return 1


def _flip_control(fleet: Any, _: Any) -> int:
    fleet.control.weather.flip = 0.001
    return 1


def _fill(fleet: Any, _: Any) -> int:
    """Take what is left of the disk; whether something failed for it is seen in the broker's end."""
    ballast: Path = fleet.full / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(64 * 1024)):
                pass
        except OSError:
            return 1
    return 0


def _empty(fleet: Any) -> None:
    (fleet.full / "ballast").unlink(missing_ok=True)


ROWS = {
    row.name: row
    for row in (
        Row("executor", _executor),
        Row("executor, large model", _executor, elements=2 * MIB, streamed=True),
        Row("parked script", _host),
        Row("worker", _host, function=True),
        Row("job process", _job),
        Row("controller", _controller),
        Row("control loop", _control),
        Row("data loop", _data, elements=2 * MIB, streamed=True),
        Row("whole broker", _broker, elements=MIB, streamed=True),
        Row("everything at once", _everything, elements=MIB, streamed=True),
        Row("frozen past its lease", _freeze, _thaw, lasts_s=1.5 * parties.TIMES["dead_s"], second=True),
        Row("connections cut", _cut, elements=MIB, streamed=True),
        Row("stalled stream on a slow link", _stall, elements=2 * MIB, streamed=True),
        Row("a bit flipped in 1% of the chunks", _flip_chunks, wire=lambda fleet: fleet.data.counts.flipped,
            elements=4 * MIB, streamed=True),
        Row("a bit flipped in 0.1% of the control messages", _flip_control,
            wire=lambda fleet: fleet.control.counts.flipped, elements=1000, work_s=0.01, rounds=400),
        Row("disk full in the spool", _fill, _empty, lasts_s=1.0, elements=MIB, streamed=True, medium="spool"),
        Row("disk full in the journal", _fill, _empty, lasts_s=1.0, medium="journal"),
    )
}  # fmt: skip
