"""What files and numpy alone reach for the bytes of a round of `big`: the floor of any system that keeps each result.

python benchmarks/floor.py [--mib 100] [--clients 4] [--rounds 4]

No messages, no processes, no names: the clients' tensors are made, written into files, mapped, looked at and added in
int64 fixed point on two threads, and the sums are divided, rounded, hashed and written. Once into new files, and once
over files that are there. Beside it the bare loop, which keeps nothing.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from jobs.workload import differences, read_events, round_starts

HERE = Path(__file__).resolve().parent
_MIB = 2**20
_BLOCK = 32 * 1024
_PART = 4 * _MIB
_MAGIC = 1.5 * 2.0**52


def add(sums: Any, values: Any, scale: float) -> None:
    """The exact fold's arithmetic: look for NaN and Inf, widen, scale, round into an integer, add."""
    scaled = np.empty(_BLOCK)
    for first in range(0, values.size, _BLOCK):
        part = values[first : first + _BLOCK]
        np.maximum.reduce(part.view(np.int32))
        np.maximum.reduce(part.view(np.uint32))
        block = scaled[: part.size]
        np.copyto(block, part)
        np.multiply(block, scale, out=block)
        np.add(block, _MAGIC, out=block)
        np.add(sums[first : first + _BLOCK], block.view(np.int64), out=sums[first : first + _BLOCK])


def finish(sums: Any, fd: int, start: int) -> None:
    """A part of the model: one division and one rounding an element, the digest, the write."""
    out = np.empty(sums.size, np.float32)
    whole, doubles = np.empty(_BLOCK, np.int64), np.empty(_BLOCK)
    for first in range(0, sums.size, _BLOCK):
        part = sums[first : first + _BLOCK]
        np.subtract(part, 1, out=whole[: part.size])
        np.divide(whole[: part.size], 3.0, out=doubles[: part.size])
        np.copyto(out[first : first + _BLOCK], doubles[: part.size], casting="same_kind")
    raw = out.view(np.uint8).data
    blake3(raw).digest()
    os.pwrite(fd, raw, start)


def one_round(folder: Path, mib: int, clients: int, sums: Any, name: str) -> dict[str, float]:
    """Seconds of each step; the files of ``name`` are made, or written over where they are there."""
    count = mib * _MIB // 4
    steps: dict[str, float] = {}

    def timed(step: str, work: Callable[[int], object], times: int) -> None:
        began, used = time.perf_counter(), time.process_time()
        list(pool.map(work, range(times)))
        steps[step] = time.perf_counter() - began
        steps["CPU"] = steps.get("CPU", 0.0) + time.process_time() - used

    model = np.zeros(count, np.float32)
    results: list[Any] = [None] * clients
    stretch = count // 16

    def write(client: int) -> None:
        fd = os.open(folder / f"{name}-{client}", os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(fd, results[client].view(np.uint8).data)
        os.close(fd)

    def train(client: int) -> None:
        results[client] = model + np.float32(0.01 * client)

    with ThreadPoolExecutor(2) as pool:
        timed("train", train, clients)
        timed("write", write, clients)
        maps: list[Any] = []
        for client in range(clients):
            with (folder / f"{name}-{client}").open("rb") as file:
                maps.append(np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.float32))
        slices = [slice(first, first + stretch) for first in range(0, count, stretch)]
        timed("fold", lambda i: [add(sums[slices[i]], m[slices[i]], 10.0) for m in maps], len(slices))
        fd = os.open(folder / f"{name}-model", os.O_WRONLY | os.O_CREAT, 0o600)
        step = _PART // 4
        parts = range(0, count, step)
        timed("finish", lambda i: finish(sums[parts[i] : parts[i] + step], fd, 4 * parts[i]), len(parts))
        os.close(fd)
    return steps


def bare(mib: int, clients: int, folder: Path) -> float:
    """Seconds of a round of the bare loop."""
    events = folder / "events"
    words = ["--kind", "big", "--clients", clients, "--rounds", 5, "--at-once", clients, "--mib", mib]
    command = [sys.executable, str(HERE / "jobs" / "bare.py"), *(str(word) for word in words)]
    subprocess.run(command, check=True, timeout=600, env=os.environ | {"BENCH_EVENTS": str(events)})
    return statistics.median(differences(round_starts(read_events(events))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=100)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as place:
        folder = Path(place)
        reference = bare(args.mib, args.clients, folder)
        print(f"bare loop: {reference:.3f} s a round")
        sums = np.zeros(args.mib * _MIB // 4, np.int64)
        one_round(folder, args.mib, args.clients, sums, "over")
        for what in ("new", "over"):
            runs: list[dict[str, float]] = []
            for number in range(args.rounds):
                runs.append(one_round(folder, args.mib, args.clients, sums, what if what == "over" else f"n{number}"))
                for path in folder.glob(f"n{number}-*"):
                    path.unlink()
            steps = {step: statistics.median(run[step] for run in runs) for step in runs[0]}
            used = steps.pop("CPU")
            total = sum(steps.values())
            told = ", ".join(f"{step} {seconds:.3f}" for step, seconds in steps.items())
            print(f"files {what}: {total:.3f} s a round = {total / reference:.2f} x the bare loop, CPU {used:.3f} s")
            print(f"  {told}")


if __name__ == "__main__":
    main()
