"""Payloads kept on disk by digest, so that a site, or a pool of them, fetches each one once. Bounded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import structlog

from ..serialization.errors import PayloadError
from ..serialization.messages import PayloadRef

log = structlog.get_logger(__name__)

#: ``fetch(ref, dest)``: a file of the broker's (mapped, not ours), ``dest`` itself filled, or bytes.
Fetch = Callable[[PayloadRef, Path], Path | bytes]


class PayloadCache:
    """Files named by payload id in one folder; the least recently used go when a new one would pass the bound.

    A file in use may be removed: whoever has mapped it keeps it. What was fetched before a restart is found again.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._pins: dict[str, int] = {}
        self._lock = threading.Lock()
        self._fetching: dict[str, threading.Event] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime):
            if path.name.endswith(".part") or not path.is_file():
                path.unlink(missing_ok=True)
            else:
                self._sizes[path.name] = path.stat().st_size
        self._evict(0)

    @property
    def bytes(self) -> int:
        """What the folder holds."""
        return sum(self._sizes.values())

    def fetch(self, ref: PayloadRef, fetch: Fetch, timeout_s: float = 3600.0) -> Path | bytes:
        """The payload, from here or through ``fetch``; who asks for one that is on its way waits for it. It is pinned
        until `unpin`.

        Raises:
            PayloadError: an id that is no file name, or it did not come in time. Whatever ``fetch`` raises.
        """
        if not ref.id or "/" in ref.id or ref.id.startswith("."):
            raise PayloadError(f"payload id {ref.id!r} is not a name")
        while True:
            with self._lock:
                if self._sizes.get(ref.id) == ref.size and (path := self._folder / ref.id).is_file():
                    self._sizes.move_to_end(ref.id)
                    self._pins[ref.id] = self._pins.get(ref.id, 0) + 1
                    return path
                other = self._fetching.get(ref.id)
                if other is None:
                    self._fetching[ref.id] = threading.Event()
                    break
            if not other.wait(timeout_s):
                raise PayloadError(f"payload {ref.id} of {ref.size} bytes did not come within {timeout_s:g} s")
        try:
            return self._fill(ref, fetch)
        finally:
            with self._lock:
                self._fetching.pop(ref.id).set()

    def _fill(self, ref: PayloadRef, fetch: Fetch) -> Path | bytes:
        path = self._folder / ref.id
        with self._lock:
            self._sizes.pop(ref.id, None)
            self._evict(ref.size)
        path.unlink(missing_ok=True)
        got = fetch(ref, path)
        if got != path:
            return got
        with self._lock:
            self._sizes[ref.id] = ref.size
            self._pins[ref.id] = self._pins.get(ref.id, 0) + 1
        return path

    def holds(self, got: object) -> bool:
        """Whether what `fetch` gave is a file of this cache, and so pinned."""
        return isinstance(got, Path) and got.parent == self._folder

    def unpin(self, id: str) -> None:
        """One user less; harmless for what is not here."""
        with self._lock:
            left = self._pins.get(id, 0) - 1
            if left > 0:
                self._pins[id] = left
            else:
                self._pins.pop(id, None)

    def _evict(self, coming: int) -> None:
        for id in list(self._sizes):
            if self.bytes + coming <= self._max_bytes:
                return
            if id in self._pins:
                continue
            del self._sizes[id]
            (self._folder / id).unlink(missing_ok=True)
            log.debug("payload_evicted", payload=id)
