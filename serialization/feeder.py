"""One result on its way into a fold: bytes of the data section, in order, in pieces of any size.

Sums are made in blocks that start at a tensor's first element, so a piece that ends inside a block waits in a small
carry for the rest. A result that turns out bad half-way is taken out by feeding the same bytes once more, subtracting.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from .dtypes import DTYPES
from .envelope import Buffer
from .errors import FoldError, LayoutError, PayloadError, ValuesError
from .fixedpoint import BLOCK, Bytes
from .foldplan import FoldPlan
from .header import Header, header_bytes_needed, read_header
from .payload import OPTIMIZER_PREFIX, EncodedModel

#: A payload: bytes, a file to be mapped, or a model that was encoded in this process and is used where it lies.
Source = Buffer | Path | EncodedModel


class Sink(Protocol):
    """What takes a result's elements."""

    def add(self, index: int, start: int, raw: Bytes) -> tuple[float, int]:
        """Take elements of a tensor from ``start`` on: max|x|, and how many were taken before a bad block."""
        ...


@dataclass(frozen=True, slots=True)
class Segment:
    """A tensor's bytes in a result's data section; index -1 for one that is not folded."""

    index: int
    name: str
    start: int
    stop: int
    itemsize: int


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


def match_layout(
    plan: FoldPlan, places: Mapping[str, int], folded: tuple[bool, ...], header: Header, who: str
) -> list[Segment]:
    """Where a result's tensors belong. A result may lack tensors, but not have others than the model.

    Args:
        plan: the round's plan.
        places: the plan's index of each name.
        folded: whether each of the plan's tensors is averaged.
        header: the result's header.
        who: the site, for messages.

    Raises:
        LayoutError: an unknown name, or another dtype or shape; up to three are named.
    """
    out: list[Segment] = []
    wrong: list[str] = []
    for tensor in header.tensors:
        index = places.get(tensor.name, -1)
        if index < 0 and not tensor.name.startswith(OPTIMIZER_PREFIX):
            wrong.append(f"{tensor.name!r} is not in the model")
        elif index >= 0:
            ours = plan.tensors[index]
            if (tensor.dtype, tensor.shape) != (ours.dtype, ours.shape):
                seen, allowed = f"{tensor.dtype}{list(tensor.shape)}", f"{ours.dtype}{list(ours.shape)}"
                wrong.append(f"{tensor.name!r} is {seen}, the model's is {allowed}")
            if not folded[index]:
                index = -1
        out.append(Segment(index, tensor.name, tensor.start, tensor.stop, DTYPES[tensor.dtype].itemsize))
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise LayoutError(
            f"result of {who} does not fit the model: {'; '.join(wrong[:3])}{more}."
            " Send tensors with the names, dtypes and shapes that were received"
        )
    return out


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
        largest, done = self._sink.add(segment.index, start, raw)
        self._applied += done * segment.itemsize
        self._largest = max(self._largest, largest)
        if done * segment.itemsize < raw.size:
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
