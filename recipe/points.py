"""What scripts logged, out of a job's events: tracking.jsonl, a line a point.

A line is a map: ``site``, ``key``, ``value``, ``type`` (SCALAR, METRICS, PARAMETER, TEXT and so on), ``step``,
``round`` (the task's; null before the first), ``at`` (the site's clock, seconds since 1970), and what else was logged
with it. NaN and Inf are the texts ``"nan"``, ``"inf"`` and ``"-inf"``: JSON has no such numbers.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from ..serialization.jobmessages import POINTS_KIND

TRACKING_FILE = "tracking.jsonl"
#: Types whose points are curves: a step that was left out is counted for them.
CURVES = frozenset({"SCALAR", "SCALARS", "METRIC", "METRICS"})

Point = dict[str, Any]


class PointReader:
    """Takes a job's events in order, and gives each point once. Pure.

    Attributes:
        count: the points so far.
        lost: those that never came, as the gaps in their numbers tell.
        committed_at: when each round was committed.
    """

    def __init__(self) -> None:
        self.count = 0
        self.lost = 0
        self.committed_at: dict[int, float] = {}
        self._next: dict[str, int] = {}
        self._steps: defaultdict[tuple[str, str], int] = defaultdict(int)

    def read(self, event: dict[str, Any]) -> list[Point]:
        """The points of an event; none where it is another, has come before, or is malformed."""
        data: dict[str, Any] = event.get("data") or {}
        if event.get("kind") == "committed" and type(data.get("round")) is int:
            self.committed_at[data["round"]] = float(event.get("at") or 0.0)
        sites: Any = data.get("sites")
        if event.get("kind") != POINTS_KIND or not isinstance(sites, dict):
            return []
        stream, first, count = str(data.get("stream")), _whole(data.get("first")), _whole(data.get("count"))
        expected = self._next.get(stream, 0)
        if first + count <= expected:
            return []  # repeated behind a reconnect
        self.lost += max(0, first - expected)
        self._next[stream] = first + count
        out: list[Point] = []
        for site, rows in cast("dict[str, Any]", sites).items():
            for row in cast("list[Any]", rows) if isinstance(rows, list) else []:
                point = _point(row)
                if point is not None:
                    out.append(self._placed(site, point, float(event.get("at") or 0.0)))
        self.count += len(out)
        return out

    def _placed(self, site: str, point: Point, at: float) -> Point:
        key, kind = str(point.pop("key", "")), str(point.pop("type", "SCALAR"))
        step = point.pop("global_step", None)
        if type(step) is not int:
            step = None
        if kind in CURVES:
            counter = (site, key)
            step = self._steps[counter] if step is None else step
            self._steps[counter] = step + 1
        return {
            "site": site,
            "key": key,
            "value": point.pop("value", None),
            "type": kind,
            "step": step,
            "round": point.pop("round", None),
            "at": point.pop("at", at),
            **point,
        }


def _point(row: Any) -> Point | None:
    pair = cast("list[Any]", row) if isinstance(row, list) else []
    if len(pair) != 2 or not isinstance(pair[1], dict):
        return None
    return dict(cast("dict[str, Any]", pair[1]))


def _whole(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0


class PointFile:
    """Writes a result folder's tracking.jsonl while a job's events pass by."""

    def __init__(self, folder: Path) -> None:
        self.reader = PointReader()
        self._path = folder / TRACKING_FILE
        self._part = self._path.with_name(TRACKING_FILE + ".part")

    def passing(self, events: Iterable[dict[str, Any]]) -> Generator[dict[str, Any]]:
        """The events without those that hold points, which are in the file at the end.

        Raises:
            OSError: the disk refused.
        """
        self._path.unlink(missing_ok=True)
        file: IO[str] | None = None
        try:
            for event in events:
                points = self.reader.read(event)
                if event.get("kind") != POINTS_KIND:
                    yield event
                if points and file is None:
                    file = self._part.open("w", encoding="utf-8")
                if file is not None:
                    file.writelines(json.dumps(point, default=str) + "\n" for point in points)
        finally:
            if file is not None:
                file.close()
        if file is not None:
            self._part.replace(self._path)

    def summary(self) -> dict[str, int]:
        """What summary.json says of it."""
        return {"points": self.reader.count, "lost": self.reader.lost}


def read_points(folder: Path) -> Iterator[Point]:
    """The points in a result folder's tracking.jsonl, one by one; none where nothing was logged."""
    path = folder / TRACKING_FILE
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def scalars(point: Point) -> Iterator[tuple[str, float]]:
    """The numbers of a curve's point by their names: ``key``, or for several ``key/name``."""
    if point["type"] not in CURVES:
        return
    value = point["value"]
    if isinstance(value, dict):
        for name, item in cast("dict[str, Any]", value).items():
            if (number := to_number(item)) is not None:
                # the writers that log several metrics at once have no name for them together
                yield (name if point["type"] == "METRICS" else f"{point['key']}/{name}"), number
    elif (number := to_number(value)) is not None:
        yield point["key"], number


def to_number(value: Any) -> float | None:
    """A logged value as a number; None where it is none."""
    if isinstance(value, bool | int | float):
        return float(value)
    return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(value) if isinstance(value, str) else None


def event_words(data: dict[str, Any]) -> str:
    """An event of points as a line of a log has it: how many, and of what."""
    sites: dict[str, list[Any]] = data.get("sites") or {}
    points = [point for rows in sites.values() for row in rows if (point := _point(row))]
    keys = list(dict.fromkeys(str(point.get("key")) for point in points))
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{len(points)} points: {', '.join(keys[:5])}{more}"
