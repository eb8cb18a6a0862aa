"""Plots of a report, as small PNG files. The one module that needs matplotlib."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from figures import Figure
from systems import BY_KEY

mpl.use("Agg")
import matplotlib.pyplot as plt

_DPI = 90
_BARS = (
    ("wall_s", "rows-seconds.png", "whole command, seconds"),
    ("round_s", "rows-round.png", "a round, seconds"),
    ("pss_mib", "rows-memory.png", "peak memory of the process tree, MiB (PSS)"),
)


@dataclass(frozen=True, slots=True)
class Lines:
    """A plot of a part's figures; the pattern finds x and the series' name in a figure's name."""

    part: str
    file: str
    pattern: str
    title: str
    x: str
    y: str


_ROUND = "seconds a round"
LINES = (
    Lines(
        "scaling",
        "scaling-size.png",
        r"model of (?P<x>\d+) MiB, 4 clients, (?P<series>.+)",
        "a round by the size of the model, 4 clients",
        "MiB",
        _ROUND,
    ),
    Lines(
        "scaling",
        "scaling-clients.png",
        r"(?P<x>\d+) clients, 1,000 parameters, 2 at a time, (?P<series>.+)",
        "a round by clients, 1,000 parameters, 2 at a time",
        "clients",
        _ROUND,
    ),
    Lines(
        "scaling",
        "scaling-workers.png",
        r"model of 64 MiB, 8 clients, (?P<x>\d+) at a time, (?P<series>.+)",
        "a round by clients at a time, 8 clients of 64 MiB",
        "at a time",
        _ROUND,
    ),
    Lines(
        "memory",
        "memory.png",
        r".*idle, (?P<x>\d+) clients of .*?, (?P<series>.+)",
        "broker and controller over idle, models of 16 MiB",
        "clients",
        "MiB",
    ),
)


def draw(merged: Mapping[str, Any], folder: Path) -> list[str]:
    """Write what there are figures for; the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    if merged["rows"]:
        for measure, name, title in _BARS:
            _bars(merged["rows"], measure, title, folder / name)
            names.append(name)
    for lines in LINES:
        if lines.part in merged["parts"] and _lines(lines, merged["parts"][lines.part]["figures"], folder / lines.file):
            names.append(lines.file)
    return names


def series(pattern: str, found: Sequence[Figure]) -> dict[str, list[tuple[float, float]]]:
    """Points by series, sorted; the reference, where there is one, is a series of its own."""
    points: dict[str, dict[float, float]] = {}
    for figure in found:
        match = re.fullmatch(pattern, figure.name)
        if match is None or figure.value is None:
            continue
        x = float(match["x"])
        points.setdefault(match["series"], {})[x] = figure.value
        if figure.reference is not None and figure.against:
            points.setdefault(figure.against, {})[x] = figure.reference
    return {name: sorted(values.items()) for name, values in points.items()}


def _bars(rows: Sequence[Mapping[str, Any]], measure: str, title: str, path: Path) -> None:
    keys = [key for key in BY_KEY if any(cell["system"] == key for row in rows for cell in row["cells"])]
    figure, axes = plt.subplots(figsize=(9, 3.6))
    width = 0.8 / max(1, len(keys))
    for place, key in enumerate(keys):
        found = [next((c[measure] for c in row["cells"] if c["system"] == key), None) for row in rows]
        at = [index + (place - (len(keys) - 1) / 2) * width for index in range(len(rows))]
        axes.bar(at, [value or 0 for value in found], width, label=BY_KEY[key].title)
        for x, value in zip(at, found, strict=True):
            if value is None:
                axes.annotate("not run", (x, axes.get_ylim()[0]), rotation=90, fontsize=6, ha="center", va="bottom")
    axes.set_yscale("log")
    axes.set_xticks(range(len(rows)), [row["title"].replace(", ", "\n") for row in rows], fontsize=7)
    _finish(figure, axes, title, path)


def _lines(lines: Lines, found: Sequence[dict[str, Any]], path: Path) -> bool:
    drawn = series(lines.pattern, [Figure.of(item) for item in found])
    if not any(len(points) > 1 for points in drawn.values()):
        return False
    figure, axes = plt.subplots(figsize=(6.2, 3.2))
    for name, points in drawn.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(lines.x)
    axes.set_ylabel(lines.y)
    _finish(figure, axes, lines.title, path)
    return True


def _finish(figure: Any, axes: Any, title: str, path: Path) -> None:
    axes.set_title(title, fontsize=9)
    axes.grid(axis="y", linewidth=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside what it would hide
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
