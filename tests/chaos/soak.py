"""A fleet at work for minutes, with executors that come and go, jobs side by side and faults now and then: what grows?

Measured are the parties that live through all of it: both of the broker's processes, one controller, and the executors
of two sites. The others are what happens to them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "support"))

from siblings import load  # noqa: E402

account = load(__file__, "account")
jobs = load(__file__, "job")
parties = load(__file__, "parties")
run = load(__file__, "run")
processes = load(__file__, "../conftest")

SITES = 4
ROUNDS = 3
SIDE_BY_SIDE = 2
ELEMENTS = 50_000
#: Few enough that the broker forgets jobs during a short soak too.
KEPT_JOBS = 6
FAULT_S = 4.0
IDLE_S = 60.0
END_S = 120.0
_MIB = 2**20
#: What was not needed before: of an executor's threads, those for files (four and one a slot) and for sums. What is
#: left over for each job or fault would be more.
_MORE_THREADS = 6
_MORE_FDS = 3


@dataclass(slots=True)
class Sample:
    """One process at one moment."""

    at: float
    bytes: int
    fds: int
    threads: int


@dataclass(slots=True)
class Figures:
    """What a soak has seen."""

    seconds: float = 0.0
    jobs: int = 0
    faults: dict[str, int] = field(default_factory=dict[str, int])
    slopes: dict[str, float] = field(default_factory=dict[str, float])  # MiB an hour, by party
    growth: dict[str, float] = field(default_factory=dict[str, float])  # MiB, the second quarter's mean to the last's
    journal_kib: tuple[int, int] = (0, 0)  # at half time and at the end
    spool_kib: tuple[int, int] = (0, 0)
    wrong: list[str] = field(default_factory=list[str])


class Soak:
    """One fleet, and what is measured of it."""

    def __init__(self, children: Any, folder: Path, ports: tuple[int, int], seed: int) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        sites = [f"site-{number}" for number in range(1, SITES + 1)]
        self.fleet = parties.Parties(
            children, folder, ports, sites=sites, streamed=True, seed=seed, bounds={"max_jobs": KEPT_JOBS}
        )
        self.fleet.extra_controller()
        self.samples: dict[str, list[Sample]] = {}
        self._over = threading.Event()
        self.out = Figures()

    def run(self, seconds: float) -> Figures:
        fleet, out = self.fleet, self.out
        folder = self.folder / "job"
        folder.mkdir()
        job = jobs.ChaosJob(folder, sites=SITES, rounds=ROUNDS, elements=ELEMENTS, function=False, work_s=0.05)
        calm = job.undisturbed()
        exported = job.export()
        fleet.start()
        for _ in range(2):  # what is loaded once is loaded
            self._jobs(exported, calm, time.monotonic())
        watched = self._watched()
        before = {name: look(pid) for name, pid in watched.items()}
        began = time.monotonic()
        meanwhile = threading.Thread(target=self._meanwhile, args=(watched, began + seconds), name="soak-faults")
        meanwhile.start()
        try:
            self._jobs(exported, calm, began + seconds)
        finally:
            self._over.set()
            meanwhile.join()
        out.seconds = time.monotonic() - began
        self._check_end(watched, before)
        return out

    # ------------------------------------------------------------ work and faults

    def _jobs(self, exported: Path, calm: str, until: float) -> None:
        """Keep jobs going until then, one at least, and see each to its end."""
        out, running = self.out, dict[str, float]()
        first = True
        while running or first or time.monotonic() < until:
            now = time.monotonic()
            while (first or now < until) and len(running) < SIDE_BY_SIDE:
                running[self._submit(exported)] = now
                first = False
            for job_id, since in list(running.items()):
                status = account.status(self.fleet.store, job_id)
                if status.startswith("FINISHED"):
                    del running[job_id]
                    self._settle(job_id, status, calm)
                elif now - since > END_S:
                    out.wrong.append(f"{job_id} has not ended within {END_S:g} s")
                    return
            parties.until(lambda: False, 0.1)

    def _meanwhile(self, watched: dict[str, int], until: float) -> None:
        """Faults until then, and a look at everybody each half second, in a thread of its own."""
        out, began = self.out, time.monotonic()
        fault_at = began + FAULT_S
        while not self._over.wait(0.5):
            now = time.monotonic()
            if fault_at <= now < until:
                self._fault()
                fault_at = now + FAULT_S * self.chance.uniform(0.5, 1.5)
            for name, pid in watched.items():
                with contextlib.suppress(OSError):  # it has ended: said at the end
                    self.samples.setdefault(name, []).append(look(pid))
            if not out.journal_kib[0] and now >= (began + until) / 2:
                out.journal_kib, out.spool_kib = (self._journal_kib(), 0), (self._spool_kib(), 0)

    def _submit(self, exported: Path) -> str:
        return json.loads(self._command("submit", str(exported), "--json"))["job_id"]

    def _settle(self, job_id: str, status: str, calm: str) -> None:
        self.out.jobs += 1
        if status != "FINISHED:COMPLETED":
            self.out.wrong.append(f"{job_id}: {status}")
            return
        result = self.folder / f"result {job_id}"
        self._command("download", job_id, "-o", str(result))
        if jobs.digest(result) != calm:
            self.out.wrong.append(f"{job_id}: the model is not the undisturbed one")

    def _command(self, *words: str) -> str:
        argv = ("job", *words, "--broker", self.fleet.endpoint, "--connect-timeout", "30")
        code, out, err = self.fleet.children.fedloom_output(*argv, timeout_s=60)
        if code:
            raise AssertionError(f"fedloom {' '.join(argv)}: exit code {code}\n{err}")
        return out

    def _fault(self) -> None:
        fleet, chance = self.fleet, self.chance
        comes_and_goes = chance.choice(fleet.sites[2:])
        kind = chance.choice(("executor killed", "executor leaves", "script killed", "controller killed", "cut"))
        match kind:
            case "executor killed":
                hit = fleet.kill(fleet.pid(comes_and_goes))
            case "executor leaves":
                hit = pid = fleet.pid(comes_and_goes)
                fleet.hold(comes_and_goes, chance.uniform(0.5, 2.0))
                if pid:
                    os.kill(pid, signal.SIGTERM)
            case "script killed":
                hit = fleet.kill(fleet.part(comes_and_goes, "executor.host"))
            case "controller killed":
                hit = fleet.kill(fleet.pid("controller again"))
            case _:
                hit = fleet.control.cut() + fleet.data.cut()
        self.out.faults[kind] = self.out.faults.get(kind, 0) + bool(hit)

    # ------------------------------------------------------------ measuring

    def _watched(self) -> dict[str, int]:
        fleet = self.fleet
        found = {"broker": fleet.pid("broker"), "broker's data": fleet.part("broker", "broker.data")}
        return found | {"controller": fleet.pid("controller")} | {site: fleet.pid(site) for site in fleet.sites[:2]}

    def _journal_kib(self) -> int:
        """Of both files: what is deleted is used again."""
        return sum(path.stat().st_size for path in self.fleet.store.glob("journal.db*")) // 1024

    def _spool_kib(self) -> int:
        found = 0
        for path in self.fleet.store.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # it is at work
                found += path.stat().st_size * path.is_file()
        return found // 1024

    def _check_end(self, watched: dict[str, int], before: dict[str, Sample]) -> None:
        out = self.out
        out.journal_kib = (out.journal_kib[0], self._journal_kib())
        out.spool_kib = (out.spool_kib[0], self._spool_kib())
        for name, samples in self.samples.items():
            quarter = max(1, len(samples) // 4)
            kept = samples[quarter:]
            out.slopes[name] = round(slope([(s.at, s.bytes) for s in kept]) * 3600 / _MIB, 2)
            out.growth[name] = round((mean(samples[-quarter:]) - mean(samples[quarter : 2 * quarter])) / _MIB, 2)
        for name, pid in watched.items():
            if not parties.alive(pid):
                out.wrong.append(f"{name} has ended by itself")
                continue
            # sessions of those that were killed end after dead_s; links to jobs that are over close behind them
            settled = parties.until(lambda pid=pid, name=name: no_more(look(pid), before[name]), IDLE_S)
            if not settled:
                out.wrong.append(f"{name}: {look(pid)} after all jobs; before them {before[name]}")


def look(pid: int) -> Sample:
    """A process as it is now: anonymous memory that is its own, descriptors, threads."""
    root = Path(f"/proc/{pid}")
    sizes = dict(line.split(":", 1) for line in (root / "smaps_rollup").read_text().splitlines()[1:])
    return Sample(
        time.monotonic(),
        int(sizes["Pss_Anon"].split()[0]) * 1024,
        len(os.listdir(root / "fd")),
        len(os.listdir(root / "task")),
    )


def no_more(now: Sample, before: Sample) -> bool:
    """Whether no descriptor and no thread is left over; memory is judged by its slope."""
    return now.fds <= before.fds + _MORE_FDS and now.threads <= before.threads + _MORE_THREADS


def mean(samples: Sequence[Sample]) -> float:
    return sum(sample.bytes for sample in samples) / len(samples)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line of least squares, in units a second."""
    n = len(points)
    at, value = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - at) ** 2 for x, _ in points)
    return sum((x - at) * (y - value) for x, y in points) / spread if spread else 0.0


def soak(children: Any, folder: Path, seconds: float, seed: int) -> Figures:
    """Run one, and end its fleet."""
    one = Soak(children, folder, run.two_ports(random.Random(seed)), seed)
    try:
        return one.run(seconds)
    finally:
        one.fleet.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    (folder / "logs").mkdir()
    children = processes.Children(folder / "logs")
    try:
        out = soak(children, folder, args.seconds, args.seed)
    finally:
        children.close()
    print(f"{out.seconds:.0f} s, {out.jobs} jobs, faults: {out.faults}")
    print(f"memory, MiB an hour: {out.slopes}; grown, MiB: {out.growth}")
    print(f"journal KiB at half time and at the end: {out.journal_kib}; store: {out.spool_kib}")
    for text in out.wrong:
        print(f"WRONG: {text}")
    if out.wrong:
        print(f"logs: {folder}")
    return bool(out.wrong)


if __name__ == "__main__":
    sys.exit(main())
