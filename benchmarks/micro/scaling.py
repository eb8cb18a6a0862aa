"""Seconds a round against the size of the model, the number of clients, and the number of workers."""

from __future__ import annotations

from dataclasses import replace

import table
from figures import Figure
from rows import Row
from systems import BY_KEY, OURS

_MODEL = Row("size", "", "big", clients=4, rounds=3, at_once=4, tensors=20)
_CLIENTS = Row("clients", "", "np", clients=8, rounds=4, at_once=2, functions=True)


def measure(*, quick: bool = False) -> list[Figure]:
    """Exact and float32 beside the bare loop, a run each."""
    rows: list[tuple[str, Row]] = [
        (f"model of {mib} MiB, 4 clients", replace(_MODEL, mib=mib)) for mib in ((16,) if quick else (16, 64, 256))
    ]
    rows += [
        (f"{clients} clients, 1,000 parameters, 2 at a time", replace(_CLIENTS, clients=clients))
        for clients in ((8,) if quick else (8, 64, 512))
    ]
    rows += [
        (f"model of 64 MiB, 8 clients, {workers} at a time", replace(_MODEL, mib=64, clients=8, at_once=workers))
        for workers in ((2,) if quick else (1, 2, 4, 8))
    ]
    out: list[Figure] = []
    for name, row in rows:
        cells = {cell.system: cell for cell in table.measure_row(row, OURS, 1, say=lambda text: None)}
        bare = cells["bare"].round_s
        for mode in ("exact", "float32"):
            cell = cells[mode]
            title = f"{name}, {BY_KEY[mode].title}"
            out.append(Figure(title, cell.round_s, "s", "bare loop", bare, note=cell.not_run[:200]))
    return out
