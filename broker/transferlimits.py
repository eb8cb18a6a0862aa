"""What the transfers of the data process may use, and what they send."""

from __future__ import annotations

from dataclasses import dataclass

from ..serialization.envelope import Buffer
from ..serialization.messages import Message

__all__ = ["CONTROL", "Limits", "Outgoing"]

#: The route of what goes to the control process.
CONTROL = b""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds and timers of the data process; sizes in bytes, times in seconds."""

    chunk_bytes: int = 1024 * 1024
    window: int = 8
    digested: bool = True  # check digests; False: integrity "size", within one user in `sim`
    trust_local: bool = False  # take finished files by name
    max_payload_bytes: int = 1 << 40
    max_streams: int = 256  # uploads at a time, and as many downloads
    max_streams_per_peer: int = 64
    window_bytes: int = 256 * 1024**2  # chunks under way of all uploads together; each has one chunk at least
    max_peers: int = 65536  # sessions, and Hellos that wait for theirs
    peer_outbox_messages: int = 1024  # for a peer whose socket is full; then it is dropped and comes again
    control_outbox_messages: int = 1024  # for a control process that is away; the oldest go, since all is asked again
    max_ended: int = 4096  # streams that ended lately, and what their peers were told
    stall_s: float = 30.0  # a stream without a new chunk for so long ends; its partial file stays
    resend_s: float = 10.0  # of downloads
    linger_s: float = 5.0  # how long a download that was sent whole waits for the peer's last grant
    hello_wait_s: float = 2.0  # a Hello whose session control has not announced waits so long
    repeat_s: float = 2.0  # questions to control are repeated
    retry_s: float = 1.0  # what refused peers are told to wait: for a free stream, after a stall
    superseded_s: float = 5.0  # and whose upload another one goes on with
    full_s: float = 10.0  # and while the disk is full
    corrupt_chunks: int = 3  # in a row that end an upload
    strikes: int = 64  # chunks nobody granted that end an upload, beyond one window
    faults_per_s: int = 100  # answers to peers that break the protocol
    keep_incoming_s: float = 86400.0  # partial files nobody came back for


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to a peer, or to the control process (route `CONTROL`)."""

    route: bytes
    message: Message
    tail: Buffer = b""
