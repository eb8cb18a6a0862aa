"""One result on its way into a fold: bytes of the data section, in order, in pieces of any size.

Sums are made in blocks that start at a tensor's first element, so a piece that ends inside a block waits in a small
carry for the rest. A result that turns out bad half-way is taken out by feeding the same bytes once more, subtracting.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from .crew import each, threads_for
from .elements import BLOCK, Bytes, Scratch
from .envelope import Buffer
from .errors import FoldError, PayloadError, ValuesError
from .header import Header, header_bytes_needed, read_header
from .payload import EncodedModel
from .segments import Segment, Sink, stretches_of

#: A payload: bytes, a file to be mapped, or a model that was encoded in this process and is used where it lies.
Source = Buffer | Path | EncodedModel


def open_pieces(source: Source) -> tuple[Header, list[memoryview]]:
    """A payload's header and its data section in pieces, of a file without reading it.

    Raises:
        PayloadError: a file that cannot be read.
        HeaderError: bytes that are no safetensors file.
    """
    if isinstance(source, EncodedModel):
        return source.header, source.buffers[1:]
    header, data = open_source(source)
    return header, [data]


def open_source(source: Buffer | Path) -> tuple[Header, memoryview]:
    """A payload's header and its data section, of a file without reading it.

    Raises:
        PayloadError: a file that cannot be read.
        HeaderError: bytes that are no safetensors file.
    """
    if isinstance(source, Path):
        try:
            with source.open("rb") as file:
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise PayloadError(f"{source} cannot be mapped: {error}") from error
    else:
        view = memoryview(source).cast("B")
    header = read_header(view[: header_bytes_needed(view[:8])], len(view))
    return header, view[header.data_start :]


class Feeder:
    """Takes a result's data section in order; made by `Fold.start`. Not thread-safe."""

    def __init__(
        self,
        segments: list[Segment],
        sink: Sink,
        *,
        who: str,
        stop: int,
        close: Callable[[Feeder, bool], None],
        undoing: Callable[[], Sink] | None = None,
    ) -> None:
        """A feeder over ``stop`` bytes.

        Args:
            segments: the tensors, in the order of their bytes.
            sink: takes the elements.
            who: the site, for messages.
            stop: how many bytes there are.
            close: called once, with True when all bytes were taken, with False when none of them count any more.
            undoing: makes the sink that takes out again what ``sink`` added; None for a feeder that is one.
        """
        self._segments = segments
        self._sink = sink
        self._who = who
        self._stop = stop
        self._close = close
        self._undoing = undoing
        self._state: Literal["open", "failed", "closed"] = "open"
        self._at = 0
        self._applied = 0
        self._carry: Bytes = np.empty(0, np.uint8)
        self._carried = 0
        self._largest = 0.0
        self._scratch = Scratch()
        #: the next byte that is wanted, from the start of the data section
        self.position = 0
        #: max|x| of each tensor that is whole, by the plan's index
        self.magnitudes: dict[int, float] = {}
        self._pass_tensors()

    def feed(self, offset: int, data: Buffer) -> None:
        """Take the next bytes.

        Args:
            offset: of their first byte in the data section; must be `position`.
            data: the bytes; not kept.

        Raises:
            FoldError: bytes out of order, or behind the result's end.
            ValuesError: NaN, Inf or a value beyond 2^900. Nothing more can be fed: see `undo`.
        """
        if self._state != "open":
            raise FoldError(f"result of {self._who} is {self._state}; no more bytes can be fed")
        if offset != self.position:
            raise FoldError(f"bytes from {offset} of the result of {self._who}; those from {self.position} are next")
        raw = np.frombuffer(data, np.uint8)
        if self.position + raw.size > self._stop:
            if self._undoing is not None:
                raise FoldError(f"result of {self._who} goes on behind its end at {self._stop}")
            raw = raw[: self._stop - self.position]  # what is taken out may be less than the result
        used = 0
        while used < raw.size:
            used += self._take(raw[used:])

    def feed_all(self, pieces: Sequence[memoryview]) -> None:
        """Take all bytes that are wanted, in several threads where that pays; they stay valid until this returns.

        Args:
            pieces: the data section from its beginning on; no tensor lies in two of them.

        Raises:
            ValuesError: as `feed`.
        """
        threads = threads_for(self._stop)
        if threads < 2 or self.position:
            for piece in pieces:
                if self.missing:
                    self.feed(self.position, piece)
            return
        stretches = stretches_of(self._segments, pieces, self._stop)
        for part in stretches:
            self._fill_scales(part.segment, 0, part.raw)
        scratches = [Scratch() for _ in range(threads)]
        bad: list[int] = []

        def take(worker: int, place: int) -> tuple[float, int]:
            part = stretches[place]
            if part.segment.index < 0:
                return 0.0, part.raw.size // part.segment.itemsize
            if bad and place > min(bad):
                return 0.0, 0
            found = part.put(self._sink, scratches[worker])
            if found[1] * part.segment.itemsize < part.raw.size:
                bad.append(place)
            return found

        taken = each(range(len(stretches)), take, threads)
        if bad and self._undoing is not None:  # what lies behind the first bad block is not in, as when fed in order
            inverse = self._undoing()
            for place in range(min(bad) + 1, len(stretches)):
                if taken[place][1] and stretches[place].segment.index >= 0:
                    stretches[place].head(taken[place][1]).put(inverse, scratches[0])
        for stretch, (largest, done) in zip(stretches, taken, strict=True):
            self._count(stretch.segment, stretch.start, stretch.raw.size, largest, done)
            self.position = self._applied
            self._pass_tensors()

    def finish(self) -> None:
        """Count the result: all its bytes are in.

        Raises:
            FoldError: bytes are missing, or the feeder has failed.
        """
        if self._state != "open" or self.position < self._stop:
            raise FoldError(
                f"result of {self._who} is {self._state} at {self.position} of {self._stop} bytes; it is not whole"
            )
        self._state = "closed"
        self._close(self, True)

    def undo(self) -> Feeder | None:
        """Give the result up, whole or not.

        Returns:
            None when nothing of it was added yet, or a feeder that wants the same bytes once more (it says how far: see
            `missing`) and then `finish`, after which the fold has the bits it had before. Until then the fold can be
            neither read nor sent.
        """
        if self._state == "closed" or self._undoing is None:
            raise FoldError(
                f"result of {self._who} is {self._state} and cannot be undone; take it out with Fold.remove"
            )
        self._state = "closed"
        if not self._applied:
            self._close(self, False)
            return None
        close = self._close
        return Feeder(
            self._segments,
            self._undoing(),
            who=self._who,
            stop=self._applied,
            close=lambda feeder, whole: close(feeder, False),
        )

    @property
    def closed(self) -> bool:
        """Whether the result is counted, or given up."""
        return self._state == "closed"

    @property
    def missing(self) -> int:
        """How many bytes are still wanted."""
        return self._stop - self.position

    def _take(self, raw: Bytes) -> int:
        """Use the start of ``raw`` for the current tensor; how many bytes that were."""
        segment = self._segments[self._at]
        left = min(segment.stop, self._stop) - self.position
        raw = raw[:left]
        if segment.index < 0:
            self._fill_scales(segment, self.position - segment.start, raw)
            self.position += raw.size
            self._applied = self.position
        elif self._carried:
            raw = raw[: self._block_end(segment) - self.position]
            self._fill_carry(segment, raw)
        else:
            size = BLOCK * segment.itemsize
            whole = raw.size if raw.size == left else raw.size // size * size
            if whole:
                raw = raw[:whole]
                self._apply(segment, raw)
                self.position += whole
            else:
                self._fill_carry(segment, raw)
        self._pass_tensors()
        return raw.size

    def _fill_scales(self, segment: Segment, offset: int, raw: Bytes) -> None:
        """Take bytes of scales, where these are some, and look at them when they are whole."""
        if segment.scales is None:
            return
        segment.scales.fill(offset, raw)
        if offset + raw.size == segment.stop - segment.start and not segment.scales.good:
            self._state = "failed"
            raise ValuesError(
                f"result of {self._who}: {segment.name!r} holds scales that are NaN, Inf, negative, or finer than an"
                " encoder makes them; the result is not counted. Let fedloom encode the site's results"
            )

    def _fill_carry(self, segment: Segment, raw: Bytes) -> None:
        end = self._block_end(segment)
        if self._carry.size < BLOCK * segment.itemsize:
            self._carry = np.empty(BLOCK * segment.itemsize, np.uint8)
        self._carry[self._carried : self._carried + raw.size] = raw
        self._carried += raw.size
        if self.position + raw.size == end:
            block, self._carried = self._carry[: self._carried], 0
            self._apply(segment, block)
        self.position += raw.size

    def _block_end(self, segment: Segment) -> int:
        """Where the block ends that the first byte not yet applied is in."""
        return min(self._applied + BLOCK * segment.itemsize, segment.stop)

    def _apply(self, segment: Segment, raw: Bytes) -> None:
        start = (self._applied - segment.start) // segment.itemsize
        self._count(
            segment, start, raw.size, *self._sink.add(segment.index, start, raw, segment.elements, self._scratch)
        )

    def _count(self, segment: Segment, start: int, size: int, largest: float, done: int) -> None:
        """Note what a sink took of ``size`` bytes."""
        self._applied += done * segment.itemsize
        self._largest = max(self._largest, largest)
        if done * segment.itemsize < size:
            self._state = "failed"
            raise ValuesError(
                f"result of {self._who}: tensor {segment.name!r} holds NaN, Inf or a value beyond 2^900 in the elements"
                f" from {start + done} on; the result is not counted. Check the site's loss and learning rate"
            )

    def _pass_tensors(self) -> None:
        """Go on to the next tensor that has bytes left, noting those that are whole."""
        while self._at < len(self._segments) and self.position >= self._segments[self._at].stop:
            segment = self._segments[self._at]
            if segment.index >= 0:
                self.magnitudes[segment.index] = self._largest
            self._largest = 0.0
            self._at += 1
