"""The spans that a run's processes have left in a folder, read back; as far as each of them has come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgpack

from ...serialization.spans import SUFFIX

__all__ = ["MAX_BYTES", "ProcessSpans", "Recording", "Span", "folder_bytes", "read_folder"]

#: Read of all files together, at most.
MAX_BYTES = 512 * 1024 * 1024
_MAX_ITEMS = 64 * 1024


class Span(NamedTuple):
    """Something that took from ``start`` to ``end``, in seconds of the processes' common clock.

    Attributes:
        round: the round's number in the job; -1 where it is not known.
        lane: what does one thing at a time: a thread of the process, or a slot.
    """

    name: str
    start: float
    end: float
    round: int = -1
    site: str = ""
    task: str = ""
    lane: str = ""


@dataclass(slots=True, eq=False)
class ProcessSpans:
    """What one process has recorded; ``dropped`` are those beyond its bound."""

    name: str
    pid: int
    spans: list[Span] = field(default_factory=list[Span])
    dropped: int = 0

    def has(self, *names: str) -> bool:
        """Whether there is a span of one of these names."""
        return any(span.name in names for span in self.spans)


@dataclass(frozen=True, slots=True)
class Recording:
    """All processes' spans. ``skipped`` files were not read, for their size or because nothing of them made sense."""

    processes: tuple[ProcessSpans, ...] = ()
    skipped: int = 0

    @property
    def dropped(self) -> int:
        """Spans that were not kept."""
        return sum(process.dropped for process in self.processes)

    @property
    def count(self) -> int:
        """Spans that are here."""
        return sum(len(process.spans) for process in self.processes)


def folder_bytes(folder: Path) -> int:
    """What there is to read.

    Raises:
        OSError: the folder or a file cannot be read.
    """
    return sum(path.stat().st_size for path in folder.glob(f"*{SUFFIX}"))


def read_folder(folder: Path, max_bytes: int = MAX_BYTES) -> Recording:
    """Every process's spans. Their rounds are completed: a task of which one process knows the round has it for all.

    What a killed process was about to write is passed over.

    Raises:
        OSError: the folder or a file cannot be read.
    """
    processes: list[ProcessSpans] = []
    left, skipped = max_bytes, 0
    for path in sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns):
        size = path.stat().st_size
        if size > left:
            skipped += 1
            continue
        left -= size
        found = list(_processes(path.read_bytes()))
        skipped += not found
        processes += found
    rounds = {span.task: span.round for process in processes for span in process.spans if span.task and span.round >= 0}
    for process in processes:
        process.spans = [
            span
            if span.round >= 0 or not span.task
            else Span(span.name, span.start, span.end, rounds.get(span.task, -1), span.site, span.task, span.lane)
            for span in process.spans
        ]
    return Recording(tuple(processes), skipped)


def _processes(data: bytes) -> Iterator[ProcessSpans]:
    """The processes in a file: one, or several where the system has given a number again."""
    current: ProcessSpans | None = None
    for entry in _entries(data):
        match entry:
            case {"version": 1, "process": str(name), "pid": int(pid)}:
                if current is not None:
                    yield current
                current = ProcessSpans(name, pid)
            case {"dropped": int(dropped)} if current is not None:
                current.dropped += dropped
            case list() if current is not None:
                current.spans += _spans(cast("list[Any]", entry))
            case _:
                break
    if current is not None:
        yield current


def _entries(data: bytes) -> Iterator[Any]:
    """What is whole of a stream of msgpack."""
    unpacker = cast("Any", msgpack).Unpacker(
        max_buffer_size=len(data) + 1, max_array_len=_MAX_ITEMS, max_map_len=_MAX_ITEMS, max_str_len=_MAX_ITEMS
    )
    unpacker.feed(data)
    while True:
        try:
            entry: Any = unpacker.unpack()
        except (msgpack.UnpackException, ValueError):
            return  # the end, or where a process was killed within a write
        yield entry


def _spans(items: Iterable[Any]) -> Iterator[Span]:
    for item in items:
        match item:
            case [str(name), float(start), float(end), int(number), str(site), str(task), str(lane)] if start <= end:
                yield Span(name, start, end, number, site, task, lane)
            case _:
                pass
