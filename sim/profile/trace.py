"""The trace file: Chrome's trace event format, which chrome://tracing and https://ui.perfetto.dev open. Pure.

Work is complete events ("X") on the lane that did it; a task in a queue, in its slot, or on its way until it is stored,
is a pair of asynchronous events ("b", "e"), since several are at once; CPU use is counters ("C"). Format: "Trace Event
Format", the Chromium project.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .account import STEPS, Window
from .cpu import CpuSeries
from .files import ProcessSpans, Recording, Span
from .phases import phase_of

__all__ = ["MAX_EVENTS", "Trace", "trace_lines", "trace_of"]

Event = dict[str, Any]
#: Spans in a trace, at most: of more, the longest. A viewer takes about a gigabyte for a million.
MAX_EVENTS = 300_000
_ASYNC = ("queue", "slot", "store")


@dataclass(frozen=True, slots=True)
class Trace:
    """The events in the order of the file: names first, then by time; ``left_out`` spans were too many."""

    events: tuple[Event, ...]
    left_out: int = 0


def trace_of(
    recording: Recording,
    windows: Sequence[Window] = (),
    cpu: Mapping[int, CpuSeries] | None = None,
    *,
    launcher: int = 0,
    max_events: int = MAX_EVENTS,
) -> Trace:
    """The events of a run; times count from its first span.

    Args:
        windows: the rounds, which get a lane of their own, with their steps.
        cpu: CPU use by process id.
        launcher: the process id under which the rounds are shown.
    """
    spans = [(process, span) for process in recording.processes for span in process.spans]
    kept = spans
    if len(spans) > max_events:
        kept = heapq.nlargest(max_events, spans, key=lambda pair: pair[1].end - pair[1].start)
    if not kept:
        return Trace(())
    origin = min(span.start for _, span in kept)
    lanes = {lane: number + 1 for number, lane in enumerate(sorted({(p.pid, span.lane) for p, span in kept}))}
    events: list[Event] = []
    for process, span in kept:
        events += _events(process, span, lanes[process.pid, span.lane], origin)
    for window in windows:
        events += _round(window, launcher, origin)
    for pid, series in (cpu or {}).items():
        events += _counters(pid, series, origin)
    # an outer span comes before the inner one that starts with it, as viewers want it
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))
    names = list(_names(recording.processes, lanes, cpu or {}, launcher, rounds=bool(windows)))
    return Trace((*names, *events), len(spans) - len(kept))


def trace_lines(trace: Trace) -> Iterator[str]:
    """The file's text, an event a line."""
    yield '{"displayTimeUnit": "ms", "traceEvents": [\n'
    for number, event in enumerate(trace.events):
        yield (",\n" if number else "") + json.dumps(event, separators=(",", ":"))
    yield "\n]}\n"


def _at(start: float, end: float, origin: float) -> Event:
    """Microseconds, in whole nanoseconds: what lies within another event must still do so."""
    first, last = round((start - origin) * 1e9), round((end - origin) * 1e9)
    return {"ts": first / 1000, "dur": (last - first) / 1000}


def _events(process: ProcessSpans, span: Span, tid: int, origin: float) -> Iterator[Event]:
    args = {name: value for name, value in (("site", span.site), ("task", span.task)) if value}
    if span.round >= 0:
        args["round"] = span.round  # pyright: ignore[reportArgumentType]
    common: Event = {"name": span.name, "pid": process.pid, "tid": tid, "args": args}
    if span.name in _ASYNC:
        common |= {"cat": span.name, "id": f"{span.name} {span.task or span.site}"}
        yield common | {"ph": "b", "ts": _at(span.start, span.start, origin)["ts"]}
        yield common | {"ph": "e", "ts": _at(span.end, span.end, origin)["ts"]}
        return
    yield common | {"cat": phase_of(span.name) or span.name, "ph": "X"} | _at(span.start, span.end, origin)


def _round(window: Window, pid: int, origin: float) -> Iterator[Event]:
    common: Event = {"cat": "round", "ph": "X", "pid": pid, "tid": 1, "args": {"round": window.round}}
    yield common | {"name": f"round {window.round + 1}"} | _at(window.start, window.end, origin)
    at = window.start
    for step in STEPS:
        until = min(window.end, at + window.steps.get(step, 0.0))
        if until > at:
            yield common | {"name": step} | _at(at, until, origin)
        at = until


def _counters(pid: int, series: CpuSeries, origin: float) -> Iterator[Event]:
    for at, share in series.shares():
        if at >= origin:
            ts, args = _at(at, at, origin)["ts"], {"cores": round(share, 3)}
            yield {"name": "CPU", "cat": "cpu", "ph": "C", "pid": pid, "tid": 0, "ts": ts, "args": args}


def _names(
    processes: Iterable[ProcessSpans],
    lanes: Mapping[tuple[int, str], int],
    cpu: Mapping[int, CpuSeries],
    launcher: int,
    *,
    rounds: bool,
) -> Iterator[Event]:
    names = {pid: series.name or "other" for pid, series in cpu.items()}
    names |= {process.pid: process.name for process in processes}
    if rounds:
        names[launcher] = "rounds"
        yield _name("thread_name", launcher, 1, "rounds")
    for pid, name in names.items():
        yield _name("process_name", pid, 0, name)
    for (pid, lane), tid in lanes.items():
        yield _name("thread_name", pid, tid, lane)


def _name(what: str, pid: int, tid: int, name: str) -> Event:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}
