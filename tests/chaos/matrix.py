"""One row of the matrix: a job behind faults until enough of them hit, and what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.serialization.errors import FedloomError
from siblings import load

account = load(__file__, "account")
network = load(__file__, "network")
sight = load(__file__, "sight")
parties = load(__file__, "parties")
jobs = load(__file__, "job")

#: How long a fault may take until something moves again, and a job until it ends: over it the row is wrong.
RECOVERY_S = 90.0
END_S = 180.0
#: A small disk: what the run needs and some.
DISK_BYTES = 192 * 1024 * 1024
MAX_JOBS = 4


@dataclass(slots=True)
class Outcome:
    """A row's figures."""

    row: str
    hit: int = 0
    missed: int = 0
    recoveries: list[float] = field(default_factory=list[float])
    account: Any = None
    sent_again: float = 0.0  # bytes towards the broker's data link over the payloads' own, less one
    equal: bool = True
    seen: dict[str, Any] = field(default_factory=dict[str, Any])  # lines, entries and counts, as an operator sees them
    wrong: list[str] = field(default_factory=list[str])

    def figures(self) -> dict[str, Any]:
        found = sorted(self.recoveries)
        at = lambda share: round(found[min(len(found) - 1, int(share * len(found)))], 2) if found else None  # noqa: E731
        counted = self.account
        return {
            "row": self.row, "hit": self.hit, "missed": self.missed, "acknowledged": counted.acknowledged,
            "folded": counted.folded, "lost": counted.lost, "twice": counted.twice, "late": counted.late,
            "refused": counted.refused, "executions": counted.executions, "tasks": counted.tasks,
            "sent_again": round(self.sent_again, 3), "p50": at(0.5), "p95": at(0.95), "max": at(1.0),
            "equal": self.equal, "seen": self.seen, "wrong": self.wrong,
        }  # fmt: skip


class Run:
    """A fleet and its jobs under one kind of fault."""

    def __init__(
        self, row: Any, children: Any, folder: Path, ports: tuple[int, int], seed: int, turns: Sequence[Any] = ()
    ) -> None:
        self.row = row
        self.turns = turns or (row,)  # whose faults come one after the other
        self.folder = folder
        self.chance = random.Random(seed)
        self.outcome = Outcome(row.name, account=account.Account())
        self.journal = folder / "faults.jsonl"
        self.records: list[dict[str, Any]] = []
        self.mounted: Path | None = None
        self.network = network.Network() if row.away else None
        self.fleet = parties.Parties(
            children,
            folder,
            ports,
            sites=[f"site-{n}" for n in range(1, row.sites + 1)],
            streamed=row.streamed,
            seed=seed,
            network=self.network,
        )
        if any(turn.second for turn in self.turns):
            for site in self.fleet.sites:
                self.fleet.second(site)
        if row.medium:
            self._small_disk()

    def _small_disk(self) -> None:
        """A file system of its own for the store, for its spool or its journal alone."""
        disk = self.folder / "disk"
        disk.mkdir()
        size = f"size={DISK_BYTES // 8 if self.row.medium == 'journal' else DISK_BYTES}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "fedloom-chaos", str(disk)], check=True)
        self.mounted = disk
        store = self.fleet.store
        if self.row.medium == "journal":
            store.mkdir(mode=0o700)
            (store / "journal.db").symlink_to(disk / "journal.db")
        else:
            (disk / "store").mkdir(mode=0o700)
            store.symlink_to(disk / "store")
            if self.row.medium == "spool":
                (disk / "store" / "journal.db").symlink_to(self.folder / "journal.db")

    def close(self) -> None:
        self.fleet.close()

    def unmount(self) -> None:
        """Behind the end of all processes."""
        if self.network is not None:
            self.network.close()
        if self.mounted is not None:
            subprocess.run(["umount", "-l", str(self.mounted)], check=False)
            shutil.rmtree(self.mounted, ignore_errors=True)

    # ------------------------------------------------------------ a row

    def run(self, faults: int, rounds: int) -> Outcome:
        """Jobs of so many rounds until so many faults have hit."""
        row, out = self.row, self.outcome
        folder = self.folder / "job"
        folder.mkdir()
        job = jobs.ChaosJob(
            folder,
            sites=row.sites,
            rounds=row.rounds or rounds,
            elements=row.elements,
            function=row.function,
            work_s=row.work_s,
            keeps=not row.second,  # another machine has not what the frozen one kept
        )
        calm = job.undisturbed()
        exported = job.export()
        self.fleet.full = self.mounted or self.folder
        self.fleet.frozen = []
        self.fleet.training = job.training
        self.fleet.start()
        for _ in range(MAX_JOBS):
            if self._job(job, exported, calm, faults) or out.wrong:
                break
        if out.hit < faults:
            out.wrong.append(f"only {out.hit} faults of {faults} hit anybody")
        self._look()
        sent, payload = self.fleet.data.counts.up, out.account.payload_bytes
        out.sent_again = max(0.0, sent / payload - 1) if row.streamed and payload else 0.0
        return out

    def _job(self, job: Any, exported: Path, calm: str, faults: int) -> bool:
        """One job; whether enough faults have hit by its end."""
        out = self.outcome
        job.runs_path.unlink(missing_ok=True)
        job_id = json.loads(self._command("submit", str(exported), "--json"))["job_id"]
        wire = self.row.wire
        before = wire(self.fleet) if wire else 0
        if wire:
            parties.until(lambda: job.training(), 60)
            self.row.inject(self.fleet, self.chance)
        while (out.hit < faults or wire) and self._status(job_id) == "RUNNING":
            if wire:
                parties.until(lambda: self._status(job_id) != "RUNNING", 2)
                out.hit = wire(self.fleet)
            else:
                self._fault(job_id)
            if out.wrong:
                return True
        if wire:
            self.fleet.control.weather.flip = self.fleet.data.weather.flip = 0.0
            out.hit = wire(self.fleet)
            self._note({"altered": out.hit - before})
        self.fleet.data.weather.bytes_per_s = 0.0
        if not parties.until(lambda: self._status(job_id) not in ("RUNNING", "SUBMITTED", ""), END_S):
            out.wrong.append(f"the job did not end within {END_S:g} s")
            return True
        self._settle(job, job_id, calm)
        return out.hit >= faults

    def _fault(self, job_id: str) -> None:
        """Wait until somebody works, bring one fault about, and wait until something moves again."""
        out, fleet = self.outcome, self.fleet
        row = self.turns[out.hit % len(self.turns)]
        if not parties.until(lambda: fleet.training() and (p := self._progress()) and p.working, 30):
            return
        # not a wait for something: where in the round it strikes
        time.sleep(self.chance.uniform(0, 1.2 * self.row.work_s))
        seen = self._progress()
        if seen is None or not seen.working:
            return
        doing = fleet.training()
        at = time.monotonic()
        fleet.round = seen.commits
        hit = row.inject(fleet, self.chance)
        ends = at + row.lasts_s
        if row.second and hit:
            self._take_over(row, ends)
        elif row.heal:
            parties.until(lambda: False, max(0.0, ends - time.monotonic()))
        if row.heal:
            row.heal(fleet)
        at_work = {"commits": seen.commits, "accepted": seen.accepted, "of": seen.tasks, "training": doing}
        self._note({"fault": row.name, "hit": hit} | at_work)
        if not hit:
            out.missed += 1
            return
        out.hit += 1
        moved = parties.until(lambda: self._moved(seen) or self._ended(job_id), RECOVERY_S)
        out.recoveries.append(time.monotonic() - at)
        if len(self.turns) > 1:
            fleet.data.weather.bytes_per_s = 0.0  # the next kind does not need it slow
        if not moved:
            out.wrong.append(f"nothing moved within {RECOVERY_S:g} s of fault {out.hit}, {row.name}: {seen}")

    def _take_over(self, row: Any, until: float) -> None:
        """Another machine for the frozen site, which works until the frozen one is back and a little longer."""
        fleet = self.fleet
        site = next(name for name in fleet.sites if fleet.pid(name) in fleet.frozen)
        other = fleet.all[f"{site} again"]
        other.down_until = 0.0
        parties.until(lambda: False, max(0.0, until - time.monotonic()))
        fleet.hold(other.name, float("inf"))
        pids = fleet.tree(other.name)
        row.heal(fleet)
        parties.until(lambda: False, 0.5)
        fleet.kill(*pids)

    def _settle(self, job: Any, job_id: str, calm: str) -> None:
        """The job has ended: its account."""
        out = self.outcome
        status = self._status(job_id)
        if status != "FINISHED:COMPLETED":
            out.wrong.append(f"job {job_id}: {status} {self._command('status', job_id)[-600:]}")
            return
        result = self.folder / f"result {job_id}"
        self._command("download", job_id, "-o", str(result))
        records = account.read_records(result)
        self.records += records
        events = json.loads(self._command("logs", job_id, "--json"))["events"]
        found = account.account(job, job_id, records, events, self.fleet)
        out.account = out.account + found
        out.wrong += found.wrong
        if jobs.digest(result) != calm:
            out.equal = False
            out.wrong.append("the model is not the undisturbed one")
        if found.lost or found.twice:
            out.wrong.append(f"{found.lost} lost, {found.twice} folded twice")

    # ------------------------------------------------------------ looking

    def _look(self) -> None:
        """What an operator has seen of it all."""
        out = self.outcome
        counted, entries = sight.counters(self._fedloom("status", "--json")), sight.entries(self.records)
        out.seen = {"entries": dict(entries), "counters": counted}
        for row in self.turns:
            told = sight.lines(self.fleet, row.sign)
            out.seen.setdefault("lines", {}).update({f"{row.sign.by} {event}": n for event, n in told.items()})
            hits = 1 if row.wire or len(self.turns) > 1 else out.hit
            out.wrong += [f"{row.name}: {text}" for text in sight.missing(row.sign, hits, told, entries, counted)]
        out.wrong += [f"a stack trace: {text}" for text in sight.traces(self.fleet)]

    def _progress(self) -> Any:
        return account.progress(self.fleet.store)

    def _moved(self, seen: Any) -> bool:
        now = self._progress()
        return now is not None and (now.commits, now.accepted) > (seen.commits, seen.accepted)

    def _ended(self, job_id: str) -> bool:
        return self._status(job_id).startswith("FINISHED")

    def _status(self, job_id: str) -> str:
        """By the journal: to ask the broker would be slow while it is down."""
        return account.status(self.fleet.store, job_id)

    def _command(self, *words: str) -> str:
        """A `fedloom job` command."""
        return self._fedloom("job", *words)

    def _fedloom(self, *words: str) -> str:
        """A `fedloom` command to the broker, asked again while that is on its way back."""
        deadline = time.monotonic() + 60
        while True:
            argv = (*words, "--broker", self.fleet.endpoint)
            with contextlib.suppress(subprocess.TimeoutExpired, FedloomError):
                code, out, err = self.fleet.children.fedloom_output(*argv, timeout_s=60)
                if code == 0:
                    return out
                if time.monotonic() > deadline:
                    raise AssertionError(f"fedloom {' '.join(argv)}: exit code {code}\n{err}")

    def _note(self, what: dict[str, Any]) -> None:
        with self.journal.open("a") as file:
            file.write(json.dumps({"row": self.row.name, "at": round(time.time(), 3)} | what) + "\n")
            file.flush()
            os.fsync(file.fileno())
