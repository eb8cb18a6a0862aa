"""Payloads on their way in: from a peer's `Put` to the `Stored` that the control process allows. No sockets, no clock.

The life of an upload::

    ADMITTING   control was asked: may this payload come? (Grant: yes, Stored: it is here, Abort: no)
    VERIFYING   a partial file is read again, some blocks a turn
    OPEN        chunks come under grants
    CHECKING    a file that is whole already is digested, some blocks a turn: a local peer's, or one that lost its row
    SYNCING     whole and right; the shell makes it durable and renames it
    LANDED      control was told and writes the row; its Stored goes to the peer
    WAITING     another stream's upload of the same payload is SYNCING or LANDED: it answers both

A file belongs to a payload id, not to a stream, so whoever puts that id goes on where the last one stopped. The newest
Put takes the file over. Questions to control carry keys of our own, not the peers' stream ids, and are repeated until
answered.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import structlog

from ..serialization.envelope import Buffer
from ..serialization.errors import PayloadError, StorageError
from ..serialization.faultpoints import fault_point
from ..serialization.messages import Abort, Chunk, Finish, Grant, Message, Put, Stored
from ..serialization.stream import ChunkPlan, Receiver
from .bounds import Bounds
from .incoming import FileCheck, IncomingFile
from .spool import BLOCKS, PART, Landing, Spool
from .transferlimits import CONTROL, Limits, Outgoing
from .upload import Phase, Upload

__all__ = ["Phase", "Uploads"]

log = structlog.get_logger(__name__)

_CONTENT = "b3-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Uploads:
    """All uploads of the data process.

    Args:
        spool: where payloads lie.
        limits: bounds and timers.
        send: takes every `Outgoing`.
        land: takes every `Landing` with its key; `landed` is to be called once it is durable.
        next_epoch: rises with every call, over restarts too.
        boot: makes keys differ over restarts; hex digits.
    """

    def __init__(
        self,
        spool: Spool,
        limits: Limits,
        *,
        send: Callable[[Outgoing], None],
        land: Callable[[str, Landing], None],
        next_epoch: Callable[[], int],
        boot: str,
        bounds: Bounds | None = None,
    ) -> None:
        self._spool = spool
        self._limits = limits
        self._send = send
        self._land = land
        self._next_epoch = next_epoch
        self._boot = boot[:16]
        self._bounds = bounds or Bounds()
        self._count = 0
        self._by_key: dict[str, Upload] = {}
        self._by_stream: dict[tuple[bytes, str], Upload] = {}
        self._by_payload: dict[str, Upload] = {}  # who has the file

    def __len__(self) -> int:
        return len(self._by_key)

    def count(self, route: bytes) -> int:
        """How many uploads this peer has."""
        return sum(upload.route == route for upload in self._by_key.values())

    @property
    def most_of_a_peer(self) -> int:
        """How many uploads the peer has that has most."""
        return max(Counter(upload.route for upload in self._by_key.values()).values(), default=0)

    @property
    def window_bytes(self) -> int:
        """What may be under way by the grants."""
        receivers = (upload.receiver for upload in self._by_payload.values())
        return sum(r.granted * r.plan.chunk_bytes for r in receivers if r is not None)

    def names_in_use(self) -> set[str]:
        """The files of ``incoming/`` that uploads stand on."""
        names = {upload.put.local for upload in self._by_key.values() if upload.put.local}
        for payload in self._by_payload:
            names |= {payload + PART, payload + BLOCKS}
        return names

    # ------------------------------------------------------------ from peers

    def on_put(self, route: bytes, put: Put, now: float, session: str = "") -> None:
        """A peer's Put, new or repeated; control is told of the session, since it knows what that may put."""
        known = self._by_stream.get((route, put.stream))
        if known is not None and known.payload == put.payload and known.put.local == put.local:
            known.heard_at = now
            if known.phase is Phase.OPEN and known.receiver is not None:
                self._grant(known, known.receiver.resume(self._next_epoch(), now))
            return
        if known is not None:
            self._abandon(known)
        refusal = self._refusal(route, put)
        if refusal is not None:
            self._send(Outgoing(route, refusal))
            return
        self._count += 1
        key = f"{self._boot:0>16}{self._count:016x}"
        upload = Upload(key, route, put, Phase.ADMITTING, asked_at=now, heard_at=now, session=session)
        self._by_key[key] = upload
        self._by_stream[route, put.stream] = upload
        self._ask(upload, now)

    def on_chunk(self, route: bytes, chunk: Chunk, data: Buffer, now: float) -> bool:
        """A chunk; False when there is no such stream."""
        upload = self._by_stream.get((route, chunk.stream))
        if upload is None:
            return False
        receiver, file = upload.receiver, upload.file
        if upload.phase is not Phase.OPEN or receiver is None or file is None:
            return True  # on its way since before; the Put that was repeated gets its answer
        upload.heard_at = now
        arrival = receiver.on_chunk(chunk.index, data, chunk.crc32, now)
        if arrival.accepted:
            try:
                file.append(data)
            except OSError as error:
                self._disk_failed(upload, error)
                return True
            fault_point("data.mid_upload")
        elif receiver.corrupt >= self._limits.corrupt_chunks:
            self._end(upload, "corrupt", f"{receiver.corrupt} chunks in a row do not match their checksum")
            return True
        elif receiver.strikes >= self._limits.strikes + self._limits.window:
            self._end(upload, "protocol", "chunks beyond the grant, or of a length that is not the plan's")
            return True
        if arrival.grant:
            receiver.window = self._window()
            self._grant(upload, receiver.grant(now))
        self._finish_if_whole(upload)
        return True

    def on_finish(self, route: bytes, finish: Finish, now: float) -> bool:
        """The sender says that was all; False when there is no such stream."""
        upload = self._by_stream.get((route, finish.stream))
        if upload is None:
            return False
        upload.heard_at = now
        upload.finish = finish
        if upload.phase is Phase.OPEN and upload.receiver is not None:
            if not upload.receiver.complete:
                self._grant(upload, upload.receiver.grant(now))
            self._finish_if_whole(upload)
        return True

    def on_abort(self, route: bytes, stream: str) -> bool:
        """The sender gives it up; the partial file stays for another try."""
        upload = self._by_stream.get((route, stream))
        if upload is not None:
            self._abandon(upload)
        return upload is not None

    def lost(self, route: bytes) -> None:
        """The peer is gone."""
        for upload in [u for u in self._by_key.values() if u.route == route]:
            self._abandon(upload)

    # ------------------------------------------------------------ from control

    def on_control(self, message: Grant | Stored | Abort, now: float) -> None:
        """Control's answer to a question of ours; unknown keys are answers to what is over."""
        upload = self._by_key.get(message.stream)
        if upload is None:
            return
        match message:
            case Grant():
                if upload.phase is Phase.ADMITTING:
                    try:
                        self._admitted(upload, now)
                    except OSError as error:
                        self._disk_failed(upload, error)
            case Stored():
                if upload.phase in (Phase.ADMITTING, Phase.LANDED):
                    final = message.payload or upload.final or upload.payload
                    for one in (upload, *upload.waiters):
                        self._tell(one, Stored(stream=one.put.stream, ref=one.put.ref, payload=final))
                        self._close(one)
                    if upload.put.local and upload.final is None:
                        self._spool.local_path(upload.put.local).unlink(missing_ok=True)
            case Abort():
                if not message.retry_after_s:  # nobody may go on with it
                    self._drop(upload)
                self._end(upload, message.code, message.reason, message.retry_after_s)

    # ------------------------------------------------------------ from the shell

    def landed(self, key: str, now: float, *, gone: bool = False) -> None:
        """The file is durable under its id; or ``gone``: somebody took it away before."""
        upload = self._by_key.get(key)
        if upload is not None and gone:
            self._end(upload, "missing", "the payload's file was taken out of the spool's incoming folder")
            return
        fault_point("data.after_file_before_row")
        if upload is not None:
            upload.phase = Phase.LANDED
            self._ask(upload, now)

    def tick(self, now: float) -> None:
        """Repeat what was not answered, and end what stands still."""
        limits = self._limits
        for upload in list(self._by_key.values()):
            if upload.phase in (Phase.ADMITTING, Phase.LANDED):
                if now >= upload.asked_at + limits.repeat_s:
                    self._ask(upload, now)
            elif upload.phase is Phase.OPEN and upload.receiver is not None:
                silent = upload.receiver.complete and now >= upload.heard_at + limits.stall_s
                if silent or upload.receiver.stalled(now):
                    self._end(upload, "stall", f"nothing new came for {limits.stall_s:g} s", limits.retry_s)
                elif upload.receiver.due(now):
                    self._grant(upload, upload.receiver.grant(now))

    def work(self, max_bytes: int, now: float) -> int:
        """Read on in files that are verified or checked, about ``max_bytes``; returns the bytes read."""
        total = 0
        for upload in self._reading():
            try:
                if upload.phase is Phase.VERIFYING and upload.file is not None:
                    total += upload.file.verify(max_bytes - total)
                    upload.heard_at = now
                    if not upload.file.verifying:
                        self._open(upload, now)
                elif upload.check is not None:
                    count = upload.check.step(max_bytes - total)
                    total += count
                    if count == 0:
                        self._checked(upload, upload.check, now)
            except OSError as error:
                self._disk_failed(upload, error)
            if total >= max_bytes:
                break
        return total

    @property
    def working(self) -> bool:
        """`work` has something to do."""
        return next(self._reading(), None) is not None

    def _reading(self) -> Iterator[Upload]:
        found = [u for u in self._by_payload.values() if u.phase in (Phase.VERIFYING, Phase.CHECKING)]
        return iter(found)

    # ------------------------------------------------------------ steps

    def _refusal(self, route: bytes, put: Put) -> Abort | None:
        limits = self._limits

        def no(code: str, reason: str, retry_after_s: float = 0.0) -> Abort:
            return Abort(put.stream, code, reason[:1024], retry_after_s)

        payload = put.payload
        try:
            self._spool.path(payload.id)
            if put.local:
                self._spool.local_path(put.local)
        except PayloadError as error:
            return no("name", str(error))
        if put.local and not limits.trust_local:
            return no("not_local", "this broker takes no files by name: send chunks")
        if payload.size > limits.max_payload_bytes:
            self._bounds.reached("max_payload_bytes")
            text = f"payload of {payload.size} bytes; at most {limits.max_payload_bytes} (max_payload_bytes)"
            return no("size", text)
        if payload.id.startswith(_CONTENT) and payload.digest and payload.id[len(_CONTENT) :] != payload.digest:
            return no("digest", f"payload {payload.id} is named by another digest than its own, {payload.digest}")
        for bound, count in (("max_streams", len(self)), ("max_streams_per_peer", self.count(route))):
            most = int(getattr(limits, bound))
            if count >= most:
                self._bounds.reached(bound)
                return no("busy", f"{count} uploads are open; at most {most} ({bound}): wait", limits.retry_s)
        return None

    def _admitted(self, upload: Upload, now: float) -> None:
        payload = upload.payload
        old = self._by_payload.get(payload.id)
        if old is not None and old.phase in (Phase.SYNCING, Phase.LANDED):
            upload.phase = Phase.WAITING
            old.waiters.append(upload)
            return
        file = self._take_over(old, upload.put) if old is not None else None
        self._by_payload[payload.id] = upload
        if upload.put.local and self._check_local(upload, now):
            return
        if self._spool.exists(payload.id, payload.size):  # a crash came between the file and its row
            fd = os.open(self._spool.path(payload.id), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._start_check(upload, FileCheck(fd, payload.size, None), now)
            return
        if upload.put.local:
            self._end(upload, "missing", f"there is no file {upload.put.local!r} in the spool's incoming folder")
            return
        upload.file = file or IncomingFile(self._spool, payload, digested=self._limits.digested)
        if upload.file.verifying:
            upload.phase = Phase.VERIFYING
        else:
            self._open(upload, now)

    def _take_over(self, old: Upload, put: Put) -> IncomingFile | None:
        """End the older upload of this payload; its open file, where chunks of the same bytes go on with it."""
        file = None
        if old.file is not None and old.file.matches(put.payload) and not old.put.local and not put.local:
            file, old.file = old.file, None
        self._end(old, "superseded", "a newer upload of this payload goes on with it", self._limits.superseded_s)
        return file

    def _check_local(self, upload: Upload, now: float) -> bool:
        """Begin with the file of a local peer; False when there is none."""
        name, payload = upload.put.local, upload.payload
        try:
            fd = self._spool.open_incoming(name, create=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._end(upload, "not_regular", f"incoming file {name!r} cannot be opened: {error.strerror}")
            return True
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            os.close(fd)
            self._end(upload, "not_regular", f"incoming file {name!r} is not a regular file")
        elif info.st_size != payload.size:
            os.close(fd)
            self._end(upload, "size", f"incoming file {name!r} has {info.st_size} bytes; its Put says {payload.size}")
        else:
            self._start_check(upload, FileCheck(fd, payload.size, name), now)
        return True

    def _start_check(self, upload: Upload, check: FileCheck, now: float) -> None:
        upload.check = check
        upload.phase = Phase.CHECKING
        if not self._limits.digested:
            self._checked(upload, check, now)

    def _checked(self, upload: Upload, check: FileCheck, now: float) -> None:
        wanted = upload.payload.digest or _named_digest(upload.payload.id)
        found = check.hexdigest() if self._limits.digested else upload.payload.digest
        if (found == "" and self._limits.digested) or wanted not in ("", found):
            if check.name is None:  # not ours to keep: without a row nobody reads it, and the next Put sends it anew
                self._spool.path(upload.payload.id).unlink(missing_ok=True)
                self._end(upload, "corrupt", "the payload's file was damaged: send it again", self._limits.retry_s)
            else:
                self._spool.local_path(check.name).unlink(missing_ok=True)
                self._end(upload, "corrupt", _corrupt(found, wanted))
            return
        upload.check = None
        upload.final = replace(upload.payload, digest=found)
        if check.name is None:
            os.close(check.fd)
            upload.phase = Phase.LANDED  # it was there before, only its row is missing
            self._ask(upload, now)
        else:
            self._start_sync(upload, Landing(check.name, upload.payload.id, check.fd))

    def _open(self, upload: Upload, now: float) -> None:
        assert upload.file is not None
        plan = ChunkPlan(upload.payload.size, self._limits.chunk_bytes)
        start = plan.whole_chunks(upload.file.size)
        upload.file.cut(min(start * plan.chunk_bytes, plan.size))
        upload.receiver = Receiver(
            plan, self._window(), self._next_epoch(), start, stall_s=self._limits.stall_s, now=now
        )
        upload.phase = Phase.OPEN
        if start:
            log.info("upload_resumed", payload=upload.payload.id, chunk=start, chunks=plan.count)
        self._grant(upload, upload.receiver.grant(now))
        self._finish_if_whole(upload)

    def _window(self) -> int:
        """The chunks that a grant may be ahead: all uploads share ``window_bytes``, and each may send one at least."""
        limits = self._limits
        share = limits.window_bytes // limits.chunk_bytes // max(1, len(self._by_payload))
        if share < limits.window:
            self._bounds.reached("window_bytes")
        return max(1, min(limits.window, share))

    def _finish_if_whole(self, upload: Upload) -> None:
        file, receiver = upload.file, upload.receiver
        if upload.finish is None or file is None or receiver is None or not receiver.complete:
            return
        found = file.hexdigest()
        for wanted in (upload.payload.digest, _named_digest(upload.payload.id), upload.finish.digest):
            if self._limits.digested and wanted not in ("", found):
                file.drop()
                upload.file = None
                self._end(upload, "corrupt", _corrupt(found, wanted))
                return
        upload.final = replace(upload.payload, digest=found or upload.finish.digest)
        upload.file = upload.receiver = None
        self._start_sync(upload, Landing(file.name, upload.payload.id, file.release()))

    def _start_sync(self, upload: Upload, landing: Landing) -> None:
        upload.phase = Phase.SYNCING
        self._land(upload.key, landing)

    def _ask(self, upload: Upload, now: float) -> None:
        """Put the question, or report the landed payload, to control."""
        upload.asked_at = now
        question = replace(upload.put, stream=upload.key)
        if upload.phase is Phase.LANDED:
            landed = replace(question, payload=upload.final or upload.payload, local="landed")
            self._send(Outgoing(CONTROL, landed))  # its session may be over; the attempt or claim still decides
        else:
            self._send(Outgoing(CONTROL, question, upload.session.encode()))

    def _grant(self, upload: Upload, fields: tuple[int, int, int]) -> None:
        self._tell(upload, Grant(upload.put.stream, *fields))

    def _tell(self, upload: Upload, message: Message) -> None:
        if upload.route is not None:
            self._send(Outgoing(upload.route, message))

    def _abandon(self, upload: Upload) -> None:
        """The peer needs no answer any more. What is whole is still brought to its row."""
        if upload.phase in (Phase.SYNCING, Phase.LANDED):
            if upload.route is not None:
                self._by_stream.pop((upload.route, upload.put.stream), None)
            upload.route = None
        else:
            self._close(upload)
            upload.route = None

    def _disk_failed(self, upload: Upload, error: OSError) -> None:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            self._end(upload, "busy", "too many open files: wait for a stream to end", self._limits.retry_s)
            return
        if error.errno not in _FULL:
            raise StorageError(f"payload {upload.payload.id}: {error}") from error
        log.error("spool_full", payload=upload.payload.id, error=str(error))
        self._end(upload, "full", f"the spool's disk is full: {error.strerror}", self._limits.full_s)

    def _end(self, upload: Upload, code: str, reason: str, retry_after_s: float = 0.0) -> None:
        """Abort it; what came of it stays for a resume unless it was dropped before."""
        log.info("upload_ended", payload=upload.payload.id, code=code, reason=reason)
        for one in (upload, *upload.waiters):
            self._tell(one, Abort(one.put.stream, code, reason[:1024], retry_after_s))
            self._close(one)

    def _drop(self, upload: Upload) -> None:
        """Remove what an earlier upload of this payload has left, unless another one goes on with it."""
        if self._by_payload.get(upload.payload.id) in (None, upload) and upload.file is None:
            for ending in (PART, BLOCKS):
                self._spool.incoming_path(upload.payload.id + ending).unlink(missing_ok=True)

    def _close(self, upload: Upload) -> None:
        if upload.file is not None:
            upload.file.close()
            upload.file = None
        if upload.check is not None:
            os.close(upload.check.fd)
            upload.check = None
        self._by_key.pop(upload.key, None)
        if upload.route is not None and self._by_stream.get((upload.route, upload.put.stream)) is upload:
            del self._by_stream[upload.route, upload.put.stream]
        if self._by_payload.get(upload.payload.id) is upload:
            del self._by_payload[upload.payload.id]


def _named_digest(payload: str) -> str:
    return payload[len(_CONTENT) :] if payload.startswith(_CONTENT) else ""


def _corrupt(found: str, wanted: str) -> str:
    return f"the bytes' digest is {found or 'of another length'}, not {wanted}"
