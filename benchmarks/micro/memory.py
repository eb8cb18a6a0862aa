"""Anonymous and shared memory of broker and controller together, against the number of clients.

Every client's result goes to the controller singly (``prefold`` is off), two clients at a time: what a server must hold
is then one aggregate, 8 bytes a parameter exact and 4 in float32, whatever their number.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from figures import Figure, Target
from jobs.workload import read_events, round_starts
from measure import group_bytes, watch
from rows import Row
from systems import BY_KEY, JOBS, environment

_MODEL_MIB = 16
_ROUNDS = 2
_SLACK_MIB = 64
_EVERY_S = 0.1
_MIB = 2**20


def measure(*, quick: bool = False) -> list[Figure]:
    """MiB over idle, for 2 to 64 clients."""
    out: list[Figure] = []
    for mode, aggregates in (("exact", 2), ("float32", 1)):
        bound = aggregates * _MODEL_MIB + _SLACK_MIB
        grown: list[float] = []
        for clients in (2, 8) if quick else (2, 8, 32, 64):
            grown.append(_grown_mib(clients, mode))
            name = f"broker and controller over idle, {clients} clients of {_MODEL_MIB} MiB, {BY_KEY[mode].title}"
            size = aggregates * _MODEL_MIB
            out.append(Figure(name, grown[-1], "MiB", "one aggregate", size, Target(bound)))
        name = f"the same, most clients against fewest, {BY_KEY[mode].title}"
        # flat: what differs is which moment was looked at, less than a result
        out.append(Figure(name, grown[-1], "MiB", "2 clients", grown[0], Target(_MODEL_MIB, of="extra")))
    return out


def _grown_mib(clients: int, mode: str) -> float:
    row = Row("memory", "", "big", clients=clients, rounds=_ROUNDS, at_once=2, mib=_MODEL_MIB, tensors=8)
    system = BY_KEY[mode]
    with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as name:
        folder = Path(name)
        env = environment(system, folder / "events.jsonl", folder / "result.npz")
        argv = [str(system.python.with_name("fedloom")), "sim", str(JOBS / "job_np.py"), "-w", str(folder / "work")]
        argv += ["--", *row.args(), "--functions", "--no-prefold", *(["--float32"] if mode == "float32" else [])]
        measured = watch(argv, env=env, cwd=folder, timeout_s=300, every_s=_EVERY_S)
        if measured.code:
            raise RuntimeError(f"{argv} ended with {measured.code}: {measured.said[-1500:]}")
        began = round_starts(read_events(folder / "events.jsonl"))[0]
    sizes = [(look.at, group_bytes(look, system.server, own=True)) for look in measured.looks]
    idle = max((size for at, size in sizes if at < began), default=0)
    return max(0.0, (max(size for _, size in sizes) - idle) / _MIB)
