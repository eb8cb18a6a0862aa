"""The figures of benchmark runs as the tables and plots of docs/performance.md.

python benchmarks/report.py workspace/bench/results.json                           print the tables
python benchmarks/report.py A.json B.json --docs docs/performance.md               put them into the page
python benchmarks/report.py A.json --plots docs/performance                        and draw (needs the extra `bench`)

Of a row, or a part, that several files have, the last file's figures count.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import HEAD, Figure, number
from rows import ROWS
from systems import BY_KEY

BEGIN, END = "<!-- figures: python benchmarks/report.py -->", "<!-- end of figures -->"
#: What the page calls the parts, in its order.
TITLES = {
    "latency": "Rounds without work",
    "fleet": "Fleets",
    "journal": "Ledger and journal",
    "taskrate": "Small tasks through broker and links",
    "wire": "Results over TCP",
    "control": "The control link beside a full data link",
    "memory": "Memory against the number of clients",
    "startup": "Ready to work",
    "fold": "The fold",
    "scaling": "Scaling",
    "medium": "What the spool's medium can write",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--docs", type=Path, help="replace what stands between the page's two marks")
    parser.add_argument("--plots", type=Path, help="draw into this folder")
    args = parser.parse_args()
    merged = merge([json.loads(path.read_text()) for path in args.results])
    drawn: list[str] = []
    if args.plots:
        import plots  # only here: nothing else needs matplotlib

        drawn = plots.draw(merged, args.plots)
    text = page(merged, [f"{args.plots.name}/{name}" for name in drawn] if args.plots else [])
    if args.docs:
        args.docs.write_text(placed(args.docs.read_text(), text))
    else:
        print(text)


def merge(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One report of several: later rows and parts replace earlier ones; each remembers the run that it is of."""
    rows: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    for report in reports:
        run = {"machine": report["machine"], "command": report["command"], "quick": report["quick"]}
        rows |= {row["key"]: {**row, "run": run} for row in report["rows"]}
        parts |= {name: {"figures": found, "run": run} for name, found in report["parts"].items()}
    order = [row.key for row in ROWS]
    return {"rows": sorted(rows.values(), key=lambda row: order.index(row["key"])), "parts": parts}


def placed(page_text: str, text: str) -> str:
    """The page with the text between its marks.

    Raises:
        SystemExit: it has none.
    """
    before, begin, rest = page_text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"the page needs the two marks {BEGIN} and {END}, in lines of their own")
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}"


def page(merged: Mapping[str, Any], drawn: Iterable[str] = ()) -> str:
    """Everything, as markdown."""
    lines: list[str] = []
    plots = list(drawn)
    said: list[str] = []
    if rows := merged["rows"]:
        said = list(dict.fromkeys(line for row in rows for line in run_lines(row["run"])))
        lines += ["### Side by side", "", *"\n\n".join(said).splitlines(), "", *side_by_side(rows), ""]
        lines += _pictures(plots, "rows")
        goals = [Figure.of(goal) for row in rows for goal in row["goals"]]
        lines += ["#### Targets of the rows", "", *table(HEAD, [goal.cells() for goal in goals]), ""]
        lines += ["#### Each row in full", "", *details(rows), ""]
    for name, title in TITLES.items():
        if part := merged["parts"].get(name):
            lines += [f"### {title}", ""]
            if (words := run_lines(part["run"])) != said:  # where the run is another than of the table before
                said = words
                lines += [*said, ""]
            lines += [*table(HEAD, [Figure.of(item).cells() for item in part["figures"]]), ""]
            lines += _pictures(plots, name)
    return "\n".join(lines)


def _pictures(plots: Iterable[str], name: str) -> list[str]:
    return [line for plot in plots if name in plot for line in (f"![{plot}]({plot})", "")]


def run_lines(run: Mapping[str, Any]) -> list[str]:
    """Where, when and how."""
    m = run["machine"]
    text = (
        f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, Linux {m['kernel']}, Python {m['python']},"
        f" {m['date']}, load before the run {m['load_before']}: `{run['command'].strip()}`"
    )
    return [text + (" (quick: a single run of each)" if run["quick"] else "")]


def side_by_side(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Systems as columns: the whole command, a round, and the tree's peak memory (PSS)."""
    present = [key for key in BY_KEY if any(cell["system"] == key for row in rows for cell in row["cells"])]
    body: list[list[str]] = []
    for row in rows:
        cells = {cell["system"]: cell for cell in row["cells"]}
        body.append([row["title"], *(_short(cells.get(key)) for key in present)])
    return table(["work", *(_name(key, rows) for key in present)], body)


def details(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a system and row, with the ratios to the bare loop."""
    head = ["work", "", "whole s", "to first task s", "round s", "round x bare", "whole x bare", "tree PSS MiB"]
    head += ["tree RSS MiB", "server PSS MiB", "server anonymous and shared MiB", "runs"]
    body: list[list[str]] = []
    for row in rows:
        bare = next((cell for cell in row["cells"] if cell["system"] == "bare"), {})
        for cell in row["cells"]:
            words = [row["title"], BY_KEY[cell["system"]].title]
            if cell["not_run"]:
                body.append([*words, "not run: " + cell["not_run"].splitlines()[0][:200], *[""] * (len(head) - 3)])
                continue
            words += [number(cell[name]) for name in ("wall_s", "startup_s", "round_s")]
            words += [number(_ratio(cell, bare, name)) for name in ("round_s", "wall_s")]
            words += [number(cell[name]) for name in ("pss_mib", "rss_mib", "server_mib", "server_own_mib")]
            body.append([*words, str(cell["runs"])])
    return table(head, body)


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Markdown; columns without a word in them are left out."""
    rows = [list(row) for row in body]
    kept = [at for at in range(len(head)) if at == 0 or any(row[at] for row in rows)]
    lines = [[head[at] for at in kept], ["---"] * len(kept), *([row[at] for at in kept] for row in rows)]
    return [
        "| " + " | ".join(word.replace("|", "\\|").replace("MISSED", "**missed**") for word in line) + " |"
        for line in lines
    ]


def _short(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "not measured"
    if cell["not_run"]:
        return "not run: " + cell["not_run"].splitlines()[0][:120]
    words = [f"{number(cell['wall_s'])} s"]
    words += [f"{number(cell['round_s'])} s/round"] if cell["round_s"] is not None else []
    memory = f"{number(cell['pss_mib'])} MiB"
    if cell["server_mib"] is not None and cell["server_mib"] < 0.99 * cell["pss_mib"]:
        memory += f" (server {number(cell['server_mib'])})"
    return ", ".join([*words, memory])


def _name(key: str, rows: Sequence[Mapping[str, Any]]) -> str:
    versions = {cell["version"] for row in rows for cell in row["cells"] if cell["system"] == key and cell["version"]}
    return " ".join([BY_KEY[key].title, *sorted(versions)])


def _ratio(cell: Mapping[str, Any], bare: Mapping[str, Any], name: str) -> float | None:
    return cell[name] / bare[name] if cell.get(name) and bare.get(name) else None


if __name__ == "__main__":
    main()
