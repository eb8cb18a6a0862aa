"""What a round costs when the work in it costs nothing: connected executors, each a program with a function in it."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from figures import Figure, Target
from micro.cluster import cluster
from micro.hops import echo_chain, round_trip_s


def measure(*, quick: bool = False) -> list[Figure]:
    """Rounds with two executors, and with a thousand sites behind four."""
    with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as folder, echo_chain(Path(folder), "tcp") as dealer:
        trip = round_trip_s(dealer) * 1000
    against = "four ZeroMQ hops, tcp"
    out: list[Figure] = []
    for durability in ("power", "process"):
        ms = _round_ms(2, 1, 12 if quick else 60, durability)
        out.append(Figure(f"no-op round, 2 executors, durability {durability}", ms, "ms", against, trip, Target(10)))
    sites = 250
    ms = _round_ms(4, sites, 4 if quick else 10, "process")
    out.append(Figure(f"no-op round, 1,000 sites: 4 pools of {sites}", ms, "ms", against, trip, Target(150)))
    return out


def _round_ms(executors: int, sites: int, rounds: int, durability: str) -> float:
    with cluster(durability=durability) as running:
        for _ in range(executors):
            running.executor(sites, capacity=1 if sites == 1 else 2)
        running.wait()
        seconds = running.run(rounds)
    return statistics.median(seconds[1:] or seconds) * 1000  # the first round loads the job's code
