"""What both benchmarks share: a simulated and a bare run of a workload, each watched from outside."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import Measured, by_role, run
from workload import round_seconds

HERE = Path(__file__).resolve().parent


def arguments(description: str, *, clients: int, rounds: int, repeat: int) -> argparse.ArgumentParser:
    """The options that both have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--clients", type=int, default=clients)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, help="clients that run at once (default: all)")
    parser.add_argument("--repeat", type=int, default=repeat, help="runs; the figures are medians over them")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def simulated(kind: str, clients: int, rounds: int, threads: int | None, *extra: str) -> dict[str, Any]:
    """One run through the whole pipeline."""
    with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as folder:
        argv = [sys.executable, str(HERE / "simulate.py"), kind, "--workspace", folder]
        argv += ["--clients", str(clients), "--rounds", str(rounds), *extra]
        if threads:
            argv += ["--threads", str(threads)]
        measured = run(argv)
        events = Path(folder) / "events.jsonl"
        entries = [json.loads(line) for line in events.read_text().splitlines()]
        began = next(entry["at"] for entry in entries if entry["event"] == "start")
        ended = next(entry["at"] for entry in entries if entry["event"] == "end")
        first_task, seconds = round_seconds(events)
    last_round = ended - first_task - sum(seconds)
    return {
        "seconds": seconds,
        "last_round_and_end_s": last_round,
        "startup_s": first_task - began,
        "wall_s": measured.wall_s,
        "processes": by_role(measured.processes),
        "peak_mib": peak_mib(measured),
    }


def bare(kind: str, clients: int, rounds: int, *extra: str) -> dict[str, Any]:
    """One run of the bare loop."""
    argv = [sys.executable, str(HERE / "bare.py"), kind, "--clients", str(clients), "--rounds", str(rounds), *extra]
    measured = run(argv)
    return {"seconds": measured.output["seconds"], "wall_s": measured.wall_s, "peak_mib": peak_mib(measured)}


def peak_mib(measured: Measured) -> float:
    """The largest process's VmHWM."""
    return round(max((process.hwm_kib for process in measured.processes), default=0) / 1024, 1)


def median_of(runs: list[dict[str, Any]], key: str) -> float:
    """The median over the runs of a figure."""
    return statistics.median(entry[key] for entry in runs)


def save(path: Path | None, figures: dict[str, Any]) -> None:
    """Keep the figures for report.py."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n")
