"""Ten thousand virtual clients with tiny tasks in one round, on two workers; beside pfl-research where it is there."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from figures import Figure, Target
from jobs.workload import differences, read_events, round_starts
from measure import watch
from rows import Row
from systems import BY_KEY, System, environment

_ROUNDS = 3


def measure(*, quick: bool = False) -> list[Figure]:
    """Seconds of a round, in both modes."""
    clients = 1000 if quick else 10_000
    row = Row("fleet", "", "np", clients=clients, rounds=_ROUNDS, at_once=2, functions=True)
    pfl = BY_KEY["pfl"]
    other = None if pfl.missing else _round_s(pfl, row)
    out: list[Figure] = []
    for mode in ("exact", "float32"):
        title = f"{clients:,} virtual clients, one round, {BY_KEY[mode].title}"
        seconds = _round_s(BY_KEY[mode], row)
        out.append(Figure(title, seconds, "s", target=None if quick else Target(2.5)))
        missing = "" if other is not None else "pfl is not installed: `make bench-peers`"
        out.append(Figure(title + ", against pfl", seconds, "s", "pfl", other, Target(1, "below", "ratio"), missing))
    return out


def _round_s(system: System, row: Row) -> float:
    with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as name:
        folder = Path(name)
        env = environment(system, folder / "events.jsonl", folder / "result.npz")
        measured = watch(system.command(system.python, row, folder / "work"), env=env, cwd=folder, timeout_s=300)
        if measured.code:
            raise RuntimeError(f"{system.key} ended with {measured.code}: {measured.said[-1500:]}")
        starts = round_starts(read_events(folder / "events.jsonl"))
    return statistics.median(differences(starts))
