"""The row of the warm process: a simulation, whose processes all come out of it, is ended by its death and goes on.

Nothing starts a simulation again but its user, by the same command with ``--resume``: that is what heals it here.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from siblings import load

account = load(__file__, "account")
jobs = load(__file__, "job")
matrix = load(__file__, "matrix")
parties = load(__file__, "parties")
sight = load(__file__, "sight")

NAME = "warm process"
SITES = 4
SERVER = "fedloom.sim.forkserver.server"
#: How long a simulation may take to begin its work, and to end when its warm process is gone.
BEGIN_S = 60.0
END_S = 30.0


class WarmRun:
    """A simulation whose warm process is killed again and again while a site trains."""

    def __init__(self, children: Any, folder: Path, seed: int) -> None:
        self.children = children
        self.folder = folder
        self.chance = random.Random(seed)
        self.outcome = matrix.Outcome(NAME, account=account.Account())
        self._known: list[tuple[Counter[str], set[tuple[int, str]]]] = []
        self._words: list[str] = []

    def run(self, faults: int, rounds: int) -> Any:
        """Kill it so often, and let it come to its end."""
        out = self.outcome
        folder = self.folder / "job"
        folder.mkdir()
        # more than a round may pass between two faults
        job = jobs.ChaosJob(folder, sites=SITES, rounds=2 * rounds, elements=100_000, function=False, work_s=0.25)
        calm, exported = job.undisturbed(), job.export()
        sites = ",".join(job.sites)
        argv = ("sim", str(exported), "-c", sites, "-t", "2", "-w", str(self.folder / "runs"), "--resume")
        at = 0.0
        seen: Any = None
        while not out.wrong:
            child = self.children.fedloom(*argv, env={"FEDLOOM_NO_LOCAL": ""})
            moved = self._wait_for_work(child, job, seen)
            if seen is not None:
                out.recoveries.append(time.monotonic() - at)
            if not moved:
                out.wrong.append(f"nothing moved within {BEGIN_S:g} s:\n{child.text[-2000:]}")
                break
            if out.hit == faults or child.process.poll() == 0:
                if child.wait(matrix.END_S) != 0:
                    out.wrong.append(f"exit code {child.process.returncode}:\n{child.text[-2000:]}")
                if out.hit < faults:
                    out.wrong.append(f"only {out.hit} faults of {faults} hit anybody")
                break
            time.sleep(self.chance.uniform(0, 0.3))  # not a wait for something: where in the round it strikes
            seen, at = self._kill(child, job), time.monotonic()
        if not out.wrong:
            self._settle(job, calm)
        return out

    @property
    def _store(self) -> Path:
        return next(
            (path.parent for path in (self.folder / "runs").glob("*/.sim/store/journal.db")), self.folder / "none"
        )

    def _wait_for_work(self, child: Any, job: Any, seen: Any) -> bool:
        """Until a site trains and more is done than was before."""

        def moved() -> bool:
            now = account.progress(self._store)
            if child.process.poll() is not None or now is None:
                return child.process.poll() == 0
            before = (
                (0, SITES) if seen is None else (seen.commits, seen.accepted)
            )  # a round, which is worth going on with
            return now.working and bool(job.training()) and (now.commits, now.accepted) > before

        return bool(parties.until(moved, BEGIN_S))

    def _kill(self, child: Any, job: Any) -> Any:
        """kill -9 of the warm process; how far the run was, for what comes behind it."""
        out = self.outcome
        below = [pid for pid in parties.descendants(child.pid) if SERVER in parties.command(pid)]
        warm = min(below, default=0)  # it forks all the others, which keep its command line
        if not warm or not parties.alive(warm):
            out.missed += 1
            return account.progress(self._store)
        parties.os.kill(warm, parties.signal.SIGKILL)
        out.hit += 1
        code = child.wait(END_S)
        self._words.append(child.text)
        if code != 1 or NAME not in child.text or "--resume" not in child.text:
            out.wrong.append(f"exit code {code} without a word on the warm process and --resume:\n{child.text[-2000:]}")
        self.children.gone()  # within seconds: no site goes on without it
        self._known.append((job.runs(), account.taken(self._store)))
        return account.progress(self._store)

    def _settle(self, job: Any, calm: str) -> None:
        out = self.outcome
        result = next(path.parent for path in (self.folder / "runs").rglob("metrics.jsonl"))
        records = account.read_records(result)
        folded = Counter((record["round"], site["name"]) for record in records for site in record["sites"])
        counted = out.account
        counted.folded, counted.tasks = sum(folded.values()), SITES * job.rounds
        counted.twice = sum(count - 1 for count in folded.values())
        counted.executions = sum(count for line, count in job.runs().items() if line.startswith("begin "))
        known = {key for _, keys in self._known for key in keys}
        counted.acknowledged, counted.lost = len(known), len(known - set(folded))
        for runs, keys in self._known:
            again = [key for key in keys if job.runs()[f"begin {key[1]} {key[0]}"] > runs[f"begin {key[1]} {key[0]}"]]
            if again:
                out.wrong.append(f"trained again though it was stored: {again}")
        out.equal = jobs.digest(result) == calm
        if counted.lost or counted.twice or not out.equal or counted.folded != counted.tasks:
            out.wrong.append(json.dumps(out.figures()))
        out.wrong += [f"a stack trace: {text[-2000:]}" for text in self._words if sight.TRACES[0] in text]
        out.seen = {"lines": {NAME: len(self._words)}}
