"""A client of the broker: submit jobs, watch them, and fetch what came of them."""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, cast

from ..serialization.archive import unpack_archive, write_archive
from ..serialization.codec import decode_fields, unpack
from ..serialization.envelope import Buffer
from ..serialization.errors import CodecError, FaultError, FedloomError, JobError, LinkError, LinkTimeout
from ..serialization.jobmessages import START_FEATURE
from ..serialization.jobspec import JobSpec
from ..serialization.messages import Answer, Ask, Hello, JobId, PayloadId, PayloadRef, SubmitJob, Welcome
from ..serialization.scratch import Scratch
from .intake import job_folder

if TYPE_CHECKING:
    from ..broker.link import Link

DEFAULT_BROKER = "tcp://127.0.0.1:7600"
_PAGE = 1000
_POLL_S = 0.3
_MAX_ANSWER_BYTES = 1024 * 1024
_HALVES = frozenset({"F16", "BF16"})


@dataclass(frozen=True, slots=True)
class JobInfo:
    """What the broker knows of a job. ``round`` counts committed rounds; times are seconds since 1970."""

    job_id: str
    name: str = ""
    status: str = ""
    reason: str = ""
    round: int = 0
    rounds: int = 0
    sites: tuple[str, ...] = ()
    submitted_at: float | None = None
    ended_at: float | None = None
    model: PayloadRef | None = None
    best: PayloadRef | None = None
    archive: PayloadRef | None = None
    raw: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)

    @property
    def ended(self) -> bool:
        """Whether the job is over."""
        return self.status.startswith("FINISHED")

    @staticmethod
    def of(data: dict[str, Any]) -> JobInfo:
        """Out of an answer's map."""
        commit = cast("dict[str, Any]", data.get("commit") or {})
        sites = cast("list[Any]", data.get("sites") or [])
        return JobInfo(
            job_id=str(data.get("job_id", "")),
            name=str(data.get("name", "")),
            status=str(data.get("status", "")),
            reason=str(data.get("reason") or ""),
            round=int(data.get("round") or 0),
            rounds=int(data.get("rounds") or 0),
            sites=tuple(str(site) for site in sites),
            submitted_at=data.get("submitted_at"),
            ended_at=data.get("ended_at"),
            model=_ref(commit.get("model")),
            best=_ref(commit.get("best")),
            archive=_ref(data.get("archive")),
            raw=data,
        )

    def to_json(self) -> dict[str, Any]:
        """As `fedloom job status --json` prints it."""
        return {
            "job_id": self.job_id,
            "name": self.name,
            "status": self.status,
            "reason": self.reason,
            "round": self.round,
            "rounds": self.rounds,
            "sites": list(self.sites),
            "submitted_at": self.submitted_at,
            "ended_at": self.ended_at,
        }


class _Link(Protocol):
    """The part of `broker.link.Link` that a client uses."""

    @property
    def welcome(self) -> Welcome | None: ...
    def start(self, timeout_s: float = 30.0) -> Any: ...
    def next_ref(self) -> int: ...
    def request(self, message: Any, tail: Buffer = b"", timeout_s: float = 60.0) -> tuple[Any, Buffer]: ...
    def put(self, ref: PayloadRef, source: Path, *, timeout_s: float = 3600.0) -> PayloadRef: ...
    def fetch(self, ref: PayloadRef, timeout_s: float = 3600.0, dest: Path | None = None) -> Path | bytes: ...
    def close(self, reason: str = "") -> None: ...


class JobClient:
    """A connection to the broker for people and programs that run jobs. Use it as a context manager.

    Args:
        endpoint: the broker's control endpoint; default ``FEDLOOM_BROKER``, else this machine's port 7600.
        connect_s: seconds to wait for the broker's first answer.
        timeout_s: seconds to wait for each later answer, and for a broker that is gone to be back.
        link: an existing link to use instead of a new one; it is left open.

    Raises:
        LinkError: the broker cannot be reached.
        FaultError: it refused this client.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        connect_s: float = 10.0,
        timeout_s: float = 60.0,
        link: _Link | Link | None = None,
    ) -> None:
        self.endpoint = endpoint or os.environ.get("FEDLOOM_BROKER") or DEFAULT_BROKER
        self._timeout_s = timeout_s
        self._never = threading.Event()
        self._owned = link is None
        self._link: _Link = cast("_Link", link) if link is not None else self._connect(connect_s)

    def _connect(self, connect_s: float) -> _Link:
        from ..broker.link import Link

        if "://" not in self.endpoint:
            raise JobError(f"broker {self.endpoint!r}; an endpoint such as {DEFAULT_BROKER} belongs here")
        token = secrets.token_hex(8)
        hello = Hello(node=f"client/{token}", role="client", boot=secrets.token_hex(16))
        link = Link(self.endpoint, hello, give_up_s=max(connect_s, self._timeout_s))
        try:
            link.start(connect_s)
        except LinkTimeout as error:  # not a wait of the user's that ended, but a broker that is not there
            raise LinkError(str(error)) from None
        return cast("_Link", link)

    def close(self) -> None:
        """End the connection; jobs go on."""
        if self._owned:
            self._link.close("done")

    def __enter__(self) -> JobClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------ jobs

    def is_of(self, info: JobInfo, job: Path) -> bool:
        """Whether a job was submitted with exactly what this folder holds now."""
        from ..serialization.digest import digest_file

        with Scratch("compare") as temporary:
            archive = temporary / "job.tar"
            with archive.open("wb") as file:
                write_archive(job, file)
            return info.archive is not None and info.archive.digest == digest_file(archive)

    def submit(self, job: str | Path, *, token: str = "", start: str = "") -> str:
        """Submit a job folder, or an archive of one, and return the job's id.

        Args:
            job: the folder, as `recipe.export` writes it; one of NVFLARE's is converted on the way.
            token: the same token twice submits the job once.
            start: a job that has ended, behind whose last commit this one goes on.

        Raises:
            JobError: the folder is not a job.
            FaultError: the broker refused it.
        """
        from ..serialization.digest import digest_file

        if start and not (self._link.welcome and START_FEATURE in self._link.welcome.features):
            raise FaultError(
                "too_old", f"the broker is older than this client and cannot start behind {start}'s rounds"
            )
        job = Path(job).expanduser()
        with Scratch("submit") as temporary, ExitStack() as stack:
            archive = job
            given = _only_folder(job, temporary / "job") if job.is_file() else job
            folder = stack.enter_context(job_folder(given))
            spec = JobSpec.load(folder)
            if not job.is_file() or folder != given:
                archive = temporary / "job.tar"
                with archive.open("wb") as file:
                    write_archive(folder, file)
            digest = digest_file(archive)
            ref = PayloadRef(PayloadId(f"b3-{digest}"), archive.stat().st_size, digest, "blob")
            self._link.put(ref, archive)
            answer = self._ask_broker(
                SubmitJob(
                    ref=self._link.next_ref(),
                    token=token or secrets.token_hex(16),
                    name=spec.name,
                    archive=ref,
                    start=JobId(start),
                    meta={
                        "min_clients": spec.min_clients,
                        "num_rounds": spec.num_rounds,
                        "rounds": spec.num_rounds,
                        "seed": spec.seed,
                        **_model_bytes(spec, folder),
                    },
                )
            )
        return str(answer["job_id"])

    def clone(self, job_id: str) -> str:
        """Submit a job that the broker knows once more, from its start; returns the new job's id.

        Raises:
            FaultError: no such job, or the broker refused it.
        """
        with self._archive_of(self.info(job_id)) as archive:
            return self.submit(archive)

    def resume(self, job_id: str, job: str | Path | None = None) -> str:
        """Let a job that failed or was aborted go on behind its last committed round, as a new job; returns its id.

        The rounds committed before are the new job's too. What the sites kept in their own state went with the old job.

        Args:
            job: a job folder to go on with, such as the same one with its fault mended; default: the job as it was.

        Raises:
            FaultError: no such job, it has not ended, or (without ``job``) there is nothing left to do.
        """
        info = self.info(job_id)
        if job is not None:
            return self.submit(job, start=job_id)
        if info.status == "FINISHED:COMPLETED":
            text = f"job {job_id} has done all of its {info.rounds} rounds: name a job folder with more, or clone it"
            raise FaultError("completed", text)
        with self._archive_of(info) as archive:
            return self.submit(archive, start=job_id)

    @contextmanager
    def _archive_of(self, info: JobInfo) -> Generator[Path]:
        if info.archive is None:
            raise FaultError("unexpected", f"the broker's answer names no archive of job {info.job_id}")
        with Scratch("again") as temporary:
            yield self.fetch(info.archive, temporary / "job.tar")

    def info(self, job_id: str, *, sites: bool = True) -> JobInfo:
        """What the broker knows of a job; of a large one its sites are most of it.

        Raises:
            FaultError: no such job.
        """
        return JobInfo.of(self._ask("job" if sites else "status", job_id))

    def jobs(self) -> list[JobInfo]:
        """All jobs that the broker knows, newest last."""
        return [JobInfo.of(item) for item in self._pages("jobs", "jobs", "", 0)]

    def wait(
        self, job_id: str, timeout_s: float | None = None, on_change: Callable[[JobInfo], None] | None = None
    ) -> JobInfo:
        """Wait for a job's end; ``on_change`` sees each new status or round.

        Raises:
            LinkTimeout: it did not end within ``timeout_s``.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        seen: tuple[str, int] | None = None
        while True:
            info = self.info(job_id, sites=False)
            if on_change is not None and seen != (info.status, info.round):
                seen = (info.status, info.round)
                on_change(info)
            if info.ended:
                return self.info(job_id)
            left = _POLL_S if deadline is None else min(_POLL_S, deadline - time.monotonic())
            if left <= 0:
                at = f"{info.status}, round {info.round} of {info.rounds}"
                raise LinkTimeout(f"job {job_id} has not ended within {timeout_s:g} s: {at}")
            self._never.wait(left)

    def abort(self, job_id: str) -> str:
        """End a job; returns its status then."""
        return str(self._ask("abort", job_id).get("status", ""))

    def letters(self, job_id: str) -> list[dict[str, Any]]:
        """A job's dead letters, the oldest first: tasks that were given up, and neither retried nor dropped since.

        Each has ``letter`` (its number), ``task``, ``site``, ``name``, ``round``, ``step``, ``attempts``, ``at``,
        ``code``, ``text`` (the site's own error, at most 4096 characters) and ``open``: whether it may be retried.
        """
        return list(self._pages("letters", "letters", job_id, 0))

    def retry(self, job_id: str, letter: int) -> None:
        """Queue the task of a dead letter again, with fresh attempts.

        Raises:
            FaultError: ``ended`` (resume the job), ``step_closed``, ``not_dead``, ``unknown_letter``.
        """
        self._ask("retry", job_id, letter)

    def drop(self, job_id: str, letter: int) -> None:
        """Take a dead letter off the list: the task stays failed.

        Raises:
            FaultError: ``not_dead``, ``unknown_letter``.
        """
        self._ask("drop", job_id, letter)

    def events(self, job_id: str, after: int = 0) -> Iterator[dict[str, Any]]:
        """What was kept about a job: logs, failures, changes, in order; those behind number ``after``."""
        yield from self._pages("events", "events", job_id, after)

    def follow(self, job_id: str, after: int = 0) -> Iterator[dict[str, Any]]:
        """The same, and what is added until the job has ended."""
        while True:
            # asked first: what was kept before the end comes with the next pages
            ended = self.info(job_id, sites=False).ended
            for event in self.events(job_id, after):
                after = int(event.get("seq") or after)
                yield event
            if ended:
                return
            self._never.wait(_POLL_S)

    def rounds(self, job_id: str, after: int = 0) -> list[dict[str, Any]]:
        """The records of a job's committed rounds; those behind the first ``after``."""
        return list(self._pages("rounds", "rounds", job_id, after))

    def sites(self) -> list[dict[str, Any]]:
        """The sites that the broker knows: name, live, node."""
        return list(self._pages("sites", "sites", "", 0))

    def broker(self) -> dict[str, Any]:
        """How full the broker is: ``spool``, ``sessions``, ``jobs``, and ``bounds`` (`docs/bounds.md`)."""
        return self._ask("broker")

    def download(self, job_id: str, dest: str | Path, *, export: bool = False) -> Path:
        """Write the job's result folder (see `recipe.results`).

        Args:
            export: hand what was logged to the trackers that the job names (MLflow, Weights & Biases) as well.

        Raises:
            JobError: ``dest`` holds something that fedloom did not make.
        """
        from .results import write_results

        return write_results(self, job_id, Path(dest).expanduser(), export=export)

    def fetch(self, ref: PayloadRef, dest: Path) -> Path:
        """Write a payload's bytes to a file, which appears whole.

        Raises:
            PayloadError: damaged on the way. FaultError: the broker does not have it (any more).
        """
        part = dest.with_name(dest.name + ".copy")
        got = self._link.fetch(ref, dest=part)
        if isinstance(got, bytes):
            part.write_bytes(got)
        elif got != part:  # the broker's own file: never handed out, it will go
            shutil.copyfile(got, part)
        part.replace(dest)
        return dest

    # ------------------------------------------------------------ asking

    def _ask(self, what: str, job_id: str = "", after: int = 0) -> dict[str, Any]:
        return self._ask_broker(Ask(ref=self._link.next_ref(), what=what, job=JobId(job_id), after=after, limit=_PAGE))

    def _ask_broker(self, message: Any) -> dict[str, Any]:
        answer, tail = self._link.request(message, timeout_s=self._timeout_s)
        if not isinstance(answer, Answer):
            raise FaultError("unexpected", f"the broker answered {type(message).__name__} with {type(answer).__name__}")
        data = dict(answer.data)
        if len(tail):
            data |= cast("dict[str, Any]", unpack(tail, max_bytes=_MAX_ANSWER_BYTES))
        return data

    def _pages(self, what: str, key: str, job_id: str, after: int) -> Iterator[dict[str, Any]]:
        while True:
            answer = self._ask(what, job_id, after)
            items = cast("list[dict[str, Any]]", answer.get(key, []))
            yield from items
            following = int(answer.get("next") or 0)
            if not items or following <= after:  # the last page, or a broker that gives all at once
                return
            after = following


def _model_bytes(spec: JobSpec, folder: Path) -> dict[str, int]:
    """By which the broker sees whether the job fits into its spool: the initial model, a checkpoint, float32 masters.

    A checkpoint has 8 bytes for each number of a floating-point tensor; masters are kept of those with 16 bits.
    """
    names = [component.args.get("initial_model") for component in spec.workflows]
    paths = [spec.app_dir(folder) / name for name in names if isinstance(name, str)]
    sizes = {"model_bytes": 0, "checkpoint_bytes": 0, "state_bytes": 0}
    for path in paths:
        if path.is_file() and path.stat().st_size > sizes["model_bytes"]:
            sizes["model_bytes"] = path.stat().st_size
            numbers = _numbers(path)
            sizes["checkpoint_bytes"] = 8 * sum(numbers.values())
            sizes["state_bytes"] = 4 * sum(count for dtype, count in numbers.items() if dtype in _HALVES)
    return sizes


def _numbers(path: Path) -> dict[str, int]:
    """How many numbers a model's file has of each dtype."""
    from ..serialization.errors import HeaderError
    from ..serialization.header import header_bytes_needed, read_header

    found: dict[str, int] = {}
    with path.open("rb") as file:
        try:
            head = file.read(8)
            head += file.read(header_bytes_needed(head) - 8)
            for tensor in read_header(head, path.stat().st_size).tensors:
                found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.items
        except HeaderError:  # said where the job reads it
            return {}
    return found


def _only_folder(archive: Path, dest: Path) -> Path:
    """Unpack an archive; the folder in it that is the job, where it holds one folder and nothing else."""
    unpack_archive(archive, dest)
    inside = list(dest.iterdir())
    if len(inside) == 1 and inside[0].is_dir():
        raise JobError(f"{archive} holds the folder {inside[0].name!r}; pack what is in it, with meta.json at the top")
    return dest


def _ref(data: Any) -> PayloadRef | None:
    if isinstance(data, PayloadRef) or data is None:
        return data
    try:
        return decode_fields(PayloadRef, data)
    except CodecError as error:
        raise FedloomError(f"the broker's answer holds no payload reference: {error}") from None
