"""From a fold's sums to the new global model's payload file, without the model in memory.

The file is made in blocks of the digest: a thread rounds a block's elements into a buffer of its own, hashes them there
and writes them, so that each sum is read once and no new page is touched but the file's. The bytes are those that
`payload.encode_model` makes of what `foldmodel.build_model` gives.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np

from .crew import each, threads_for
from .digest import BLOCK_BYTES, block_digest, root_digest
from .dtypes import DTYPES
from .elements import Bytes, Scratch
from .foldmodel import Array, Fill, Rounding
from .payload import encode_model
from .tensors import as_numpy, raw_bytes


@dataclass(frozen=True, slots=True)
class WrittenModel:
    """A finished aggregate whose model is in a file.

    Attributes:
        size: of the payload, in bytes.
        digest: of the payload.
        largest: max|x| a float tensor, in the plan's order; 0 for others.
        master: float32 values of the tensors whose type is narrower.
    """

    size: int
    digest: str
    largest: tuple[float, ...]
    master: dict[str, Array]


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor's place in the file, and what its bytes come from: bytes that are there, or the sums."""

    start: int
    stop: int
    index: int
    kind: np.dtype[Any]
    ready: Bytes | None
    fill: Fill | None


def write_model(rounding: Rounding, fd: int) -> WrittenModel:
    """Write the new model's payload to an empty file that is open for writing.

    Raises:
        ValuesError: as `build_model`; the file holds part of the payload then.
        OSError: the disk refused.
    """
    for index in rounding.fills:
        if not rounding.is_wide(index):
            rounding.make(index)
    layout = {name: as_numpy(value) for name, value in rounding.base.items()} | rounding.arrays
    encoded = encode_model(rounding.model(layout))
    places = {tensor.name: index for index, tensor in enumerate(rounding.plan.tensors)}
    head = len(encoded.header_bytes)
    parts = [_Part(0, head, -1, np.dtype(np.uint8), np.frombuffer(encoded.header_bytes, np.uint8), None)]
    for tensor in encoded.header.tensors:
        if tensor.stop == tensor.start:
            continue
        index = places[tensor.name]
        made = rounding.arrays.get(tensor.name)
        ready = None if made is None else np.frombuffer(raw_bytes(made), np.uint8)
        fill = rounding.fills.get(index) if ready is None else None
        parts.append(_Part(head + tensor.start, head + tensor.stop, index, DTYPES[tensor.dtype].numpy, ready, fill))
    starts = [part.start for part in parts]
    threads = threads_for(encoded.size)
    scratches = [(Scratch(), np.empty(min(BLOCK_BYTES, encoded.size), np.uint8)) for _ in range(threads)]

    def write(worker: int, begin: int) -> tuple[bytes, list[tuple[int, float]]]:
        scratch, buffer = scratches[worker]
        end = min(begin + BLOCK_BYTES, encoded.size)
        found: list[tuple[int, float]] = []
        at = begin
        while at < end:
            part = parts[bisect_right(starts, at) - 1]
            stop = min(part.stop, end)
            target = buffer[at - begin : stop - begin]
            if part.ready is not None:
                np.copyto(target, part.ready[at - part.start : stop - part.start])
            elif part.fill is not None:
                first = (at - part.start) // part.kind.itemsize
                found.append((part.index, part.fill(scratch, first, target.view(part.kind))))
            at = stop
        block = buffer[: end - begin].data
        digest = block_digest(block)
        while len(block):
            block = block[os.pwrite(fd, block, end - len(block)) :]
        return digest, found

    blocks = each(range(0, encoded.size, BLOCK_BYTES), write, threads)
    for _, found in blocks:
        for index, largest in found:
            rounding.largest[index] = max(rounding.largest[index], largest)
    digest = root_digest(digest for digest, _ in blocks)
    return WrittenModel(encoded.size, digest, tuple(rounding.largest), rounding.master)
