"""What a benchmark ran on, and what its memory and its disk can do at that moment."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figure

_BLOCK = 4 * 2**20


def machine() -> dict[str, Any]:
    """Processor, memory, kernel, Python, day, load."""
    model = "unknown"
    with contextlib.suppress(OSError, StopIteration):
        found = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in found if line.startswith("model name"))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "load_before": round(os.getloadavg()[0], 2),
    }


def measure(*, quick: bool = False) -> list[Figure]:
    """How fast bytes become a file here: what any spool is bound by."""
    mib = 128 if quick else 512
    block = memoryview(np.ones(_BLOCK // 8).view(np.uint8))
    copy = _copy_rate(mib)
    with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as folder:
        path = Path(folder) / "new"

        def new(sync: bool = False) -> None:
            path.unlink(missing_ok=True)
            _fill(os.open(path, os.O_CREAT | os.O_WRONLY), block, mib, sync=sync)

        created, synced = _rate(mib, new), _rate(mib, lambda: new(sync=True))
        again = _rate(mib, lambda: _fill(os.open(path, os.O_WRONLY), block, mib))
    memfd = os.memfd_create("bench")
    try:
        _write(memfd, block, mib)
        recycled = _rate(mib, lambda: _write(memfd, block, mib))
    finally:
        os.close(memfd)
    fresh = _rate(mib, lambda: _fill(os.memfd_create("bench"), block, mib))
    return [
        Figure(name, rate, "GB/s", "memory to warm memory", copy)
        for name, rate in (
            ("a new file, into the page cache", created),
            ("a new file, synced", synced),
            ("a file written again", again),
            ("a new memfd", fresh),
            ("a memfd written again", recycled),
        )
    ]


def _copy_rate(mib: int) -> float:
    warm = np.zeros(mib * 2**20, np.uint8)
    source = np.ones_like(warm)
    return _rate(mib, lambda: np.copyto(warm, source))


def _rate(mib: int, run: Callable[[], object], runs: int = 3) -> float:
    times: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return mib * 2**20 / statistics.median(times) / 1e9


def _write(fd: int, block: memoryview, mib: int) -> None:
    os.lseek(fd, 0, os.SEEK_SET)
    for _ in range(mib * 2**20 // len(block)):
        os.write(fd, block)


def _fill(fd: int, block: memoryview, mib: int, *, sync: bool = False) -> None:
    try:
        _write(fd, block, mib)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)
