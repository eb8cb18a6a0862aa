"""What a job process stores at the broker: each payload once, addressed by its content."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from ..broker.link import Link, Request
from ..serialization import spans
from ..serialization.digest import digest_buffers
from ..serialization.envelope import Buffer
from ..serialization.errors import FaultError, FedloomError
from ..serialization.foldwrite import WrittenModel
from ..serialization.messages import INLINE_BYTES, Claimed, CommitRef, PayloadId, PayloadRef, Put
from ..serialization.model import FLModel
from ..serialization.payload import encode_model

#: How often a model is written for a co-located broker that loses it.
_WRITES = 5
_PUT_S = 3600.0


class Payloads:
    """A job's payloads on their way to the broker.

    A small one is under way when its reference is returned: whatever is sent behind it finds it there, and `settle`
    waits for the broker's word that it is stored. A large one is stored when this returns.

    Args:
        link: to the broker.
        claimed: whose payloads these are.
        timeout_s: how long the broker may be away.
    """

    def __init__(self, link: Link, claimed: Claimed, timeout_s: float) -> None:
        self._link = link
        self._job, self._claim = claimed.job, claimed.claim
        self._timeout_s = timeout_s
        #: what the broker keeps at least until the next commit, so that none is sent twice
        self._kept: dict[PayloadId, PayloadRef] = {}
        self._under_way: list[tuple[PayloadRef, Request]] = []
        self.keep(claimed.commit)

    def keep(self, commit: CommitRef | None) -> None:
        """After a commit the broker lets go of all that it does not name."""
        refs = (commit.model, commit.state, commit.best) if commit else ()
        self._kept = {ref.id: ref for ref in refs if ref is not None}

    def model(self, model: FLModel) -> PayloadRef:
        """A model; what is there already is hashed, not sent."""
        began = spans.start()
        encoded = encode_model(model)
        digest = encoded.digest()
        spans.end("encode", began)
        return self._put(PayloadRef(PayloadId(f"b3-{digest}"), encoded.size, digest), encoded.buffers)

    def blob(self, data: bytes) -> PayloadRef:
        """Bytes that are no tensors."""
        digest = digest_buffers([data])
        return self._put(PayloadRef(PayloadId(f"b3-{digest}"), len(data), digest, "blob"), [data])

    def put(self, buffers: Sequence[Buffer]) -> PayloadRef:
        """A tensors payload's own bytes."""
        digest = digest_buffers(buffers)
        size = sum(memoryview(buffer).nbytes for buffer in buffers)
        return self._put(PayloadRef(PayloadId(f"b3-{digest}"), size, digest), buffers)

    def partial(self, buffers: Sequence[Buffer], size: int) -> PayloadRef:
        """An aggregate: a checkpoint."""
        ref = PayloadRef(PayloadId(f"p-{secrets.token_hex(16)}"), size, digest_buffers(buffers))
        return self._link.put(ref, buffers, job=self._job, claim=self._claim)

    def written(self, write: Callable[[int], WrittenModel]) -> PayloadRef | None:
        """Have a model written to a file that the broker takes as it is: its payload; None if the broker is elsewhere.

        Args:
            write: writes the payload to an empty file that is open for writing; again where a broker has lost it.
        """
        if self._link.local is None:
            return None
        for left in reversed(range(_WRITES)):
            name = f"{secrets.token_hex(16)}.up"
            path = self._link.local.incoming_path(name)
            try:
                return self._hand_over(name, path, write)
            except FaultError as error:
                if error.code != "missing" or not left:
                    raise  # else a broker took it and died before it had a row for it
            finally:
                path.unlink(missing_ok=True)  # there still where the broker has not taken it, or has it already
        raise AssertionError(write)

    def _hand_over(self, name: str, path: Path, write: Callable[[int], WrittenModel]) -> PayloadRef:
        began = spans.start()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            model = write(fd)
        finally:
            os.close(fd)
        spans.end("finish", began)
        ref = PayloadRef(PayloadId(f"b3-{model.digest}"), model.size, model.digest)
        if ref.id not in self._kept:
            began = spans.start()
            self._link.put_local(ref, name, timeout_s=_PUT_S, job=self._job, claim=self._claim)
            self._kept[ref.id] = ref
            spans.end("put", began)
        return ref

    def _put(self, ref: PayloadRef, buffers: Sequence[Buffer]) -> PayloadRef:
        if ref.id in self._kept:
            return self._kept[ref.id]
        if ref.size <= INLINE_BYTES:
            put = Put(payload=ref, job=self._job, claim=self._claim, ref=self._link.next_ref())
            self._under_way.append((ref, self._link.ask(put, b"".join(buffers), more=True)))
        else:
            began = spans.start()
            self._link.put(ref, buffers, job=self._job, claim=self._claim)
            spans.end("put", began)
        self._kept[ref.id] = ref
        return ref

    def settle(self) -> None:
        """Wait until all that is under way is stored.

        Raises:
            FaultError: the broker refused one. LinkError: there is no broker any more.
        """
        under_way, self._under_way = self._under_way, []
        failed: FedloomError | None = None
        for ref, request in under_way:
            try:
                self._link.answer(request, self._timeout_s)
            except FedloomError as error:
                self._kept.pop(ref.id, None)
                failed = failed or error
        if failed is not None:
            raise failed

    def local_path(self, ref: PayloadRef) -> Path | None:
        """Where a payload can be mapped, if this process is co-located with the broker's spool."""
        if self._link.local is None:
            return None
        path = self._link.local.payload_path(ref.id)
        return path if path.is_file() else None
