"""Results that the broker has not stored yet, on disk, so that neither an executor's death nor the broker's loses one.

A result is a record (a msgpack map) and, over the inline size, a payload file. The record is written last and
atomically: a result that is here is whole. One folder is one executor's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from ..serialization.codec import decode_fields, encode_fields, pack, unpack
from ..serialization.errors import CodecError
from ..serialization.messages import DoneItem, TaskRef

log = structlog.get_logger(__name__)

_SUFFIX = ".result"
_MAX_RECORD_BYTES = 256 * 1024
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Held:
    """A finished attempt whose result is not stored yet.

    Attributes:
        item: as Done will say it; with a payload where the result is a file.
        data: the result itself where it is small.
        path: the payload's file.
        incoming: the file's name in the broker's own incoming folder, where it was written there.
        base: the site-state version that the attempt started from.
    """

    job: str
    gather: str
    item: DoneItem
    data: bytes | None = None
    path: str = ""
    incoming: str = ""
    base: str = ""

    @property
    def key(self) -> Key:
        """The attempt."""
        return (self.item.task, self.item.attempt)

    @property
    def ref(self) -> TaskRef:
        """The attempt, as messages name it."""
        return TaskRef(self.item.task, self.item.attempt)


class Outbox:
    """The folder and what is in it, by attempt."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[Key, Held] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._load()

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[Held]:
        return iter(list(self._held.values()))

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Key) -> Held | None:
        """The result of this attempt, if it is held."""
        return self._held.get(key)

    def payload_path(self, task: str, attempt: int) -> Path:
        """Where a result's payload is written before `add`."""
        return Path(self.payload_place(task, attempt))

    def payload_place(self, task: str, attempt: int) -> str:
        """`payload_path` as text: of thousands hardly one is written."""
        return f"{self._folder}/{task}.{attempt}.payload"

    def partial_path(self, name: str) -> Path:
        """Where a partial is written; it goes when the executor starts anew, since its tasks are then done again."""
        return self._folder / f"{name}.partial"

    def add(self, held: Held) -> None:
        """Keep a result; its payload file is complete.

        Raises:
            OSError: the disk refused.
        """
        path = self._record(held.key)
        part = path.with_suffix(".part")
        try:
            part.write_bytes(pack(encode_fields(held)))
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        self._held[held.key] = held

    def remove(self, key: Key) -> Held | None:
        """Stored, or refused: forget it and its file."""
        held = self._held.pop(key, None)
        if held is not None:
            self._record(key).unlink(missing_ok=True)
            if held.path:
                Path(held.path).unlink(missing_ok=True)
        return held

    def _record(self, key: Key) -> Path:
        return self._folder / f"{key[0]}.{key[1]}{_SUFFIX}"

    def _load(self) -> None:
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            try:
                fields: Any = unpack(path.read_bytes(), max_bytes=_MAX_RECORD_BYTES)
                held = decode_fields(Held, fields)
            except CodecError as error:  # a power cut within the write: that attempt's work is lost, and done again
                log.warning("outbox_record_damaged", file=path.name, error=str(error))
                path.unlink()
                continue
            payload = held.item.payload
            file = Path(held.path) if held.path else None
            if held.incoming and file is not None and not file.exists():
                file = None
                payload = None  # the broker has taken it in already, or will say that it is gone
            if payload is not None and (file is None or not file.is_file() or file.stat().st_size != payload.size):
                log.warning("outbox_payload_missing", task=held.item.task, attempt=held.item.attempt)
                path.unlink()
                continue
            self._held[held.key] = held
        known = {Path(held.path).name for held in self._held.values() if held.path}
        for path in self._folder.iterdir():
            if path.suffix != _SUFFIX and path.name not in known and path.is_file():
                path.unlink()
