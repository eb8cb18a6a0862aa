"""What the warm process and its clients say to each other: length-prefixed msgpack maps over an AF_UNIX stream.

A client sends `Preload`, `Environ`, `Fork` and `Kill`; the warm process answers `Preloaded`, `Started` or `Refused`,
and says `Exited` when a process has ended. The launcher's own connection also hears of everybody else's processes
(`Started` and `Exited` with number 0), so that it can clear up after a warm process that was killed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from ...serialization.codec import Limit, decode_fields, encode_fields, pack, unpack
from ...serialization.errors import CodecError

__all__ = [
    "Environ",
    "Exited",
    "Fork",
    "Frames",
    "Kill",
    "Message",
    "Preload",
    "Preloaded",
    "Refused",
    "Started",
    "frame",
]

MAX_FRAME_BYTES = 1024 * 1024
_LENGTH = struct.Struct(">I")

Number = Annotated[int, Limit(low=0, high=2**53)]
Pid = Annotated[int, Limit(low=0, high=2**31)]


@dataclass(frozen=True, slots=True)
class Preload:
    """Import these modules now, so that every later process has them."""

    OP: ClassVar[str] = "preload"
    number: Number
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Environ:
    """Change the warm process's own environment, which every later process gets. Not answered."""

    OP: ClassVar[str] = "environ"
    env: dict[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Preloaded:
    """What became of a `Preload`. ``unsafe`` is the module whose import left a thread running or touched a GPU."""

    OP: ClassVar[str] = "preloaded"
    number: Number
    loaded: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    unsafe: str = ""


@dataclass(frozen=True, slots=True)
class Fork:
    """Start a process: a function ``module:name`` called with ``args``, or a command in its place.

    ``env`` is put on top of the warm process's environment and ``unset`` taken out of it. ``log`` receives stdout and
    stderr, appended; "" leaves them where the warm process's go.
    """

    OP: ClassVar[str] = "fork"
    number: Number
    name: str
    target: str = ""
    args: dict[str, Any] = field(default_factory=dict)
    argv: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    cwd: str = ""
    log: str = ""


@dataclass(frozen=True, slots=True)
class Started:
    """The process runs."""

    OP: ClassVar[str] = "started"
    number: Number
    pid: Pid


@dataclass(frozen=True, slots=True)
class Refused:
    """The process could not be started, and why."""

    OP: ClassVar[str] = "refused"
    number: Number
    text: str


@dataclass(frozen=True, slots=True)
class Exited:
    """The process has ended; ``status`` is its exit code, or minus the signal that killed it."""

    OP: ClassVar[str] = "exited"
    number: Number
    pid: Pid
    status: Annotated[int, Limit(low=-128, high=255)]


@dataclass(frozen=True, slots=True)
class Kill:
    """Send a signal to the process's group, if it still runs. Not answered."""

    OP: ClassVar[str] = "kill"
    pid: Pid
    signal: Annotated[int, Limit(low=1, high=64)] = 9


Message = Preload | Preloaded | Environ | Fork | Started | Refused | Exited | Kill

_OPS: dict[str, type[Any]] = {cls.OP: cls for cls in Message.__args__}


def frame(message: Message) -> bytes:
    """A message as it travels.

    Raises:
        CodecError: it is over 1 MiB.
    """
    body = pack({"op": message.OP, **encode_fields(message)})
    if len(body) > MAX_FRAME_BYTES:
        raise CodecError(f"{message.OP} message of {len(body)} bytes; at most {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Puts messages together out of what a stream delivers."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are whole now.

        Raises:
            CodecError: a frame that is too long, or that is no message of this protocol.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise CodecError(f"frame of {length} bytes; at most {MAX_FRAME_BYTES}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield _parse(body)


def _parse(body: bytes) -> Message:
    data = unpack(body, max_bytes=MAX_FRAME_BYTES)
    try:
        cls = _OPS[data["op"]]
    except (KeyError, TypeError):
        raise CodecError("a message without a known op") from None
    return decode_fields(cls, data)
