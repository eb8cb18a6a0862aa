"""One schedule: a seed's faults over a seed's interleaving, run to its end and judged."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import network as net
import product
import system
from check import Checker
from cluster import Cluster
from disk import Disk
from faults import Plan
from machine import Hang, Machine
from network import Network
from scenario import VARIANTS, Reference, make_archive

LIMIT_S = 400.0
REST_S = 120.0
_LOOK_S = 0.1

_references = Reference()
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
    trace: str = ""  # a hash of everything that was said: equal for equal runs


def base_folder() -> Path:
    """Where runs live: in memory if there is room for that."""
    shm = Path("/dev/shm")
    return shm if shm.is_dir() and shutil.disk_usage(shm).free > 1 << 28 else Path(tempfile.gettempdir())


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
    outcome = Outcome(plan, checker.broken)

    resting = [False]

    def look() -> None:
        checker.look(cluster)
        resting[0] = bool(cluster.ended_at) and not checker.rest(cluster)
        machine.call_at(machine.now + _LOOK_S, look)

    try:
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
    for party, thread, error in machine.crashes:
        checker.say(f"thread {party}/{thread} ended with {error!r}{_trace_of(error)}")
    outcome.hits = cluster.hits + network.hits + disk.hits
    outcome.steps, outcome.virtual_s = machine.steps, machine.now
    outcome.executions = sum(cluster.executions.values())
    outcome.refusals = checker.refusals
    outcome.trace = hashed.hexdigest()
    stderr, sys.stderr = sys.stderr, open("/dev/null", "w")
    try:
        machine.close()
    finally:
        sys.stderr.close()
        sys.stderr = stderr
        product.LISTENER.tell = product.LISTENER.verbose = None
        shutil.rmtree(root, ignore_errors=True)
    return outcome


def _calm(cluster: Cluster) -> None:
    """No more faults: everybody gets the time to come to rest."""
    cluster.calm = True
    cluster.network.weather.clear()
    cluster.disk.full = cluster.disk.failing = False
    system_points = __import__("fedloom.serialization.faultpoints", fromlist=["arm"])
    system_points.arm("")
    for party in cluster.machine.parties.values():
        party.crash_at = 0


def _line(machine: Machine, method: str, event: dict[str, object]) -> str:
    who = machine.current.party.name if machine.current is not None else "-"
    rest = " ".join(f"{k}={v}" for k, v in event.items() if k not in ("event", "exc_info"))
    return f"    {who}: {method} {event['event']} {rest}"


def _trace_of(error: BaseException) -> str:
    import traceback

    return "\n" + "".join(traceback.format_exception(error)[-6:])
