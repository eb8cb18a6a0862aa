"""Every benchmark, in one go: the side-by-side table, and the parts by themselves.

python benchmarks/run.py                       the rows of fedloom and the bare loop, and all parts
python benchmarks/run.py --peers               the rows with the other systems, in the same run
python benchmarks/run.py --rows np,digits      some rows
python benchmarks/run.py --parts latency,wire  some parts; --parts none: the rows alone
python benchmarks/run.py --quick               one run of each row, and small parts

Everything goes into one JSON file, of which `report.py` makes the tables and plots of docs/performance.md.
"""

from __future__ import annotations

import argparse
import compileall
import importlib
import json
import logging
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fedloom
import figures
import structlog
import table
from machine import machine
from rows import ROWS, Row
from systems import BY_KEY, JOBS, OTHERS, OURS

#: Parts by name: the module, whose `measure(quick=...)` gives the figures.
PARTS = {
    "medium": "machine",
    "fold": "micro.foldrate",
    "startup": "micro.startup",
    "latency": "micro.latency",
    "fleet": "micro.fleet",
    "journal": "micro.journal",
    "taskrate": "micro.taskrate",
    "wire": "micro.wire",
    "control": "micro.control",
    "memory": "micro.memory",
    "scaling": "micro.scaling",
}


def main() -> None:
    args = _arguments()
    sys.path.append(str(JOBS))  # what jobs import from beside themselves
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    rows = _chosen(args.rows, {row.key: row for row in ROWS}, "row")
    parts = _chosen(args.parts, PARTS, "part")
    systems = [*OURS, *(OTHERS if args.peers else ())]
    if args.systems:
        systems = _chosen(args.systems, {key: key for key in BY_KEY}, "system")
    report: dict[str, Any] = {
        "machine": machine(),
        "command": "python benchmarks/run.py " + " ".join(sys.argv[1:]),
        "quick": args.quick,
        "rows": [],
        "parts": {},
        "failed": {},
    }
    _compile()
    began = time.monotonic()
    for row in rows:
        _row(row, systems, args, report)
        _save(args.json, report)
    for name in (name for name, module in PARTS.items() if module in parts):
        _part(name, args.quick, report)
        _save(args.json, report)
    missed = [item for item in _all_figures(report) if item.verdict == "MISSED"]
    print(f"\n{time.monotonic() - began:.0f} s; {len(missed)} targets missed, {len(report['failed'])} parts failed")
    for line in figures.lines(missed):
        print(line)
    if args.json:
        print(f"figures: {args.json}")
    if report["failed"]:
        sys.exit(1)


def _compile() -> None:
    """Write the package's byte code, as pip does with one that it installs, and did with the other systems."""
    root = Path(fedloom.__file__).parent
    compileall.compile_dir(root, maxlevels=0, quiet=1)
    for part in root.glob("*/__init__.py"):
        compileall.compile_dir(part.parent, quiet=1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="all", help="names of rows, comma between them; or all, none")
    parser.add_argument("--parts", default="all", help="names of parts: " + ", ".join(PARTS) + "; or all, none")
    parser.add_argument("--peers", action="store_true", help="the other systems' rows as well")
    parser.add_argument("--systems", default="", help="these systems only: " + ", ".join(BY_KEY))
    parser.add_argument("--quick", action="store_true", help="one run of each row, small parts")
    parser.add_argument("--repeat", type=int, help="runs of each row in place of its own number")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def _chosen(text: str, known: dict[str, Any], what: str) -> list[Any]:
    if text in ("all", "none"):
        return list(known.values()) if text == "all" else []
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"no {what} {unknown[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in names]


def _row(row: Row, systems: Sequence[str], args: argparse.Namespace, report: dict[str, Any]) -> None:
    repeat = args.repeat or (1 if args.quick else row.repeat)
    cells = table.measure_row(row, systems, repeat, say=lambda text: print(f"  {text}", file=sys.stderr))
    goals = table.goals(row, cells)
    print("\n".join([*table.lines(row, cells), *figures.lines(goals)]), flush=True)
    report["rows"].append(
        {
            "key": row.key,
            "title": row.title,
            "cells": [cell.to_json() for cell in cells],
            "goals": [goal.to_json() for goal in goals],
        }
    )


def _part(name: str, quick: bool, report: dict[str, Any]) -> None:
    began = time.monotonic()
    try:
        found = importlib.import_module(PARTS[name]).measure(quick=quick)
    except Exception as error:  # noqa: BLE001 - the other parts are measured all the same
        traceback.print_exc()
        report["failed"][name] = f"{type(error).__name__}: {error}"[:2000]
        return
    print("\n".join([f"{name} ({time.monotonic() - began:.0f} s)", *figures.lines(found)]), flush=True)
    report["parts"][name] = [item.to_json() for item in found]


def _all_figures(report: dict[str, Any]) -> list[figures.Figure]:
    found = [goal for row in report["rows"] for goal in row["goals"]]
    found += [item for items in report["parts"].values() for item in items]
    return [figures.Figure.of(item) for item in found]


def _save(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
