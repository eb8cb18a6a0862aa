"""What `fold.py` prints, as figures with their targets."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from figures import Figure, Target
from systems import HERE

#: Of the arithmetic alone, on memory that is mapped already and at first touch; for the types that models travel in.
_TARGETS = {"mapped": Target(0.8, "high", "ratio"), "first_touch": Target(0.5, "high", "ratio")}
_AIMED = frozenset({"f32", "f16", "bf16", "int8"})
_CASE = re.compile(r"(?P<type>.+)_(?P<mode>exact|float32)_(?P<memory>mapped|first_touch)_fold")


def measure(*, quick: bool = False) -> list[Figure]:
    """GB/s of input on one thread; the reference is the same arithmetic without the fold around it."""
    argv = [sys.executable, str(HERE / "fold.py"), "--json", *(["--mib", "32", "--runs", "3"] if quick else [])]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"fold.py ended with {done.returncode}: {done.stderr[-1500:]}")
    return figures_of(json.loads(done.stdout.strip().splitlines()[-1]))


def figures_of(found: dict[str, float]) -> list[Figure]:
    """A figure a case; what has no reference stands as it is."""
    out: list[Figure] = []
    taken: set[str] = set()
    for key, value in found.items():
        if match := _CASE.fullmatch(key):
            case = key.removesuffix("_fold")
            target = _TARGETS[match["memory"]] if match["type"] in _AIMED else None
            threaded = found.get(f"{case}_threaded")
            note = f"{threaded:.2f} GB/s on two threads" if threaded else ""
            name = f"{match['type']}, {match['mode']}, {match['memory'].replace('_', ' ')}"
            arithmetic = found.get(f"{case}_arithmetic")
            out.append(Figure(name, value, "GB/s", "the arithmetic alone", arithmetic, target, note))
            taken |= {key, f"{case}_arithmetic", f"{case}_threaded"}
    for key, value in found.items():
        if key not in taken:
            unit = "us" if key.startswith("us_") else "GB/s" if key.endswith("gb_s") else ""
            out.append(Figure(key.replace("_", " ").removesuffix(" gb s"), value, unit))
    return out
