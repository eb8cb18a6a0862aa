"""Results over TCP between separate processes: from an executor's tensors to folded, four at once, and one alone.

Executors hand nothing over as a file here, as if they were on other machines. The controller is beside the broker and
maps what is in the spool, as it does where both are started with their defaults; in the rows "all over TCP" it streams
as well, so that each byte makes two hops and twice the time of one is the least that it can take. The references move
the same bytes between two processes: one plain ZeroMQ hop in the broker's chunks, zero-copy at both ends, and a plain
TCP connection.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from figures import Figure, Target
from jobs.workload import read_events
from micro.cluster import Cluster, cluster
from micro.hops import tcp_rate, zmq_rate

_CHUNK = 2**20
_MIB = 2**20
#: Durability, results at once, and whether the controller is beside the broker.
_CASES = (
    ("process", 4, True),
    ("process", 1, True),
    ("power", 4, True),
    ("power", 1, True),
    ("process", 4, False),
)


def measure(*, quick: bool = False) -> list[Figure]:
    """GB/s of results, in both modes and durabilities."""
    sys.path.append(str(Path(__file__).resolve().parent))
    mib = 32 if quick else 256
    rounds = 2 if quick else 3
    total = 4 * mib * _MIB
    hop = statistics.median(zmq_rate(total, _CHUNK) for _ in range(3))
    tcp = statistics.median(tcp_rate(total) for _ in range(3))
    out = [Figure("one plain ZeroMQ hop, chunks of 1 MiB", hop, "GB/s", "plain TCP", tcp)]
    against = "one ZeroMQ hop"
    for durability, clients, beside in _CASES:
        with cluster(durability=durability, trust_local=beside, chunk_bytes=_CHUNK) as running:
            for _ in range(clients):
                running.executor(mib=mib, together=clients, remote=True)
            running.wait()
            for exact in (True, False):
                name = f"{clients} x {mib} MiB to folded, {durability}, {'exact' if exact else 'float32'}"
                goal = Target(0.5, "high", "ratio") if clients == 4 and durability == "process" else None
                try:
                    rate, why = _rate(running, rounds, mib, clients, exact=exact), ""
                except RuntimeError as error:  # the others are measured all the same
                    rate, why = None, " ".join(str(error).split())[:200]
                name += "" if beside else ", all over TCP"
                out.append(Figure(name, rate, "GB/s", against, hop, goal, why))
    return out


def _rate(running: Cluster, rounds: int, mib: int, clients: int, *, exact: bool) -> float:
    for left in running.folder.glob("here-*"):
        left.unlink()
    options: dict[str, Any] = {"class_path": "timed_mean.TimedMean", "args": {"exact": exact}}
    running.run(rounds, mib=mib, aggregator=options)
    ready: dict[int, float] = {}
    folded: list[float] = []
    for entry in read_events(running.events):
        if entry["event"] == "ready":
            ready[entry["round"]] = min(entry["at"], ready.get(entry["round"], entry["at"]))
        elif entry["event"] == "folded":
            folded.append(entry["at"])
    taken = [end - ready[number] for number, end in enumerate(folded)]
    if len(taken) != rounds:
        raise RuntimeError(f"{len(taken)} folds were seen in {rounds} rounds")
    return clients * mib * _MIB / statistics.median(taken) / 1e9
