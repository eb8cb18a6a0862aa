"""The side-by-side table: each system does the work of a row, and its result is looked at before any figure counts."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fedloom.controller.checkpoints import read_checkpoint
from figures import Figure
from jobs import digitsnet
from jobs.workload import differences, expected, read_events, round_starts, samples
from measure import by_role, watch
from rows import Row
from systems import BY_KEY, System, environment

_TIMEOUT_S = 900.0
#: Sums in float32 of up to 100 clients differ by so much of the value, and by one of the 360 held-out digits.
_NEAR = 1e-4
_NEAR_DIGITS = 1.5 / 360
#: Where systems that keep the model themselves leave it.
_MODELS = ("*/model.safetensors", "**/FL_global_model.pt", "**/server.npy")
_LARGE = 2**24
#: What the median is taken of.
_MEASURES = ("wall_s", "startup_s", "round_s", "rss_mib", "pss_mib", "server_mib", "server_own_mib")


@dataclass(frozen=True, slots=True)
class Cell:
    """A system in a row: medians over its runs, or why there are none.

    Attributes:
        wall_s: the whole command.
        startup_s: from its start to the first task's begin.
        round_s: from a round's first task to the next round's, the median of all rounds.
        rss_mib, pss_mib: the process tree's peak.
        server_mib, server_own_mib: the server's processes, PSS; and its anonymous and shared part.
    """

    system: str
    runs: int = 0
    wall_s: float | None = None
    startup_s: float | None = None
    round_s: float | None = None
    rss_mib: float | None = None
    pss_mib: float | None = None
    server_mib: float | None = None
    server_own_mib: float | None = None
    not_run: str = ""
    version: str = ""
    command: str = ""
    processes: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the run's file."""
        return asdict(self)


class WrongRun(Exception):
    """A command failed, or its result is not what it must be."""


def measure_row(row: Row, systems: Sequence[str], repeat: int, say: Any = print) -> list[Cell]:
    """All systems in turn, as often as asked: what changes on the machine changes for all of them."""
    runs: dict[str, list[dict[str, Any]]] = {key: [] for key in systems}
    failed: dict[str, str] = {}
    for key in systems:
        if reason := row.why_not(key) or BY_KEY[key].missing:
            failed[key] = reason
    for _ in range(repeat):
        for key in systems:
            if key in failed:
                continue
            try:
                run = run_once(BY_KEY[key], row)
            except WrongRun as error:
                failed[key] = str(error)
                say(f"{row.key}, {key}: {error}")
                continue
            runs[key].append(run)
            shown = ", ".join(f"{name} {value:.3g}" for name, value in run.items() if name in _MEASURES and value)
            say(f"{row.key}, {key}: {shown}")
    return [cell(BY_KEY[key], runs[key], failed.get(key, "")) for key in systems]


def cell(system: System, runs: list[dict[str, Any]], failed: str) -> Cell:
    """The medians of a system's runs; nothing of a system of which one run went wrong."""
    if failed or not runs:
        return Cell(system.key, not_run=failed or "no run")
    medians = {name: statistics.median(run[name] for run in runs) for name in _MEASURES if runs[0][name] is not None}
    last = runs[-1]
    return Cell(
        system.key,
        runs=len(runs),
        version=system.version(),
        command=last["command"],
        processes=tuple(last["processes"]),
        **medians,
    )


def run_once(system: System, row: Row) -> dict[str, Any]:
    """One run, measured and checked.

    Raises:
        WrongRun: it failed, took too long, or came to another result.
    """
    with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as name:
        folder = Path(name)
        events, result = folder / "events.jsonl", folder / "result.npz"
        work = folder / "work"
        work.mkdir()
        argv = system.command(system.python, row, work)
        measured = watch(argv, env=environment(system, events, result), cwd=work, timeout_s=_TIMEOUT_S)
        if measured.timed_out:
            raise WrongRun(f"not done within {_TIMEOUT_S:g} s")
        if measured.code:
            raise WrongRun(f"exit code {measured.code}: {measured.said.strip()[-1500:]}")
        check(row, final_values(result, work))
        starts = round_starts(read_events(events))
    if len(starts) != row.rounds:
        raise WrongRun(f"{len(starts)} rounds were seen to begin; {row.rounds} belong to the row")
    between = differences(starts)
    return {
        "wall_s": measured.wall_s,
        "startup_s": starts[0] - measured.started_at,
        "round_s": statistics.median(between) if between else None,
        "rss_mib": measured.rss_mib,
        "pss_mib": measured.pss_mib,
        "server_mib": measured.group_mib(system.server),
        "server_own_mib": measured.group_mib(system.server, own=True),
        "processes": by_role(measured.processes),
        "command": " ".join(argv).replace(name, "FOLDER").replace(str(Path.cwd()) + "/", ""),
    }


def final_values(result: Path, work: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What a script handed in, or the model that fedloom, or NVFLARE, left in its workspace; samples of a large one.

    Raises:
        WrongRun: neither is there.
    """
    if result.is_file():
        with np.load(result) as found:
            return {name: found[name] for name in found.files}
    found = [path for pattern in _MODELS for path in sorted(work.glob(pattern))]
    if not found:
        raise WrongRun("it left no result")
    tensors = {name: np.asarray(value) for name, value in read_checkpoint(found[0]).items()}
    large = sum(value.nbytes for value in tensors.values()) > _LARGE
    return {name: samples(value) if large else value for name, value in tensors.items()}


def check(row: Row, values: dict[str, np.ndarray[Any, Any]]) -> None:
    """Whether the work was done right.

    Raises:
        WrongRun: it was not.
    """
    if row.kind == "digits":
        order = ("0.weight", "0.bias", "2.weight", "2.bias")
        found = {name: next(v for key, v in values.items() if key.endswith(name)) for name in order}
        reached = digitsnet.accuracy(found, row.clients)
        if row.rounds == 10 and row.clients == 4 and abs(reached - digitsnet.ACCURACY) > _NEAR_DIGITS:
            raise WrongRun(f"accuracy {reached:.5f}; every correct system reaches {digitsnet.ACCURACY:.5f}")
        return
    wanted = expected(row.clients, row.rounds)
    worst = max(float(np.abs(value - wanted).max()) for value in values.values())
    if worst > _NEAR * wanted:
        raise WrongRun(f"values are off by {worst:g} from {wanted:g}")


def goals(row: Row, cells: Iterable[Cell]) -> list[Figure]:
    """The row's targets as figures."""
    by_system = {one.system: one for one in cells}
    out: list[Figure] = []
    for goal in row.goals:
        ours, other = by_system.get(goal.mode), by_system.get(goal.against)
        value = getattr(ours, goal.measure) if ours else None
        reference = getattr(other, goal.measure) if other else None
        what = "whole command" if goal.measure == "wall_s" else "a round"
        name = f"{row.title}: {BY_KEY[goal.mode].title}, {what}"
        missing = "" if reference is not None else f"{BY_KEY[goal.against].title} is not in this run"
        out.append(Figure(name, value, "s", BY_KEY[goal.against].title, reference, goal.target, missing))
    return out


def lines(row: Row, cells: Sequence[Cell]) -> list[str]:
    """For a terminal."""
    bare = next((one for one in cells if one.system == "bare"), None)
    heads = ["wall s", "start s", "round s", "x bare", "PSS MiB", "server"]
    widths = [9, 9, 9, 8, 9, 9]
    out = [row.title, f"  {'':22} " + " ".join(f"{head:>{w}}" for head, w in zip(heads, widths, strict=True))]
    for one in cells:
        title = BY_KEY[one.system].title
        if one.not_run:
            out.append(f"  {title:22} not run: {one.not_run.splitlines()[0][:120]}")
            continue
        ratio = one.round_s / bare.round_s if bare and bare.round_s and one.round_s else None
        numbers = [one.wall_s, one.startup_s, one.round_s, ratio, one.pss_mib, one.server_mib]
        shown = [f"{v:>{w}.3f}" if v is not None else " " * w for v, w in zip(numbers, widths, strict=True)]
        out.append(f"  {title:22} " + " ".join(shown))
    return out
