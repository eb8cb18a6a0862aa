"""The matrix of an evaluation, out of the rounds' records: whose data, whose model, which scores.

::

    cross_site_val/cross_val_results.json   {data site: {model: {metric: value}}}
    cross_site_val/cross_val_results.txt    the same as a table for each metric

A server's model is called ``SRV_model``, ``SRV_best_model`` or ``SRV_<name>``, a site's own by the site's name. An
entry that failed is ``{"failed": {"code": ..., "text": ...}}``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

FOLDER = "cross_site_val"
JSON_FILE = "cross_val_results.json"
TABLE_FILE = "cross_val_results.txt"
#: A larger matrix is not printed at a run's end.
MAX_SHOWN = 12

Entry = dict[str, Any]
Matrix = dict[str, dict[str, Entry]]


def is_evaluation(record: Mapping[str, Any]) -> bool:
    """Whether a record is one of an evaluation, and no training round's."""
    return "evaluation" in record


def matrix_of(records: Iterable[Mapping[str, Any]]) -> Matrix:
    """The matrix: data site, then model, then metric; sites and models in the order in which they were evaluated."""
    steps = [record for record in records if is_evaluation(record) and "scores" in record]
    sites: dict[str, None] = {}
    for step in steps:
        sites |= dict.fromkeys(step["scores"])
    if not sites:  # no model came at all
        sites = dict.fromkeys(str(step["evaluation"]["owner"]) for step in steps)
    matrix: Matrix = {site: {} for site in sites}
    for step in steps:
        evaluation: dict[str, Any] = step["evaluation"]
        model = str(evaluation["model"])
        texts = {str(failure["site"]): failure for failure in step.get("failures") or ()}
        if lost := evaluation.get("failed"):
            text = str(texts.get(model, {}).get("text") or "")
            for row in matrix.values():
                if text or model not in row:  # of a model in several steps the first one has the text
                    row[model] = {"failed": {"code": str(lost["code"]), "text": text}}
        for site, scores in step["scores"].items():
            if "failed" in scores and isinstance(scores["failed"], dict):
                scores = {"failed": {**scores["failed"], "text": str(texts.get(site, {}).get("text") or "")}}
            matrix[site][model] = scores
    return matrix


def is_failed(entry: Entry) -> bool:
    """Whether the site gave no scores."""
    return isinstance(entry.get("failed"), dict)


def tables(matrix: Matrix, *, metrics: Sequence[str] = ()) -> str:
    """A table for each metric (or for these), a row for each data site and a column for each model."""
    models = list(dict.fromkeys(model for row in matrix.values() for model in row))
    names = list(metrics) or metric_names(matrix)
    parts = [_table(matrix, models, name) for name in names or [""]]
    return "\n\n".join(parts) + "\n"


def metric_names(matrix: Matrix) -> list[str]:
    """The metrics that the sites have reported, by name."""
    entries = (entry for row in matrix.values() for entry in row.values() if not is_failed(entry))
    return sorted({name for entry in entries for name in entry})


def _table(matrix: Matrix, models: Sequence[str], metric: str) -> str:
    rows = [["data \\ model", *models]]
    rows += [[site, *(_cell(row.get(model), metric) for model in models)] for site, row in matrix.items()]
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(widths[at + 1]) for at, cell in enumerate(row[1:]))]).rstrip()
        for row in rows
    ]
    return "\n".join([metric, *lines] if metric else lines)


def _cell(entry: Entry | None, metric: str) -> str:
    if entry is None:
        return ""
    if is_failed(entry):
        return "failed"
    value = entry.get(metric)
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


def summary_of(matrix: Matrix) -> dict[str, Any]:
    """What summary.json says of a matrix: how large it is, how many entries failed, each model's mean scores."""
    models = list(dict.fromkeys(model for row in matrix.values() for model in row))
    return {
        "file": f"{FOLDER}/{JSON_FILE}",
        "sites": len(matrix),
        "models": models,
        "failed": sum(is_failed(entry) for row in matrix.values() for entry in row.values()),
        "mean": {model: _means([row[model] for row in matrix.values() if model in row]) for model in models},
    }


def _means(entries: Sequence[Entry]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for entry in entries:
        for name, value in cast("dict[str, object]", {} if is_failed(entry) else entry).items():
            if isinstance(value, int | float) and math.isfinite(value):
                values.setdefault(name, []).append(float(value))
    return {name: math.fsum(numbers) / len(numbers) for name, numbers in values.items()}


def shown(matrix: Matrix, key_metric: str) -> str:
    """A small matrix as a run's end shows it: the key metric's table, or the first one's; "" for a large or no one."""
    if not matrix or max(len(matrix), *(len(row) for row in matrix.values())) > MAX_SHOWN:
        return ""
    names = metric_names(matrix)
    chosen = [key_metric] if key_metric in names else names[:1]
    return tables(matrix, metrics=chosen)


def write_matrix(records: Iterable[Mapping[str, Any]], dest: Path) -> Matrix:
    """Write the matrix's files into a result folder, if there was an evaluation; returns it."""
    matrix = matrix_of(records)
    if matrix:
        folder = dest / FOLDER
        folder.mkdir(exist_ok=True)
        _replace(folder / JSON_FILE, json.dumps(matrix, indent=2, ensure_ascii=False) + "\n")
        _replace(folder / TABLE_FILE, tables(matrix))
    return matrix


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    part.replace(path)
