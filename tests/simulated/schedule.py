"""One schedule: a seed's faults over a seed's interleaving, run to its end and judged."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import faults
import network as net
import product
import system
from check import Checker
from cluster import Cluster
from disk import Disk
from faults import Plan
from fedloom.serialization import faultpoints
from machine import Hang, Machine
from network import Network
from scenario import VARIANTS, Reference, make_archive

LIMIT_S = 400.0
REST_S = 120.0
_LOOK_S = 0.1

#: Of the run that goes on.
CLUSTER: Cluster = None  # type: ignore[assignment]
_references = Reference()
silence = io.TextIOWrapper(io.BufferedWriter(io.FileIO(os.devnull, "w")))
_archives: dict[int, bytes] = {}


@dataclass
class Outcome:
    """What became of a schedule."""

    plan: Plan
    broken: list[str]
    hits: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    virtual_s: float = 0.0
    busy_s: float = 0.0
    executions: int = 0
    refusals: int = 0
    most: dict[str, int] = field(default_factory=dict)
    trace: str = ""  # a hash of everything that was said: equal for equal runs

    def figures(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "plan": str(self.plan),
            "broken": [text[:6000] for text in self.broken],
            "faults": Counter(fault.kind for fault in self.plan.faults),
            "hits": +self.hits,
            "steps": self.steps,
            "virtual_ms": int(self.virtual_s * 1000),
            "executions": self.executions,
            "refusals": self.refusals,
            "most": self.most,
            "trace": self.trace,
        }


def base_folder() -> Path:
    """Where runs live: in memory if there is room for that."""
    shm = Path("/dev/shm")
    return shm if shm.is_dir() and shutil.disk_usage(shm).free > 1 << 28 else Path(tempfile.gettempdir())


def draw(seed: int, variant: int | None = None) -> Plan:
    """A seed's schedule; of this job alone, where it is named."""
    if variant is not None:
        return replace(faults.draw(seed, [VARIANTS[variant].busy_s], [1]), variant=variant)
    # those whose models go in chunks take three times as long to run
    weights = [0 if scenario.scores or scenario.fails else 1 if scenario.floats > 8192 else 3 for scenario in VARIANTS]
    return faults.draw(seed, [scenario.busy_s for scenario in VARIANTS], weights)


def parse(line: str) -> Plan:
    """The schedule of a line in the regression file."""
    return faults.parse(line)


def shrink(plan: Plan) -> Plan:
    """As few of the faults as still break something."""
    kept = list(plan.faults)
    for fault in plan.faults:
        fewer = replace(plan, faults=tuple(f for f in kept if f is not fault))
        if run(fewer).broken:
            kept.remove(fault)
    return replace(plan, faults=tuple(kept))


def run(plan: Plan, *, verbose: bool = False) -> Outcome:
    """Run a schedule."""
    scenario = VARIANTS[plan.variant]
    root = Path(tempfile.mkdtemp(prefix="fedloom-room-", dir=base_folder()))
    machine = Machine(plan.seed)
    network = Network(machine, plan.seed * 5 + 3)
    disk = Disk(root, plan.seed * 7 + 4)
    hashed = hashlib.blake2b(digest_size=8)

    def trace(text: str) -> None:
        hashed.update(text.replace(str(root), "ROOT").encode())
        if verbose:
            print(text, file=sys.stderr)

    machine.trace = trace
    system.enter(machine, disk)
    net.enter(network)
    if plan.variant not in _archives:
        folder = root / "job-folder"
        folder.mkdir()
        _archives[plan.variant] = make_archive(scenario, folder)
    checker = Checker(machine, network, disk, _references)
    product.LISTENER.tell = checker.heard
    product.LISTENER.verbose = (lambda m, e: machine.say(_line(machine, m, e))) if verbose else None
    cluster = Cluster(machine, network, disk, scenario, plan, _archives[plan.variant])
    system.killed = cluster.point_hit
    global CLUSTER
    CLUSTER = cluster
    outcome = Outcome(plan, checker.broken)
    stderr = sys.stderr

    resting = [False]

    def look() -> None:
        checker.look(cluster)
        resting[0] = bool(cluster.ended_at) and not checker.rest(cluster)
        machine.call_at(machine.now + _LOOK_S, look)

    try:
        if not verbose:
            sys.stderr = silence  # user code's tracebacks
        cluster.start()
        look()
        machine.run(lambda: bool(cluster.ended_at) or bool(checker.broken), LIMIT_S)
        outcome.busy_s = machine.now
        if not checker.broken:
            _calm(cluster)
            machine.run(lambda: resting[0] or bool(checker.broken), REST_S)
        if not checker.broken:
            checker.end(cluster)
    except Hang as error:
        checker.say(f"hang: {error}; {checker.rest(cluster)}\n{machine.stacks()}")
    finally:
        sys.stderr = stderr
    for party, thread, error in machine.crashes:
        checker.say(f"thread {party}/{thread} ended with {error!r}{_trace_of(error)}")
    outcome.hits = cluster.hits + network.hits + disk.hits
    outcome.steps, outcome.virtual_s = machine.steps, machine.now
    outcome.executions = sum(cluster.executions.values())
    outcome.refusals, outcome.most = checker.refusals, checker.most
    hashed.update(f"{machine.steps} {machine.now!r}".encode())
    outcome.trace = hashed.hexdigest()
    try:
        sys.stderr = silence  # what the dying say
        machine.close()
    finally:
        sys.stderr = stderr
        product.LISTENER.tell = product.LISTENER.verbose = None
        shutil.rmtree(root, ignore_errors=True)
    return outcome


def _calm(cluster: Cluster) -> None:
    """No more faults: everybody gets the time to come to rest."""
    cluster.calm = True
    cluster.network.weather.clear()
    cluster.disk.full = cluster.disk.failing = False
    faultpoints.arm("")
    for party in cluster.machine.parties.values():
        party.crash_at = 0


def _line(machine: Machine, method: str, event: dict[str, object]) -> str:
    who = machine.current.party.name if machine.current is not None else "-"
    rest = " ".join(f"{k}={v}" for k, v in event.items() if k not in ("event", "exc_info"))
    return f"    {who}: {method} {event['event']} {rest}"


def _trace_of(error: BaseException) -> str:
    import traceback

    return "\n" + "".join(traceback.format_exception(error)[-6:])
