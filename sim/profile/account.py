"""The account of a run: what each worker did in each round, how a round went, what each site's tasks took. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .files import ProcessSpans, Recording, Span
from .phases import HAND_OVER, OTHER, WAIT, Segment, filled, merged, segments_of, totals

__all__ = ["STEPS", "Account", "Row", "SiteTimes", "Window", "account", "windows_of"]

#: How a round goes, one after the other; see `_steps`.
STEPS = ("ask", "work", "return", "finish", "commit", "between")
_WORK = ("fold", "partial", "finish", "checkpoint")


@dataclass(frozen=True, slots=True)
class Window:
    """A round's time: from its first gather to the next round's, or to its own commit. ``steps`` add up to it."""

    round: int
    start: float
    end: float
    steps: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def wall_s(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Row:
    """A worker's round: seconds by phase, which add up to ``wall_s``."""

    worker: str
    round: int
    wall_s: float
    phases: dict[str, float]


@dataclass(slots=True)
class SiteTimes:
    """A site's tasks: seconds in user code by round, and in all of the others' phases."""

    train_s: dict[int, float] = field(default_factory=dict[int, float])
    serialize_s: float = 0.0
    transfer_s: float = 0.0
    queue_s: float = 0.0  # from the executor's word that it has it until it has a slot
    store_s: float = 0.0  # from the result until the broker's word that it is stored
    tasks: int = 0


@dataclass(frozen=True, slots=True)
class Account:
    """Of a whole run. ``kinds``: the spans' seconds, by process and name, the shortest first."""

    windows: tuple[Window, ...]
    rows: tuple[Row, ...]
    sites: dict[str, SiteTimes]
    kinds: dict[tuple[str, str], list[float]]

    @property
    def workers(self) -> list[str]:
        """In their order."""
        return list(dict.fromkeys(row.worker for row in self.rows))


def account(recording: Recording) -> Account:
    """Add up what was recorded. Rounds are those that the job's process has opened."""
    jobs = [process for process in recording.processes if process.has("open", "commit")]
    agents = [process for process in recording.processes if process.has("slot", "queue")]
    hosts = [process for process in recording.processes if process not in jobs and process not in agents]
    job_spans = [span for process in jobs for span in process.spans]
    agent_spans = [span for process in agents for span in process.spans]
    windows = windows_of(job_spans, agent_spans)
    rows: list[Row] = []
    for worker, segments in _slots(agent_spans, hosts).items():
        rows += _rows(worker, segments, windows, WAIT)
    for process in agents:
        rows += _rows("agent", segments_of(process.spans), windows, WAIT)
    rows += _rows("job", segments_of(job_spans), windows, OTHER) if jobs else []
    kinds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for where, processes in (("sites", hosts), ("agent", agents), ("job", jobs)):
        for span in (span for process in processes for span in process.spans):
            kinds[where, span.name].append(span.end - span.start)
    kinds = {kind: sorted(seconds) for kind, seconds in kinds.items()}
    return Account(tuple(windows), tuple(rows), _sites(recording.processes, hosts), kinds)


def _rows(worker: str, segments: Sequence[Segment], windows: Sequence[Window], rest: str) -> list[Row]:
    return [
        Row(worker, window.round, window.wall_s, totals(segments, window.start, window.end, rest)) for window in windows
    ]


# ---------------------------------------------------------------- rounds


def windows_of(job: Sequence[Span], agent: Sequence[Span]) -> list[Window]:
    """The rounds, in the order in which they began, each until the next one begins."""
    begun: dict[int, float] = {}
    ended = 0.0
    for span in job:
        if span.round >= 0:
            begun[span.round] = min(begun.get(span.round, span.start), span.start)
            ended = max(ended, span.end)
    if not begun:
        return []
    order = sorted(begun, key=lambda number: begun[number])
    ends = [*(begun[number] for number in order[1:]), ended]
    of_round: dict[int, list[Span]] = defaultdict(list)
    for span in (*job, *agent):
        of_round[span.round].append(span)
    unnamed = sorted((span for span in of_round[-1] if span.name in _WORK), key=lambda span: span.start)
    out: list[Window] = []
    for number, end in zip(order, ends, strict=True):
        start = begun[number]
        within = [*of_round[number], *(span for span in unnamed if start <= span.start < end)]
        out.append(Window(number, start, end, _steps(within, start, end)))
    return out


def _steps(spans: Iterable[Span], start: float, end: float) -> dict[str, float]:
    """One after the other, what a round waited for.

    ask: until the executor has the first task. work: until the last task has left its slot. return: until the last
    word of the broker that the job waited for. finish: until the last fold has ended. commit: the new model on its way
    to the broker, and its word that it is durable, where that is not waited for in the next round. between: until that.
    """
    last: dict[str, float] = {}
    first = end
    for span in spans:
        last[span.name] = max(last.get(span.name, start), span.end)
        if span.name == "queue":
            first = min(first, span.start)
    marks = [
        first if "queue" in last else start,
        last.get("slot", start),
        last.get("wait", start),
        max(last.get(name, start) for name in _WORK),
        last.get("commit", start),
        end,
    ]
    out: dict[str, float] = {}
    at = start
    for name, mark in zip(STEPS, marks, strict=True):
        mark = min(end, max(at, mark))
        out[name] = mark - at
        at = mark
    return out


# ---------------------------------------------------------------- workers and sites


def _slots(agent: Iterable[Span], hosts: Iterable[ProcessSpans]) -> dict[str, list[Segment]]:
    """Each slot's time: what the task's site did while it had the slot, and the way to it and back."""
    of_site: dict[str, list[Span]] = defaultdict(list)
    of_worker: dict[str, list[Span]] = defaultdict(list)  # of none of its sites alone: its start, a partial
    for process in hosts:
        for span in process.spans:
            (of_site[span.site] if span.site else of_worker[process.name]).append(span)
    segments = {site: segments_of(spans) for site, spans in of_site.items()}
    slots: dict[str, list[Segment]] = {}
    for span in sorted((s for s in agent if s.name == "slot"), key=lambda s: _number(s.lane)):
        # a worker may have several tasks at hand, each from when it was given until its answer came
        slots.setdefault(span.lane, []).extend(filled(segments.get(span.site, []), span.start, span.end, HAND_OVER))
    return {
        lane: merged([*pieces, *segments_of(of_worker[f"worker-{_number(lane)}"])]) for lane, pieces in slots.items()
    }


def _number(lane: str) -> int:
    number = lane.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def _sites(processes: Iterable[ProcessSpans], hosts: Sequence[ProcessSpans]) -> dict[str, SiteTimes]:
    sites: dict[str, SiteTimes] = {}
    for process in processes:
        host = process in hosts
        for span in process.spans:
            if not span.site or not (host or span.name in ("queue", "store")):
                continue
            times = sites.setdefault(span.site, SiteTimes())
            took = span.end - span.start
            match span.name:
                case "train" | "after send":
                    times.train_s[span.round] = times.train_s.get(span.round, 0.0) + took
                case "decode" | "check" | "encode":
                    times.serialize_s += took
                case "write":
                    times.transfer_s += took
                case "queue":
                    times.queue_s += took
                    times.tasks += 1
                case "store":
                    times.store_s += took
                case _:
                    pass
    return dict(sorted(sites.items()))
