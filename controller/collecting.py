"""A gather's results kept until it closes, for rounds that need all of them before the first can be used."""

from __future__ import annotations

import time
from pathlib import Path

import structlog

from ..serialization.errors import FedloomError, JobError
from ..serialization.feeder import open_source
from ..serialization.header import Header
from ..serialization.messages import Failure
from ..serialization.model import FLModel
from ..serialization.payload import Framework, decode_model, layout_of
from ..serialization.plain import model_of
from .federation import Federation
from .gather import Gather, Result

log = structlog.get_logger(__name__)

#: For so long uploads may wait for room in the spool before the round is given up: it keeps what it has until its end.
STUCK_S = 120.0

#: A tensor's dtype and shape, by name.
Layout = dict[str, tuple[str, tuple[int, ...]]]


class RoomWatch:
    """For how long uploads have waited for room without a result that came."""

    def __init__(self) -> None:
        self._since: float | None = None

    def moved(self) -> None:
        """A result has come."""
        self._since = None

    def stuck(self, waiting: int, now: float) -> bool:
        """Whether so many waiting uploads have waited too long."""
        if not waiting:
            self._since = None
            return False
        self._since = now if self._since is None else self._since
        return now - self._since > STUCK_S


class Collection:
    """The results of one gather, in the order of their sites' names, which does not depend on who came first.

    They stay in the spool: no checkpoint can stand for them. A process that takes the job over collects the same ones.
    """

    def __init__(self, fed: Federation, gather: Gather) -> None:
        self.refused: list[Failure] = []
        self._fed = fed
        self._gather = gather
        self._room = RoomWatch()

    def all(self) -> list[Result]:
        """Wait until the gather closes.

        Raises:
            GatherError: it failed.
            JobError: the spool is full of this round's results, and others cannot come.
        """
        results: list[Result] = []
        self._fed.mail.on_quiet = self._quiet
        try:
            for result in self._gather:
                self._room.moved()
                results.append(result)
        finally:
            self._fed.mail.on_quiet = None
        return sorted(results, key=lambda result: result.site)

    def _quiet(self) -> None:
        if self._room.stuck(self._fed.spool().waiting, time.monotonic()):
            raise JobError(
                f"round {self._gather.opening.round} needs all of its results before the first can be used (a custom"
                " aggregator, or a job without an initial model), and the broker's spool has no room for more: give it"
                " a larger quota, sample fewer sites, or use the weighted mean with a model"
            )

    def layout(self, result: Result) -> Layout:
        """The names, dtypes and shapes of a result's params.

        Raises:
            PayloadError, HeaderError: it cannot be read.
        """
        source = self._source(self._fed.filters.incoming(self._gather, result))
        return layout_of(Header((), {}, 0) if source is None else open_source(source)[0])

    def model(self, result: Result, framework: Framework = "numpy") -> FLModel:
        """A result as a model, in memory of its own.

        Raises:
            PayloadError, HeaderError: it cannot be read.
        """
        result = self._fed.filters.incoming(self._gather, result)
        source = self._source(result)
        if source is None:  # metrics alone
            return model_of(result.meta, None, None)
        return decode_model(source, framework=framework, copy=True, meta=result.meta)

    def _source(self, result: Result) -> Path | bytes | None:
        if result.payload is None:
            return result.inline or None
        return self._fed.payloads.local_path(result.payload) or self._fed.fetch(result.payload)

    def refuse(self, result: Result, error: FedloomError) -> None:
        """Leave a result out, and list it as its site's failure."""
        item = result.items[0]
        log.warning("result_refused", round=self._gather.opening.round, site=item.site, reason=str(error))
        refusal = Failure(item.task, item.site, "refused", str(error))
        self.refused.append(refusal)
        self._gather.seen.failures[item.task] = refusal


def difference(seen: Layout, ours: Layout, *, whole: bool, dtypes: bool) -> str:
    """What of a result's layout is not as wanted, up to three tensors; "" where all is.

    Args:
        seen: the result's.
        ours: what is wanted.
        whole: whether it must have every tensor.
        dtypes: whether dtypes must be the same too.
    """
    wrong = [f"{name!r} is unknown" for name in seen if name not in ours]
    wrong += [f"{name!r} is missing" for name in ours if whole and name not in seen]
    for name, (dtype, shape) in seen.items():
        if name in ours and (shape != ours[name][1] or (dtypes and dtype != ours[name][0])):
            wanted_dtype, wanted_shape = ours[name]
            wrong.append(f"{name!r} is {dtype}{list(shape)} and not {wanted_dtype}{list(wanted_shape)}")
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return "; ".join(wrong[:3]) + more
