"""The account as plain data (summary.json) and as text (table.txt, and at the end of a run). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from .account import STEPS, Account, Row, SiteTimes, Window
from .cpu import CpuSeries
from .files import Recording
from .phases import PHASES

__all__ = ["cpu_of", "summary_of", "table_text"]

VERSION = 1
#: Workers shown one by one at the end of a run; of more, the slots together. The file has all of them.
MAX_WORKERS = 12
MAX_ROUNDS = 12
MAX_SITES = 12
#: Lines of a table in the file; summary.json has what is left out.
MAX_LINES = 1000

Numbers = dict[str, float]
Summary = dict[str, Any]


def cpu_of(recording: Recording, series: Mapping[int, CpuSeries]) -> dict[str, list[CpuSeries]]:
    """CPU series by what the processes are; ``sites`` are those in which the sites' code runs."""
    jobs = {process.pid for process in recording.processes if any(span.name == "commit" for span in process.spans)}
    out: dict[str, list[CpuSeries]] = {}
    for pid, one in series.items():
        out.setdefault(one.name or ("job" if pid in jobs else "sites"), []).append(one)
    return out


def summary_of(
    account: Account, recording: Recording, cpu: Mapping[str, Sequence[CpuSeries]], left_out: int = 0
) -> Summary:
    """Everything, in seconds; ``shares`` are of the workers' time in the rounds."""
    by_round: dict[int, dict[str, Numbers]] = {}
    by_worker: dict[str, list[Row]] = {}
    for row in account.rows:
        by_round.setdefault(row.round, {})[row.worker] = _rounded(row.phases)
        by_worker.setdefault(row.worker, []).append(row)
    wall_s = sum(window.wall_s for window in account.windows)
    return {
        "version": VERSION,
        "wall_s": round(wall_s, 6),
        "rounds": [
            {
                "round": window.round,
                "wall_s": round(window.wall_s, 6),
                "steps": _rounded(window.steps),
                "cpu_s": _cpu(cpu, window),
                "workers": by_round.get(window.round, {}),
            }
            for window in account.windows
        ],
        "workers": {worker: _with_shares(rows) for worker, rows in by_worker.items()},
        "slots": _with_shares([row for row in account.rows if row.worker.startswith("slot-")]),
        "total": _with_shares(account.rows),
        "sites": {site: _site(times) for site, times in account.sites.items()},
        "kinds": [
            {
                "process": where,
                "name": name,
                "count": len(each),
                "seconds": round(sum(each), 6),
                "median_s": round(each[len(each) // 2], 6),
                "p90_s": round(each[len(each) * 9 // 10], 6),
            }
            for (where, name), each in sorted(account.kinds.items(), key=lambda item: -sum(item[1]))
        ],
        "spans": recording.count,
        "dropped": recording.dropped,
        "skipped_files": recording.skipped,
        "left_out_of_trace": left_out,
    }


def _added(rows: Iterable[Row]) -> Numbers:
    out: Numbers = {}
    for row in rows:
        for phase, seconds in row.phases.items():
            out[phase] = out.get(phase, 0.0) + seconds
    return out


def _with_shares(rows: Sequence[Row]) -> dict[str, Any]:
    phases = _added(rows)
    wall_s = sum(row.wall_s for row in rows)
    shares = {name: round(seconds / wall_s, 4) if wall_s else 0.0 for name, seconds in phases.items()}
    return {"wall_s": round(wall_s, 6), "phases": _rounded(phases), "shares": shares}


def _rounded(numbers: Mapping[str, float]) -> Numbers:
    return {name: round(seconds, 6) for name, seconds in numbers.items()}


def _cpu(cpu: Mapping[str, Sequence[CpuSeries]], window: Window) -> Numbers:
    return {
        name: round(sum(one.between(window.start, window.end) for one in series), 6) for name, series in cpu.items()
    }


def _site(times: SiteTimes) -> dict[str, Any]:
    return {
        "tasks": times.tasks,
        "train_s": {str(number): round(seconds, 6) for number, seconds in sorted(times.train_s.items())},
        "serialize_s": round(times.serialize_s, 6),
        "transfer_s": round(times.transfer_s, 6),
        "queue_s": round(times.queue_s, 6),
        "store_s": round(times.store_s, 6),
    }


# ---------------------------------------------------------------- text


def table_text(summary: Summary, *, whole: bool) -> str:
    """The tables, in milliseconds; ``whole`` with every worker, round and site as far as a file should go."""
    rounds = cast("list[dict[str, Any]]", summary["rounds"])
    if not rounds:
        return "no round was seen: nothing to show\n"
    parts = [_rounds_table(rounds, whole), _workers_table(summary, len(rounds), whole), _cpu_table(rounds)]
    parts.append(_sites_table(summary["sites"], whole))
    if whole:
        parts += [_kinds_table(summary["kinds"]), _each_table(rounds)]
    notes = [
        f"{summary[key]} {text}\n"
        for key, text in (
            ("dropped", "spans were beyond a process's bound: the phases of its later rounds look like waiting"),
            ("skipped_files", "files of spans could not be read to their end"),
            ("left_out_of_trace", "of the shortest spans are not in trace.json"),
        )
        if summary[key]
    ]
    return "\n".join(part for part in (*parts, "".join(notes)) if part)


def _rounds_table(rounds: Sequence[dict[str, Any]], whole: bool) -> str:
    names = _seen(STEPS, (entry["steps"] for entry in rounds))
    rows = [
        [str(entry["round"] + 1), _ms(entry["wall_s"]), *(_ms(entry["steps"].get(name, 0.0)) for name in names)]
        for entry in _some(rounds, MAX_LINES if whole else MAX_ROUNDS)
    ]
    count = len(rounds)
    mean = [sum(entry["steps"].get(name, 0.0) for entry in rounds) / count for name in names]
    rows.append(["mean", _ms(sum(entry["wall_s"] for entry in rounds) / count), *(_ms(value) for value in mean)])
    return "rounds, ms, one step after the other\n" + _grid(["round", "wall", *names], rows)


def _workers_table(summary: Summary, rounds: int, whole: bool) -> str:
    workers = dict(cast("dict[str, dict[str, Any]]", summary["workers"]))
    if not whole and len(workers) > MAX_WORKERS:
        slots = [name for name in workers if name.startswith("slot-")]
        others = {name: entry for name, entry in workers.items() if name not in slots}
        workers = {f"{len(slots)} slots": _mean(summary["slots"], len(slots)), **others}
    names = _seen(PHASES, (entry["phases"] for entry in workers.values()))
    rows: list[list[str]] = []
    for worker, entry in list(workers.items())[:MAX_LINES]:
        cells = (_with_share(entry["phases"].get(name, 0.0) / rounds, entry["shares"].get(name, 0.0)) for name in names)
        rows.append([worker, _ms(entry["wall_s"] / rounds), *cells])
    return "workers, ms a round and share of it\n" + _grid(["worker", "wall", *names], rows)


def _mean(entry: dict[str, Any], count: int) -> dict[str, Any]:
    phases = {name: seconds / count for name, seconds in entry["phases"].items()}
    return {"wall_s": entry["wall_s"] / count, "phases": phases, "shares": entry["shares"]}


def _cpu_table(rounds: Sequence[dict[str, Any]]) -> str:
    wall_s = sum(entry["wall_s"] for entry in rounds)
    used: Numbers = {}
    for entry in rounds:
        for name, seconds in entry["cpu_s"].items():
            used[name] = used.get(name, 0.0) + seconds
    rows = [
        [name, _ms(seconds / len(rounds)), f"{seconds / wall_s:.2f}" if wall_s else ""]
        for name, seconds in sorted(used.items(), key=lambda item: -item[1])
    ]
    if not rows:
        return ""
    all_s = sum(used.values())
    rows.append(["together", _ms(all_s / len(rounds)), f"{all_s / wall_s:.2f}" if wall_s else ""])
    return "CPU time, ms a round\n" + _grid(["process", "CPU", "cores"], rows)


def _sites_table(sites: Mapping[str, dict[str, Any]], whole: bool) -> str:
    """The sites whose code took longest come first."""
    order = sorted(sites.items(), key=lambda item: -sum(item[1]["train_s"].values()))
    shown = order[: MAX_LINES if whole else MAX_SITES]
    rows: list[list[str]] = []
    for site, entry in shown:
        tasks = max(1, entry["tasks"])
        numbers = [sum(entry["train_s"].values()), *(entry[f"{name}_s"] for name in _SITE_COLUMNS[1:])]
        rows.append([site, str(entry["tasks"]), *(_ms(number / tasks) for number in numbers)])
    if not rows:
        return ""
    more = f"{len(order) - len(shown)} more in summary.json\n" if len(order) > len(shown) else ""
    return "sites, ms a task\n" + _grid(["site", "tasks", *_SITE_COLUMNS], rows) + more


_SITE_COLUMNS = ("train", "serialize", "transfer", "queue", "store")


def _kinds_table(kinds: Sequence[dict[str, Any]]) -> str:
    rows = [
        [entry["process"], entry["name"], str(entry["count"]), *(_ms(entry[name]) for name in _KIND_COLUMNS)]
        for entry in kinds
    ]
    return "spans of the whole run, ms\n" + _grid(["process", "span", "count", "together", "median", "90%"], rows)


_KIND_COLUMNS = ("seconds", "median_s", "p90_s")


def _each_table(rounds: Sequence[dict[str, Any]]) -> str:
    names = _seen(PHASES, (phases for entry in rounds for phases in entry["workers"].values()))
    rows = [
        [str(entry["round"] + 1), worker, *(_ms(phases.get(name, 0.0)) for name in names)]
        for entry in rounds
        for worker, phases in entry["workers"].items()
    ]
    more = f"{len(rows) - MAX_LINES} more in summary.json\n" if len(rows) > MAX_LINES else ""
    return "each round of each worker, ms\n" + _grid(["round", "worker", *names], rows[:MAX_LINES]) + more


def _seen(names: Sequence[str], entries: Iterable[Mapping[str, float]]) -> list[str]:
    seen = {name for entry in entries for name, seconds in entry.items() if seconds > 0}
    return [name for name in names if name in seen]


def _some(rounds: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return list(rounds) if len(rounds) <= count else [*rounds[: count // 2], *rounds[-(count // 2) :]]


def _ms(seconds: float) -> str:
    value = seconds * 1000
    if 0 < value < 0.1:
        return f"{value:.3f}"
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _with_share(seconds: float, share: float) -> str:
    return f"{_ms(seconds)} {share:4.0%}" if seconds > 0 else "-"


def _grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (titles, *rows)
    ]
    return "".join(f"  {line.rstrip()}\n" for line in lines)
