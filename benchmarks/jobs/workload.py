"""What every system runs, and how it says what it did: models, clients' work, events, and the check of the result.

Client number c adds 0.01 c to every value and reports 10 c as its weight, so that a round adds
0.01 sum(c^2) / sum(c) to everything: a result that is wrong is seen at once. Nothing here needs fedloom, so the other
systems' scripts use it as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

#: Where a run's events, and its final values, are written; set by whoever measures it.
EVENTS = "BENCH_EVENTS"
RESULT = "BENCH_RESULT"
TINY = 1000


def arguments(description: str = "") -> argparse.ArgumentParser:
    """The options of every system's script."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--kind", choices=["np", "big", "digits"], required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--at-once", type=int, required=True, help="clients that run at the same time")
    parser.add_argument("--mib", type=int, default=100)
    parser.add_argument("--tensors", type=int, default=50)
    return parser


def shapes(total_mib: int, num_tensors: int) -> dict[str, tuple[int, ...]]:
    """Pairs of a weight and a bias, uneven as in a real network, of exactly ``total_mib`` MiB of float32."""
    layers = num_tensors // 2
    rows = 1024 if total_mib <= 256 else 2048
    columns = total_mib * 2**20 // 4 // rows - layers
    factors = [0.25 + 1.75 * i / max(1, layers - 1) for i in range(layers)]
    widths = [int(columns * factor / sum(factors)) for factor in factors]
    widths[-1] += columns - sum(widths)
    out: dict[str, tuple[int, ...]] = {}
    for layer, width in enumerate(widths):
        out[f"layer{layer}.weight"] = (rows, width)
        out[f"layer{layer}.bias"] = (rows,)
    return out


def numpy_model(kind: str, mib: int, tensors: int) -> dict[str, np.ndarray[Any, Any]]:
    """The initial model, zeros: 1,000 values, or so many MiB."""
    if kind == "np":
        return {"w": np.zeros(TINY, np.float32)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes(mib, tensors).items()}


def part(client: int) -> int:
    """A client's number, counted to a hundred and anew: ten thousand are not a hundred times as different."""
    return (client - 1) % 100 + 1


def update(params: Mapping[str, Any], client: int) -> dict[str, Any]:
    """What client number ``client`` (from 1) does, with arrays and tensors alike."""
    return {name: value + 0.01 * part(client) for name, value in params.items()}


def weight(client: int) -> int:
    """What it reports as its steps."""
    return 10 * part(client)


def expected(clients: int, rounds: int) -> float:
    """Every value after so many rounds."""
    numbers = [part(client) for client in range(1, clients + 1)]
    return rounds * 0.01 * sum(c * c for c in numbers) / sum(numbers)


def note(event: str, **what: Any) -> None:
    """Append a line of JSON, whole: many processes write to the one file. Nothing where nobody measures."""
    if path := os.environ.get(EVENTS):
        line = json.dumps({"event": event, "at": time.time(), **what}) + "\n"
        with Path(path).open("ab", buffering=0) as file:
            file.write(line.encode())


def read_events(path: Path) -> list[dict[str, Any]]:
    """What was noted so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def round_starts(events: Iterable[Mapping[str, Any]]) -> list[float]:
    """When each round's first task began, in the order of the rounds."""
    first: dict[int, float] = {}
    for entry in events:
        if entry["event"] == "task":
            first[entry["round"]] = min(first.get(entry["round"], float("inf")), entry["at"])
    return [first[number] for number in sorted(first)]


def differences(times: Iterable[float]) -> list[float]:
    """From each time to the next."""
    return [later - earlier for earlier, later in pairwise(times)]


def samples(value: Any) -> np.ndarray[Any, Any]:
    """A value at the start, the middle and the end of a tensor: enough to see a large one that is wrong."""
    flat = np.asarray(value).reshape(-1)
    return flat[[0, flat.size // 2, flat.size - 1]].copy()


def hand_in(kind: str, params: Mapping[str, Any]) -> None:
    """Leave the final values where the measuring process looks: samples of a large model, else all of it."""
    if path := os.environ.get(RESULT):
        values = {name: samples(value) if kind == "big" else np.asarray(value) for name, value in params.items()}
        np.savez(path, **values)
