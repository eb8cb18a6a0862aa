"""An upgrade of one party at a time while a job runs: `.venv/bin/python tests/chaos/upgrade.py [--from COMMIT]`.

Broker, controller and executors begin as one version. Each is stopped as an operator would (SIGTERM), put to the other
version and started again, one after the other, while a site trains. Two upgrades are run:

- from this version to the next minor one: a copy of this tree that says more in every message (keys that this one does
  not know, a text and a map), has another minor version in its Hello and Welcome, and other features.
- from an older commit to this version, with ``--from`` (needs git and the history).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent / "support"))

from siblings import load  # noqa: E402

account = load(__file__, "account")
jobs = load(__file__, "job")
parties = load(__file__, "parties")
run = load(__file__, "run")
sight = load(__file__, "sight")
processes = load(__file__, "../conftest")

SITES = 2
ROUNDS = 10
PACKAGES = ("broker", "controller", "executor", "recipe", "serialization", "sim")
END_S = 120.0
#: What the next minor version says beside what this one does: (file, what is there, what is there then).
_MORE = ' | {"minor": 1, "zz_text": "n", "zz_map": {"a": [1, 2.5]}}'
NEXT = (
    ("serialization/messages.py", "_packed(message, encode_fields(message))",
     f"_packed(message, encode_fields(message){_MORE})"),
    ("serialization/messages.py", "body = _packed(message, values)", f"body = _packed(message, values{_MORE})"),
    ("broker/state.py", "features=(START_FEATURE,)", 'features=("next",)'),
)  # fmt: skip


def next_version(folder: Path) -> Path:
    """A copy of this tree as the next minor version; the folder that is to be first on its processes' path."""
    tree = folder / "next" / "fedloom"
    skip = shutil.ignore_patterns("__pycache__")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=skip)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tree)
    for name, old, new in NEXT:
        path = tree / name
        text = path.read_text()
        assert old in text, f"{name} has no {old!r} any more"
        path.write_text(text.replace(old, new))
    return tree.parent


def version_of(commit: str, folder: Path) -> Path:
    """A commit's tree; the folder that is to be first on its processes' path."""
    tree = folder / "before" / "fedloom"
    tree.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "x", "-C", str(tree)], input=archive, check=True)
    return tree.parent


class Upgrade:
    """One fleet, and what its upgrade has shown."""

    def __init__(self, children: Any, folder: Path, before: Path | None, after: Path | None, seed: int) -> None:
        self.folder = folder
        sites = [f"site-{number}" for number in range(1, SITES + 1)]
        ports = run.two_ports(random.Random(seed))
        self.fleet = parties.Parties(children, folder, ports, sites=sites, streamed=True, seed=seed)
        self.after = after
        for party in self.fleet.all.values():
            party.env = party.env | ({"PYTHONPATH": str(before)} if before else {})
        self.stops: dict[str, float] = {}  # seconds that each party took to end
        self.wrong: list[str] = []

    def run(self) -> list[str]:
        """Upgrade each party while somebody trains; what was wrong with it."""
        fleet, wrong = self.fleet, self.wrong
        folder = self.folder / "job"
        folder.mkdir()
        job = jobs.ChaosJob(folder, sites=SITES, rounds=ROUNDS, elements=100_000, function=False, work_s=0.25)
        calm, exported = job.undisturbed(), job.export()
        fleet.start()
        job_id = json.loads(self._command("submit", str(exported), "--json"))["job_id"]
        settled: list[tuple[Counter[str], set[tuple[int, str]]]] = []
        for name in list(fleet.all):
            settled.append(self._upgrade(name, job, job_id))
            if wrong:
                return wrong
        if not parties.until(lambda: account.status(fleet.store, job_id).startswith("FINISHED"), END_S):
            return [f"the job did not end within {END_S:g} s"]
        result = self.folder / "result"
        self._command("download", job_id, "-o", str(result))
        events = json.loads(self._command("logs", job_id, "--json"))["events"]
        found = account.account(job, job_id, account.read_records(result), events, fleet)
        wrong += found.wrong + sight.traces(fleet)
        if jobs.digest(result) != calm:
            wrong.append("the model is not the undisturbed one")
        if found.lost or found.twice:
            wrong.append(f"{found.lost} lost, {found.twice} folded twice")
        for runs, known in settled:  # what the broker had taken before a stop was not trained again behind it
            again = [key for key in known if job.runs()[f"begin {key[1]} {key[0]}"] > runs[f"begin {key[1]} {key[0]}"]]
            if again:
                wrong.append(f"trained again though it was stored: {again}")
        return wrong

    def _upgrade(self, name: str, job: Any, job_id: str) -> tuple[Counter[str], set[tuple[int, str]]]:
        """Stop a party at work, start it again as the other version, and wait until the job moves on."""
        fleet, party = self.fleet, self.fleet.all[name]
        parties.until(lambda: job.training() and (p := account.progress(fleet.store)) and p.working, 60)
        seen = account.progress(fleet.store)
        known, runs = account.acknowledged(job, job_id, fleet), job.runs()
        party.env = {key: value for key, value in party.env.items() if key != "PYTHONPATH"}
        party.env |= {"PYTHONPATH": str(self.after)} if self.after else {}
        ended, began = len(party.codes), time.monotonic()
        os.kill(fleet.pid(name), signal.SIGTERM)
        if not parties.until(lambda: len(party.codes) > ended, 30):
            self.wrong.append(f"{name} did not end within 30 s of SIGTERM")
        elif party.codes[-1] != 0:
            self.wrong.append(f"{name} ended with {party.codes[-1]}")
        self.stops[name] = round(time.monotonic() - began, 2)

        def moved() -> bool:
            now = account.progress(fleet.store)
            return now is not None and seen is not None and now.commits > seen.commits and fleet.pid(name) > 0

        if not parties.until(moved, 60):
            self.wrong.append(f"nothing was committed within 60 s of the upgrade of {name}")
        return runs, known

    def _command(self, *words: str) -> str:
        argv = ("job", *words, "--broker", self.fleet.endpoint, "--connect-timeout", "30")
        code, out, err = self.fleet.children.fedloom_output(*argv, timeout_s=60)
        if code:
            raise AssertionError(f"fedloom {' '.join(argv)}: exit code {code}\n{err}")
        return out


def upgrade(children: Any, folder: Path, before: Path | None, after: Path | None, seed: int = 1) -> Upgrade:
    """Run one, and end its fleet."""
    one = Upgrade(children, folder, before, after, seed)
    try:
        one.run()
    finally:
        one.fleet.close()
    return one


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--from", dest="commit", help="a commit to come from, instead of going to the next version")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = Path(tempfile.mkdtemp(prefix="upgrade-"))
    (folder / "logs").mkdir()
    children = processes.Children(folder / "logs")
    try:
        before = version_of(args.commit, folder) if args.commit else None
        one = upgrade(children, folder, before, None if args.commit else next_version(folder))
    finally:
        children.close()
    print(f"{args.commit or 'this version'} to {'this' if args.commit else 'the next'} one; stopped within {one.stops}")
    for text in one.wrong:
        print(f"WRONG: {text}")
    if one.wrong:
        print(f"logs: {folder}")
    return bool(one.wrong)


if __name__ == "__main__":
    sys.exit(main())
