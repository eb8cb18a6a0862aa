"""What an upload is, and where it stands. The life of one is told in `uploads`."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ..serialization.messages import Finish, PayloadRef, Put
from ..serialization.stream import Receiver
from .incoming import FileCheck, IncomingFile

__all__ = ["Phase", "Upload"]


class Phase(enum.Enum):
    """Where an upload stands; see the module."""

    ADMITTING = enum.auto()
    VERIFYING = enum.auto()
    OPEN = enum.auto()
    CHECKING = enum.auto()
    SYNCING = enum.auto()
    LANDED = enum.auto()
    WAITING = enum.auto()


@dataclass(slots=True, eq=False)
class Upload:
    """One peer's Put."""

    key: str
    route: bytes | None  # None: the peer is gone; a whole payload is still brought to its end
    put: Put
    phase: Phase
    asked_at: float
    heard_at: float
    session: str = ""  # whose it was when it began
    file: IncomingFile | None = None
    receiver: Receiver | None = None
    check: FileCheck | None = None
    finish: Finish | None = None
    final: PayloadRef | None = None
    waiters: list[Upload] = field(default_factory=lambda: list[Upload]())

    @property
    def payload(self) -> PayloadRef:
        """What the peer says it puts."""
        return self.put.payload
