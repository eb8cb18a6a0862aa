"""From spans to the share of time that each phase had. Pure.

Spans of one lane may lie in one another: the innermost counts. Lanes of one worker may overlap: the phase that comes
first in `PHASES` counts. So every instant of a worker's time is one phase's, and the phases add up to the wall time.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from .files import Span

__all__ = [
    "HAND_OVER",
    "OTHER",
    "PHASES",
    "WAIT",
    "Segment",
    "cut",
    "filled",
    "merged",
    "phase_of",
    "segments_of",
    "totals",
]

HAND_OVER = "hand-over"
OTHER = "other"
WAIT = "wait"
#: In the order in which they count where two lanes of a worker are busy at once.
PHASES = ("train", "fold", "serialize", "transfer", "commit", "start", HAND_OVER, OTHER, WAIT)

_RANK = {phase: float(number) for number, phase in enumerate(PHASES)}
_PHASE_OF: Mapping[str, str] = {
    "train": "train",
    "after send": "train",
    "start": "start",
    "enter": HAND_OVER,
    "decode": "serialize",
    "check": "serialize",
    "encode": "serialize",
    "write": "transfer",
    "fetch": "transfer",
    "put": "transfer",
    "open": "transfer",
    "upload": "transfer",
    "fold": "fold",
    "partial": "fold",
    "finish": "fold",
    "checkpoint": "commit",
    "commit": "commit",
    "wait": WAIT,
}


class Segment(NamedTuple):
    """A stretch of time that is one phase's. A worker's segments are in order and do not overlap."""

    start: float
    end: float
    phase: str


def phase_of(name: str) -> str | None:
    """A span's phase; None for what is no work of its lane: a task in its slot, in a queue, or on its way."""
    return _PHASE_OF.get(name)


def segments_of(spans: Iterable[Span]) -> list[Segment]:
    """One worker's time, as far as its spans tell of it."""
    lanes: dict[str, list[Segment]] = {}
    for span in spans:
        if (phase := phase_of(span.name)) is not None:
            lanes.setdefault(span.lane, []).append(Segment(span.start, span.end, phase))
    flat = [_swept(lane, lambda segment: (-segment.start, segment.end)) for lane in lanes.values()]
    return flat[0] if len(flat) == 1 else merged(segment for lane in flat for segment in lane)


def merged(segments: Iterable[Segment]) -> list[Segment]:
    """What is left where segments overlap: the phase that comes first in `PHASES`."""
    return _swept(list(segments), lambda segment: (_RANK[segment.phase], segment.start))


def _swept(segments: Sequence[Segment], rank: Callable[[Segment], tuple[float, float]]) -> list[Segment]:
    """Of segments that overlap, at every instant the one of the least rank."""
    ordered = sorted(segment for segment in segments if segment.end > segment.start)
    if all(one.end <= other.start for one, other in pairwise(ordered)):
        return _joined(ordered)
    points = sorted({point for segment in ordered for point in (segment.start, segment.end)})
    here: list[tuple[tuple[float, float], int]] = []
    out: list[Segment] = []
    entered = 0
    for start, end in pairwise(points):
        while entered < len(ordered) and ordered[entered].start <= start:
            heapq.heappush(here, (rank(ordered[entered]), entered))
            entered += 1
        while here and ordered[here[0][1]].end <= start:
            heapq.heappop(here)
        if not here:
            continue
        out.append(Segment(start, end, ordered[here[0][1]].phase))
    return _joined(out)


def _joined(segments: Iterable[Segment]) -> list[Segment]:
    """With those as one that follow one another in the same phase."""
    out: list[Segment] = []
    for segment in segments:
        if out and out[-1].phase == segment.phase and out[-1].end == segment.start:
            out[-1] = Segment(out[-1].start, segment.end, segment.phase)
        else:
            out.append(segment)
    return out


def cut(segments: Sequence[Segment], start: float, end: float) -> Iterator[Segment]:
    """What of a worker's segments lies between two times."""
    first = bisect_right(segments, start, key=lambda segment: segment.end)
    for at in range(first, len(segments)):
        segment = segments[at]
        if max(start, segment.start) >= end:
            return
        yield Segment(max(start, segment.start), min(end, segment.end), segment.phase)


def filled(segments: Sequence[Segment], start: float, end: float, rest: str) -> Iterator[Segment]:
    """As `cut`, with the gaps between as a phase of their own."""
    at = start
    for segment in cut(segments, start, end):
        if segment.start > at:
            yield Segment(at, segment.start, rest)
        yield segment
        at = segment.end
    if end > at:
        yield Segment(at, end, rest)


def totals(segments: Sequence[Segment], start: float, end: float, rest: str) -> dict[str, float]:
    """Seconds of each phase between two times; they add up to the time between them."""
    out: dict[str, float] = {}
    for segment in filled(segments, start, end, rest):
        out[segment.phase] = out.get(segment.phase, 0.0) + segment.end - segment.start
    return out
