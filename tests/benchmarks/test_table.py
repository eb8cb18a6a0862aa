"""What decides whether a figure counts: targets, the check of results, and one real measured run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

Bench = Callable[[str], Any]


@pytest.mark.parametrize(
    ("value", "reference", "target", "verdict"),
    [
        (1.5, 1.0, (1.5, "low", "ratio"), "reached"),
        (1.51, 1.0, (1.5, "low", "ratio"), "MISSED"),
        (1.3, 0.2, (1.2, "low", "extra"), "reached"),
        (1.5, 0.2, (1.2, "low", "extra"), "MISSED"),
        (2.0, 2.0, (1.0, "below", "ratio"), "MISSED"),
        (5000.0, None, (5000.0, "high", "value"), "reached"),
        (1.0, None, (1.5, "low", "ratio"), "not measured"),
        (None, 1.0, (1.5, "low", "value"), "not measured"),
    ],
)
def test_a_target_is_reached_or_missed(
    bench: Bench, value: float | None, reference: float | None, target: tuple[Any, ...], verdict: str
) -> None:
    figures = bench("figures")
    figure = figures.Figure("x", value, "s", "bare", reference, figures.Target(*target))
    assert figure.verdict == verdict
    assert figures.Figure.of(figure.to_json()) == figure
    assert verdict in figures.lines([figure])[0]


def test_the_row_that_takes_all_memory_is_never_started(bench: Bench) -> None:
    rows, table = bench("rows"), bench("table")
    huge = next(row for row in rows.ROWS if row.key == "huge")
    (cell,) = table.measure_row(huge, ["nvflare"], 1)
    assert cell.runs == 0 and "out of memory" in cell.not_run
    assert "not run" in "\n".join(table.lines(huge, [cell]))


def test_a_wrong_result_does_not_count(bench: Bench) -> None:
    rows, table, workload = bench("rows"), bench("table"), bench("jobs.workload")
    row = rows.ROWS[0]
    right = np.full(1000, workload.expected(row.clients, row.rounds), np.float32)
    table.check(row, {"w": right})
    with pytest.raises(table.WrongRun, match="off by"):
        table.check(row, {"w": right * np.float32(1.001)})
    digits = next(row for row in rows.ROWS if row.kind == "digits")
    untrained = {"0.weight": (128, 64), "0.bias": (128,), "2.weight": (10, 128), "2.bias": (10,)}
    with pytest.raises(table.WrongRun, match=r"every correct system reaches 0\.89167"):
        table.check(digits, {name: np.zeros(shape, np.float32) for name, shape in untrained.items()})


def test_targets_of_a_row_take_the_same_runs_figures(bench: Bench) -> None:
    rows, table = bench("rows"), bench("table")
    big = next(row for row in rows.ROWS if row.key == "big")
    cells = [
        table.Cell("bare", runs=1, round_s=0.2),
        table.Cell("exact", runs=1, round_s=0.5),
        table.Cell("float32", runs=1, round_s=0.25),
    ]
    assert [(goal.ratio, goal.verdict) for goal in table.goals(big, cells)] == [(1.25, "reached"), (2.5, "MISSED")]
    assert [goal.verdict for goal in table.goals(big, cells[1:])] == ["not measured"] * 2


def test_large_models_have_their_size_to_the_byte(bench: Bench) -> None:
    workload = bench("jobs.workload")
    for mib, tensors in ((4, 4), (100, 50), (1024, 50)):
        shapes = workload.shapes(mib, tensors)
        assert len(shapes) == tensors
        assert sum(int(np.prod(shape)) for shape in shapes.values()) * 4 == mib * 2**20


@pytest.mark.process
def test_a_run_is_measured_and_checked(bench: Bench) -> None:
    rows, table, systems = bench("rows"), bench("table"), bench("systems")
    row = replace(rows.ROWS[0], rounds=3)
    (cell,) = table.measure_row(row, ["bare"], 1, say=lambda text: None)
    assert not cell.not_run and 0 < cell.startup_s < cell.wall_s and cell.round_s > 0 and cell.pss_mib > 0
    failing = replace(
        systems.BY_KEY["bare"], command=lambda python, row, folder: [str(python), "-c", "raise SystemExit(3)"]
    )
    with pytest.raises(table.WrongRun, match="exit code 3"):
        table.run_once(failing, row)
    silent = replace(failing, command=lambda python, row, folder: [str(python), "-c", ""])
    with pytest.raises(table.WrongRun, match="it left no result"):
        table.run_once(silent, row)
