"""What the benchmarks run: tiny and large models, their clients, the bare loop that does the same, and its check.

Client number c adds 0.01 c to every value and reports 10 c as its weight, so that a round adds
0.01 sum(c^2) / sum(c) to everything: a result that is wrong is seen at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

TINY = 1000


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


def model(kind: str, mib: int, tensors: int) -> dict[str, np.ndarray]:
    """The initial model: zeros."""
    if kind == "tiny":
        return {"w": np.zeros(TINY, np.float32)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes(mib, tensors).items()}


def update(params: Mapping[str, Any], client: int) -> dict[str, Any]:
    """What a client does."""
    return {name: value + np.float32(0.01 * client) for name, value in params.items()}


def expected(clients: int, rounds: int) -> float:
    """Every value after so many rounds."""
    numbers = range(1, clients + 1)
    return rounds * 0.01 * sum(c * c for c in numbers) / sum(numbers)


def bare_loop(
    kind: str, mib: int, tensors: int, clients: int, rounds: int
) -> tuple[list[float], dict[str, np.ndarray]]:
    """The same work in one process and without any of fedloom: seconds of each round, and the model."""
    current = model(kind, mib, tensors)
    seconds: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        total = {name: np.zeros_like(value) for name, value in current.items()}
        weights = 0
        for client in range(1, clients + 1):
            trained = update(current, client)
            for name, value in trained.items():
                value *= np.float32(10 * client)
                total[name] += value
            weights += 10 * client
        for value in total.values():
            value /= np.float32(weights)
        current = total
        seconds.append(time.perf_counter() - started)
    return seconds, current


def note(events: Path, event: str, **what: Any) -> None:
    """Append a line of JSON, whole: many processes write to the one file."""
    line = json.dumps({"event": event, "at": time.time(), **what}) + "\n"
    with events.open("ab", buffering=0) as file:
        file.write(line.encode())


def round_seconds(events: Path) -> tuple[float, list[float]]:
    """When the first task began, and the seconds from each round's first task to the next round's."""
    first: dict[int, float] = {}
    for line in events.read_text().splitlines():
        entry = json.loads(line)
        if entry["event"] == "task":
            first[entry["round"]] = min(first.get(entry["round"], float("inf")), entry["at"])
    starts = [first[number] for number in sorted(first)]
    return starts[0], [later - earlier for earlier, later in pairwise(starts)]
