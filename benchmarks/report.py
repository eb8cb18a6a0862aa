"""The figures of a bench run as the tables of docs/performance.md.

python report.py rounds.json bigmodel.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def head(figures: dict[str, Any]) -> str:
    """Where and when."""
    m = figures["machine"]
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, Linux {m['kernel']}, Python {m['python']},"
        f" {m['date']}, load before the run {m['load_before']}; medians of {figures['repeat']} runs"
    )


def rounds(f: dict[str, Any]) -> str:
    """The table of rounds.py."""
    return "\n".join(
        [
            f"### Rounds per second, {f['clients']} tiny clients",
            "",
            f"{head(f)}. `python benchmarks/rounds.py --rounds {f['rounds']}`",
            "",
            "| | rounds/s | ms a round |",
            "|---|---|---|",
            f"| fedloom, {f['threads']} clients at once | {f['rounds_per_s']:.1f} | {f['round_s'] * 1000:.2f} |",
            f"| bare Python loop | {f['bare_rounds_per_s']:.0f} | {f['bare_round_s'] * 1000:.3f} |",
            f"| fedloom / bare | {f['ratio']:.5f} | {f['round_s'] / f['bare_round_s']:.0f} |",
            "",
            f"From the start to the first task {f['startup_s']:.2f} s; the whole run {f['wall_s']:.2f} s.",
        ]
    )


def bigmodel(f: dict[str, Any]) -> str:
    """The tables of bigmodel.py."""
    lines = [
        f"### A {f['mib']} MiB model, {f['clients']} clients",
        "",
        f"{head(f)}. `python benchmarks/bigmodel.py --rounds {f['rounds']}`",
        "",
        "| | seconds a round | peak of the largest process, MiB |",
        "|---|---|---|",
        f"| fedloom | {f['round_s']:.3f} | {f['largest_mib']:.0f} |",
        f"| bare numpy loop | {f['bare_round_s']:.3f} | {f['bare_peak_mib']:.0f} |",
        f"| fedloom / bare | {f['ratio']:.2f} | {f['memory_ratio']:.2f} |",
        "",
        "| process | how many | VmHWM, MiB | of its own, MiB |",
        "|---|---|---|---|",
    ]
    lines += [f"| {p['role']} | {p['count']} | {p['hwm_mib']} | {p['anon_mib']} |" for p in f["processes"]]
    return "\n".join(lines)


def main() -> None:
    tables = {"rounds": rounds, "bigmodel": bigmodel}
    for name in sys.argv[1:]:
        figures = json.loads(Path(name).read_text())
        print(tables[figures["benchmark"]](figures))
        print()


if __name__ == "__main__":
    main()
