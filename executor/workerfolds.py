"""What a worker process folds of its own tasks' results, before one of them has left it.

A result that is folded where it was made is neither encoded nor written nor read again: of hundreds of results one
partial goes to the agent. The agent knows of each of them from the worker's answers, and asks for the partial.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..serialization import spans
from ..serialization.digest import digest_buffers
from ..serialization.errors import FedloomError, MixedError
from ..serialization.fold import Fold, FoldPlan
from ..serialization.messages import INLINE_TOTAL_BYTES
from ..serialization.payload import EncodedModel, write_buffers
from .runs import MAX_PLANS, Key

#: Between a result's addition and its answer are microseconds.
_TOLD_S = 1.0


@dataclass(slots=True)
class _Open:
    fold: Fold
    keys: list[Key] = field(default_factory=list[Key])
    untold: int = 0  # how many of them the agent does not know of yet


@dataclass(frozen=True, slots=True)
class Made:
    """A partial that is to leave: in ``data`` where it is small, else in the file that was asked for."""

    keys: list[Key]
    id: str
    size: int
    digest: str
    data: bytes | None


class WorkerFolds:
    """A fold for each gather in hand. Thread-safe: the worker adds, its channel's thread takes what is to leave."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told = threading.Condition(self._lock)
        self._awaited = 0  # who wait for `told`
        self._plans: dict[str, bytes | FoldPlan] = {}  # read at the first use
        self._open: dict[str, _Open] = {}

    def plan(self, gather: str, plan: bytes) -> None:
        """By which results of this gather are added."""
        with self._lock:
            self._plans.pop(gather, None)
            self._plans[gather] = plan
            for old in list(self._plans)[:-MAX_PLANS]:
                if old not in self._open:
                    del self._plans[old]

    def add(self, gather: str, key: Key, result: EncodedModel, site: str, meta: Mapping[str, Any]) -> None:
        """Add a result.

        Raises:
            FoldError, LayoutError, PayloadError: as `Fold.add`; it is not in then.
        """
        self._add(gather, key, site, lambda fold: fold.add(result, site=site, meta=meta))

    def add_tensors(
        self, gather: str, key: Key, tensors: Mapping[Any, Any], site: str, meta: Mapping[str, Any]
    ) -> bool:
        """Add a result out of its tensors; False, and it is not in, where `Fold.add_tensors` does not take them."""
        return self._add(gather, key, site, lambda fold: fold.add_tensors(tensors, site=site, meta=meta))

    def _add(self, gather: str, key: Key, site: str, add: Callable[[Fold], bool | None]) -> bool:
        began = spans.start()
        with self._lock:
            entry = self._open.get(gather)
            if entry is None:
                entry = _Open(Fold(self._plan(gather)))
            try:
                if add(entry.fold) is False:
                    return False
            except FedloomError:
                raise
            except BaseException:  # a part of it may be in: what is here is as good as lost
                self._open.pop(gather, None)
                raise
            entry.keys.append(key)
            entry.untold += 1
            self._open[gather] = entry
        spans.end("fold", began, site=site, task=key[0])
        return True

    def _plan(self, gather: str) -> FoldPlan:
        plan = self._plans.get(gather)
        if plan is None:
            raise MixedError("too many gathers at a time: the plan by which it would be added is not kept")
        if isinstance(plan, bytes):
            plan = self._plans[gather] = FoldPlan.from_bytes(plan)
        return plan

    def told(self, gather: str) -> None:
        """The answer for a result that was added is on its way."""
        with self._lock:
            if (entry := self._open.get(gather)) is not None:
                entry.untold -= 1
            if self._awaited:
                self._told.notify_all()

    def take(self, gather: str, path: str, *, digest: bool) -> Made | None:
        """What was folded of a gather, which begins anew; None where that is nothing.

        Waits until the worker has told of all of it, so that the partial comes behind the answers of its tasks.

        Raises:
            OSError: the file cannot be written. What was folded is lost.
        """
        with self._told:
            while (entry := self._open.get(gather)) is not None and entry.untold > 0:
                self._awaited += 1
                self._told.wait(_TOLD_S)
                self._awaited -= 1
            if entry is None:
                return None
            del self._open[gather]
        began = spans.start()
        buffers, size = entry.fold.to_partial()
        found = digest_buffers(buffers) if digest else ""
        data = b"".join(buffers) if size <= INLINE_TOTAL_BYTES else None
        if data is None:
            with Path(path).open("wb", buffering=0) as file:
                write_buffers(file, buffers)
        spans.end("partial", began)
        return Made(entry.keys, f"p-{secrets.token_hex(16)}", size, found, data)

    def drop(self, gather: str) -> None:
        """What was folded of a gather is wanted no more."""
        with self._lock:
            self._open.pop(gather, None)
            self._plans.pop(gather, None)

    def keys(self, gather: str) -> list[Key]:
        """The attempts whose results are in hand."""
        with self._lock:
            entry = self._open.get(gather)
            return list(entry.keys) if entry is not None else []
