"""The rows of the fault matrix: what each fault is, how it is brought about, and when it counts as one that hit.

A fault hits when it met a party at work: a round was open that had not all its results, the victim was alive at that
moment and is gone (or frozen, or cut off) behind it. Of faults on the wire the proxy counts what it altered.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from siblings import load

parties = load(__file__, "parties")
Sign = load(__file__, "sight").Sign

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
        sign: how an operator sees it.
        away: the peers are in a network of their own (`network.py`).
        medium: where the store lies on a small file system of its own: ``"spool"``, ``"journal"``.
    """

    name: str
    inject: Callable[[Any, Any], int]
    sign: Any
    heal: Callable[[Any], None] | None = None
    wire: Callable[[Any], int] | None = None
    lasts_s: float = 0.0
    elements: int = 100_000
    streamed: bool = False
    function: bool = False
    second: bool = False
    medium: str = ""
    away: bool = False
    sites: int = 4
    work_s: float = 0.25
    rounds: int = 0


def _site(fleet: Any, chance: Any) -> str:
    """A site, rather one that trains just now; "" where none is connected: nobody would notice that such a one dies."""
    up = [site for site in fleet.sites if fleet.connected(site)]
    busy = [site for site in fleet.training() if site in up]
    return chance.choice(busy or up or [""])


def _executor(fleet: Any, chance: Any) -> int:
    site = _site(fleet, chance)
    return fleet.kill(fleet.pid(site)) if site else 0


def _host(fleet: Any, chance: Any) -> int:
    """A site's script. Not thrice in a round: a task that takes three processes down is given up, as it should be."""
    site = _site(fleet, chance)
    pid = fleet.part(site, "executor.host") if site and fleet.struck[fleet.round, site] < 2 else 0
    fleet.struck[fleet.round, site] += bool(pid)
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
    return fleet.kill_all() if fleet.connected("broker", "broker_ready") else 0


def _freeze(fleet: Any, chance: Any) -> int:
    """Freeze an executor with all its processes; another machine takes its site over meanwhile."""
    site = _site(fleet, chance)
    pids = fleet.tree(site) if site else []
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


def _unplug(fleet: Any, _: Any) -> int:
    fleet.network.down()
    return 1


def _plug_in(fleet: Any) -> None:
    fleet.network.up()


def _stall(fleet: Any, _: Any) -> int:
    fleet.data.weather.bytes_per_s = 4 * MIB
    return fleet.data.stall(1.5 * parties.TIMES["stall_s"])


def _flip_chunks(fleet: Any, _: Any) -> int:
    fleet.data.weather.flip, fleet.data.weather.least = 0.01, 16 * 1024
    return 1


def _flip_control(fleet: Any, _: Any) -> int:
    fleet.control.weather.flip = 0.001
    return 1


def _flip_one(proxy: Any, least: int) -> int:
    """One frame and no more; 1 once it has passed."""
    weather, before = proxy.weather, proxy.counts.flipped
    weather.least, weather.most, weather.flip = least, 1, 1.0
    hit = parties.until(lambda: proxy.counts.flipped > before, 5.0)
    weather.flip, weather.most = 0.0, -1
    return int(hit)


def _flip_chunk(fleet: Any, _: Any) -> int:
    return _flip_one(fleet.data, 16 * 1024)


def _flip_message(fleet: Any, _: Any) -> int:
    return _flip_one(fleet.control, 0)


def _fill(fleet: Any, _: Any) -> int:
    """Take what is left of the disk; it hits once the broker says that something could not be written."""

    def said() -> int:
        return sum(line.get("event") in _DISK.events for line in fleet.log_lines("broker"))

    before = said()
    ballast: Path = fleet.full / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(64 * 1024)):
                pass
        except OSError:
            return int(parties.until(lambda: said() > before, 5.0))
    return 0


def _empty(fleet: Any) -> None:
    (fleet.full / "ballast").unlink(missing_ok=True)


_GONE = Sign("broker", ("session_dead",), "dead.executor", "attempt")
_SCRIPT = Sign("site", ("task_failed", "host_failed_between_tasks"), "failed.killed", "attempt")
_NO_BROKER = Sign("peer", ("link_down",), "", "cuts")
_DISK = Sign("broker", ("broker_failed", "data_failed", "spool_full"))
_STALL, _CHUNK = Sign("broker", ("upload_ended",)), Sign("broker", ("upload_ended",))
_MALFORMED = Sign("broker", ("malformed",), "fault.malformed")

ROWS = {
    row.name: row
    for row in (
        Row("executor", _executor, _GONE),
        Row("executor, large model", _executor, _GONE, elements=2 * MIB, streamed=True),
        Row("parked script", _host, _SCRIPT),
        Row("worker", _host, _SCRIPT, function=True),
        Row("job process", _job, Sign("controller", ("job_process_ended",), "dead.job", "claim")),
        Row("controller", _controller, Sign("broker", ("session_dead",), "dead.controller", "claim")),
        Row("control loop", _control, _NO_BROKER),
        Row("data loop", _data, Sign("broker", ("data_process_died",), "dead.data"), elements=2 * MIB, streamed=True),
        Row("whole broker", _broker, _NO_BROKER, elements=MIB, streamed=True),
        Row("everything at once", _everything, Sign("broker", ("journal_replayed",), "", "claim"),
            elements=MIB, streamed=True),
        Row("frozen past its lease", _freeze, _GONE, _thaw, lasts_s=1.5 * parties.TIMES["dead_s"], second=True),
        Row("connections cut", _cut, Sign("peer", ("link_down",), "again.executor", "cuts"),
            elements=MIB, streamed=True),
        Row("network away", _unplug, Sign("broker", ("session_dead",), "dead.executor", "cuts"), _plug_in,
            lasts_s=1.5 * parties.TIMES["dead_s"], elements=MIB, streamed=True, away=True),
        Row("stalled stream on a slow link", _stall, _STALL,
            elements=2 * MIB, streamed=True),
        Row("a bit flipped in 1% of the chunks", _flip_chunks, _CHUNK,
            wire=lambda fleet: fleet.data.counts.flipped, elements=4 * MIB, streamed=True),
        Row("a bit flipped in 0.1% of the control messages", _flip_control, _MALFORMED,
            wire=lambda fleet: fleet.control.counts.flipped, elements=1000, work_s=0.01, rounds=400),
        Row("disk full in the spool", _fill, _DISK, _empty, lasts_s=1.0, elements=MIB, streamed=True, medium="spool"),
        Row("disk full in the journal", _fill, _DISK, _empty, lasts_s=1.0, medium="journal"),
    )
}  # fmt: skip


def one_of_each(disk: bool, away: bool) -> tuple[Row, list[Row]]:
    """The short form: the fleet, and a fault of each kind in turn; those that kill the broker, and its counts, first.

    Args:
        disk: the store lies on a small file system.
        away: the peers are in a network of their own.
    """
    named = ["everything at once", "whole broker", "control loop", *["disk full in the spool"] * disk, "data loop",
             "stalled stream on a slow link", "executor", "parked script", "job process", "controller",
             "connections cut", *["network away"] * away]  # fmt: skip
    frozen = replace(
        ROWS["frozen past its lease"], second=False
    )  # the sites of this fleet keep something for themselves
    # a single script may be killed between its tasks, a single message altered on its way to a peer: nothing is counted
    script = replace(ROWS["parked script"], sign=replace(_SCRIPT, counter="", entry=""))
    message = Sign("all", ("malformed", "message_unreadable"))
    flips = [Row("a bit flipped in a chunk", _flip_chunk, _CHUNK), Row("in a message", _flip_message, message)]
    fleet = Row("one of each", _executor, _GONE, elements=MIB // 2, streamed=True, medium="store" * disk, away=away,
                sites=2)  # fmt: skip
    return fleet, [*(script if name == script.name else ROWS[name] for name in named), frozen, *flips]
