"""The fault matrix over real processes: `.venv/bin/python tests/chaos/run.py [--faults 20] [row ...]`, as `make chaos`.

Each row is a broker, a controller and executors as processes that are started again when they end, a job whose every
execution is counted, and one kind of fault again and again while somebody is at work. The exit code is 1 if anything
acknowledged was lost, anything was folded twice, a model is not the undisturbed one, or something waited too long.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "support"))

from siblings import load  # noqa: E402

rows = load(__file__, "rows")
matrix = load(__file__, "matrix")
network = load(__file__, "network")
warm = load(__file__, "warm")
processes = load(__file__, "../conftest")

#: All rows; of the last one the processes are a simulation's.
NAMES = (*rows.ROWS, warm.NAME)

_COLUMNS = (
    ("row", "fault"), ("hit", "hit"), ("acknowledged", "acknowledged"), ("lost", "lost"), ("twice", "folded twice"),
    ("late", "late"), ("refused", "refused"), ("sent_again", "sent again"), ("ratio", "executions / tasks"),
    ("p50", "p50 s"), ("p95", "p95 s"), ("max", "max s"), ("equal", "equal model"),
)  # fmt: skip


def two_ports(chance: random.Random) -> tuple[int, int]:
    """Ports for the broker and for the proxy before it; the one behind each is free as well."""
    found: list[int] = []
    while len(found) < 2:
        port = chance.randrange(20_000, 32_000, 2)
        try:
            for number in (port, port + 1):
                with socket.socket() as sock:
                    sock.bind(("127.0.0.1", number))
        except OSError:
            continue
        if port not in found:
            found.append(port)
    return found[0], found[1]


def may_mount() -> bool:
    """Whether this process may make a file system of a bounded size."""
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode:
            return False
        return subprocess.run(["umount", folder], capture_output=True).returncode == 0


def run_with(children: Any, name: str, faults: int, seed: int, folder: Path, rounds: int) -> Any:
    """A row's outcome; what it has started is at its end or ends with ``children``."""
    if name == warm.NAME:
        return warm.WarmRun(children, folder, seed).run(faults, rounds)
    run = matrix.Run(rows.ROWS[name], children, folder, two_ports(random.Random(f"{name} {seed}")), seed)
    try:
        return run.run(faults, rounds)
    finally:
        run.close()
        if run.mounted or run.network:
            children.close()
            run.unmount()


def run_short(children: Any, seed: int, folder: Path) -> Any:
    """The outcome of one fault of each kind, as far as this user may bring them about."""
    fleet, turns = rows.one_of_each(may_mount(), network.may_make())
    run = matrix.Run(fleet, children, folder, two_ports(random.Random(seed)), seed, turns)
    try:
        return run.run(len(turns), rounds=len(turns))
    finally:
        run.close()
        children.close()
        run.unmount()


def barred(name: str) -> str:
    """Why this user may not run a row; "" where nothing is in its way."""
    row = rows.ROWS.get(name)
    if row is not None and row.medium and not may_mount():
        return "this user may not mount a small file system"
    if row is not None and row.away and not network.may_make():
        return "this user may not make a network namespace"
    return ""


def run_row(name: str, faults: int, seed: int, folder: Path) -> dict[str, Any]:
    """One row's figures; "" stands for the short form."""
    logs = folder / "logs"
    logs.mkdir(parents=True)
    children = processes.Children(logs)
    began = time.monotonic()
    try:
        outcome = (
            run_short(children, seed, folder)
            if not name
            else run_with(children, name, faults, seed, folder, rounds=max(6, min(60, faults + 4)))
        )
    finally:
        children.close()
    return outcome.figures() | {"seconds": round(time.monotonic() - began, 1)}


def table(found: list[dict[str, Any]]) -> str:
    """The matrix in Markdown."""
    lines = ["| " + " | ".join(title for _, title in _COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    for figures in found:
        values = figures | {
            "ratio": round(figures["executions"] / max(1, figures["tasks"]), 2),
            "equal": "yes" if figures["equal"] else "NO",
        }
        lines.append(
            "| " + " | ".join(str(values[key] if values[key] is not None else "-") for key, _ in _COLUMNS) + " |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of: {', '.join(NAMES)}".replace("%", "%%"))
    parser.add_argument("--faults", type=int, default=20, help="a row, that hit")
    parser.add_argument("--short", action="store_true", help="one fault of each kind, by one fleet")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="a folder for the logs of rows that went wrong")
    args = parser.parse_args()
    if unknown := [name for name in args.rows if name not in NAMES]:
        parser.error(f"row {unknown[0]!r}; there are: {', '.join(NAMES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the parties end with this process
    found: list[dict[str, Any]] = []
    left_out: list[str] = []
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    for name in args.rows or ([""] if args.short else NAMES):
        if why := barred(name):
            left_out.append(f"{name}: {why}")
            continue
        folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=args.keep))
        figures = run_row(name, args.faults, args.seed, folder)
        found.append(figures)
        print(json.dumps(figures), flush=True)
        if figures["wrong"]:
            print(f"WRONG: {name}: logs in {folder}", flush=True)
    print(f"\n{table(found)}")
    for name in left_out:
        print(f"left out: {name}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1))
    return any(figures["wrong"] for figures in found)


if __name__ == "__main__":
    sys.exit(main())
