"""TensorBoard's event files, written without TensorBoard: a result folder's points and rounds as ``tb_events/<site>/``.

A file is a sequence of records (TFRecord: length, its checksum, the bytes, their checksum; the checksums are CRC-32C,
masked), each a protocol buffer ``tensorflow.Event`` (tensorflow/core/util/event.proto, framework/summary.proto).
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from .matrix import is_evaluation
from .naming import folder_name
from .points import Point, read_points, scalars

SERVER = "server"
_BUFFER_BYTES = 4 * 1024**2
_POLYNOMIAL = 0x82F63B78


def write_events(folder: Path, records: Iterable[Mapping[str, Any]], at: Mapping[int, float], to: str) -> None:
    """Write what sites logged, and the rounds' metrics under ``server``, below ``folder / to``; it is made anew.

    Args:
        records: the rounds, as metrics.jsonl holds them; a round's number is the step of its metrics.
        at: when each was committed, in seconds since 1970.

    Raises:
        OSError: the disk refused.
    """
    place = folder / to
    shutil.rmtree(place, ignore_errors=True)
    started: set[str] = set()
    waiting: dict[str, bytearray] = {}
    held = 0
    for site, at_, event in _events(folder, records, at):
        if site not in waiting:
            waiting[site] = bytearray() if site in started else bytearray(record(_version(at_)))
        held -= len(waiting[site])
        waiting[site] += record(event)
        held += len(waiting[site])
        if held > _BUFFER_BYTES:
            _flush(waiting, started, place)
            held = 0
    _flush(waiting, started, place)


def _events(
    folder: Path, records: Iterable[Mapping[str, Any]], at: Mapping[int, float]
) -> Iterator[tuple[str, float, bytes]]:
    for point in read_points(folder):
        when = float(point["at"])
        for event in _of_point(point, when):
            yield folder_name(str(point["site"])) or SERVER, when, event
    for line in records:
        if is_evaluation(line):
            continue
        number = int(line["round"])
        metrics: dict[str, Any] = line.get("metrics") or {}
        for name, value in metrics.items():
            if isinstance(value, int | float):
                yield SERVER, at.get(number, 0.0), scalar_event(at.get(number, 0.0), number, name, float(value))


def _of_point(point: Point, at: float) -> Iterator[bytes]:
    step = point["step"] or 0
    for name, value in scalars(point):
        yield scalar_event(at, step, name, value)
    if point["type"] == "TEXT" and isinstance(point["value"], str):
        yield text_event(at, step, point["key"], point["value"])
    elif point["type"] == "PARAMETER":
        yield text_event(at, step, point["key"], str(point["value"]))
    elif point["type"] == "PARAMETERS" and isinstance(point["value"], dict):
        values = cast("dict[str, Any]", point["value"])
        rows = "".join(f"| {name} | {value} |\n" for name, value in values.items())
        yield text_event(at, step, point["key"], "| name | value |\n|---|---|\n" + rows)


def _flush(waiting: dict[str, bytearray], started: set[str], place: Path) -> None:
    for site, data in waiting.items():
        (place / site).mkdir(parents=True, exist_ok=True)
        with (place / site / f"events.out.tfevents.0.{site}").open("ab") as file:
            file.write(data)
        started.add(site)
    waiting.clear()


# ---------------------------------------------------------------- protocol buffers


def scalar_event(at: float, step: int, tag: str, value: float) -> bytes:
    """An Event with one number."""
    try:
        number = struct.pack("<f", value)
    except OverflowError:  # a double beyond a float's range
        number = struct.pack("<f", float("inf") if value > 0 else float("-inf"))
    return _event(at, step, _field(1, tag.encode()) + b"\x15" + number)


def text_event(at: float, step: int, tag: str, text: str) -> bytes:
    """An Event with a text, for TensorBoard's text plugin."""
    plugin = _field(1, _field(1, b"text"))  # SummaryMetadata.plugin_data.plugin_name
    shape = _field(2, _field(2, b"\x08\x01"))  # TensorShapeProto.dim.size = 1
    tensor = b"\x08\x07" + shape + _field(8, text.encode())  # DT_STRING
    return _event(at, step, _field(1, tag.encode()) + _field(8, tensor) + _field(9, plugin))


def _event(at: float, step: int, value: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", at) + b"\x10" + _varint(step) + _field(5, _field(1, value))


def _version(at: float) -> bytes:
    return b"\x09" + struct.pack("<d", at) + _field(3, b"brain.Event:2")


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    value &= 0xFFFF_FFFF_FFFF_FFFF
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


# ---------------------------------------------------------------- records


def record(data: bytes) -> bytes:
    """Bytes as a record of the file."""
    return _header(len(data)) + data + _masked(data)


@lru_cache(4096)
def _header(length: int) -> bytes:
    head = struct.pack("<Q", length)
    return head + _masked(head)


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFF_FFFF)


def _table() -> tuple[int, ...]:
    out: list[int] = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        out.append(value)
    return tuple(out)


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), RFC 3720 section 12.1."""
    crc = 0xFFFF_FFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFF_FFFF
