"""A run's file becomes the tables of the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Bench = Callable[[str], Any]
MACHINE = {
    "cpu": "C",
    "cores": 2,
    "memory_gib": 23.5,
    "python": "3.11",
    "kernel": "6",
    "date": "2026-01-02",
    "load_before": 0.1,
}


@pytest.fixture
def report(bench: Bench) -> dict[str, Any]:
    """What run.py writes, with one row and one part."""
    table, figures, rows = bench("table"), bench("figures"), bench("rows")
    big = next(row for row in rows.ROWS if row.key == "big")
    cells = [
        table.Cell("bare", runs=1, wall_s=2.3, round_s=0.2, pss_mib=400.0, server_mib=400.0),
        table.Cell("float32", runs=1, wall_s=5.0, round_s=0.5, pss_mib=900.0, server_mib=300.0, version="0.1.0"),
        table.Cell("nvflare", not_run="its environment is not installed"),
    ]
    part = [figures.Figure("no-op round", 4.0, "ms", "four hops", 0.4, figures.Target(10))]
    return {
        "machine": MACHINE,
        "command": "python benchmarks/run.py",
        "quick": False,
        "rows": [
            {
                "key": big.key,
                "title": big.title,
                "cells": [cell.to_json() for cell in cells],
                "goals": [goal.to_json() for goal in table.goals(big, cells)],
            }
        ],
        "parts": {"latency": [item.to_json() for item in part]},
        "failed": {},
    }


def test_the_page_says_what_was_reached_missed_and_not_run(bench: Bench, report: dict[str, Any]) -> None:
    made = bench("report")
    page = made.page(made.merge([report]), ["performance/rows-round.png"])
    assert (
        "| 100 MiB model, 4 clients, 3 rounds | 2.3 s, 0.2 s/round, 400 MiB | 5 s, 0.5 s/round, 900 MiB (server 300) |"
        in page
    )
    assert "not run: its environment is not installed" in page
    assert "at most 1.5 x bare loop | **missed** |" in page
    assert "| no-op round | 4 ms | 0.4 (four hops) | 10 | at most 10 ms | reached |" in page
    assert "![performance/rows-round.png](performance/rows-round.png)" in page


def test_later_files_replace_a_row_as_a_whole(bench: Bench, report: dict[str, Any]) -> None:
    made = bench("report")
    later = report | {"command": "later", "parts": {}, "rows": [report["rows"][0] | {"cells": [], "goals": []}]}
    merged = made.merge([report, later])
    assert merged["rows"][0]["cells"] == [] and merged["rows"][0]["run"]["command"] == "later"
    assert list(merged["parts"]) == ["latency"]


def test_only_what_stands_between_the_marks_is_replaced(bench: Bench) -> None:
    made = bench("report")
    page = f"above\n{made.BEGIN}\nold\n{made.END}\nbelow\n"
    assert made.placed(page, "new") == f"above\n{made.BEGIN}\n\nnew\n\n{made.END}\nbelow\n"
    with pytest.raises(SystemExit, match="two marks"):
        made.placed("a page without them", "new")


def test_the_folds_figures_have_the_arithmetic_beside_them(bench: Bench) -> None:
    case = "f32_exact_mapped"
    found = {f"{case}_arithmetic": 4.0, f"{case}_fold": 3.0, f"{case}_threaded": 5.0, "merge_gb_s": 2.0}
    first, second = bench("micro.foldrate").figures_of(found)
    assert (first.name, first.ratio, first.verdict) == ("f32, exact, mapped", 0.75, "MISSED")
    assert first.note == "5.00 GB/s on two threads"
    assert (second.name, second.value, second.unit, second.verdict) == ("merge", 2.0, "GB/s", "")
