"""The result folder: what a run leaves, the same from a simulation and from a broker.

::

    model.safetensors        the global model after the last committed round
    best_model.safetensors   the model that scored best by the key metric, where one was reported
    <name>.safetensors       the same under the recipe's best_model_filename; the global model where none was scored
    metrics.jsonl            a line a round
    cross_site_val/          the matrix of an evaluation, as JSON and as a table
    summary.json             the whole run
    tracking.jsonl           what scripts logged, a line a point, where they did
    tb_events/<site>/        the same for TensorBoard, where the recipe asks for it
    job/                     the job as it was submitted
    logs/<site>.log          what each site said
    sites/<site>/            what each site left
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from ..serialization.archive import unpack_archive
from ..serialization.errors import FaultError, JobError, StorageError
from ..serialization.jobmessages import POINTS_KIND
from ..serialization.messages import PayloadRef
from .client import JobInfo
from .failures import SiteFailure, script_errors
from .matrix import is_evaluation, summary_of, write_matrix
from .naming import BEST_MODEL_FILE, MODEL_FILE, folder_name, name_in, save_under_name
from .points import PointFile, event_words
from .tracking import write_tracking
from .workspace import claim_folder, is_ours, mark

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
SERVER_LOG = "server"
_LOG_BUFFER_CHARS = 4 * 1024**2


class ResultSource(Protocol):
    """Where results come from; `JobClient` is one."""

    def info(self, job_id: str) -> JobInfo: ...
    def rounds(self, job_id: str) -> list[dict[str, Any]]: ...
    def events(self, job_id: str, after: int = 0) -> Iterator[dict[str, Any]]: ...
    def fetch(self, ref: PayloadRef, dest: Path) -> Path: ...


def write_results(
    source: ResultSource,
    job_id: str,
    dest: Path,
    *,
    logs: bool = True,
    export: bool = False,
    errors: list[SiteFailure] | None = None,
) -> Path:
    """Write a job's result folder, of a job that runs too; ``logs=False`` leaves those that are there already.

    With ``export`` what scripts logged goes to the trackers of the job as well, once it has ended. The scripts that
    failed behind their `send` are added to ``errors``: they stand among the events, which are read once.

    Raises:
        JobError: ``dest`` holds something that fedloom did not make.
        StorageError: the disk refused.
    """
    if dest.exists() and not dest.is_dir():
        raise JobError(f"{dest} is a file; results are written as a folder")
    if dest.is_dir() and any(dest.iterdir()) and not is_ours(dest):
        raise JobError(f"{dest} holds files that fedloom did not make: name an empty or new folder")
    info = source.info(job_id)
    records = source.rounds(job_id)
    if logs and _job_of(dest) not in ("", info.job_id):
        claim_folder(dest, "results")  # those of another job: not to be mixed with these
    mark(dest, "results")
    try:
        _write_model(source, info.model, dest / MODEL_FILE)
        _write_model(source, info.best, dest / BEST_MODEL_FILE)
        save_under_name(dest, records)
        _write_text(dest / METRICS_FILE, "".join(json.dumps(record) + "\n" for record in records))
        matrix = write_matrix(records, dest)
        _write_job(source, info, dest / "job")
        for folder in ("logs", "sites"):
            (dest / folder).mkdir(exist_ok=True)
        for site in sorted(set(info.sites) | _sites(records)):
            (dest / "sites" / folder_name(site)).mkdir(exist_ok=True)
        points = PointFile(dest)
        errors = [] if errors is None else errors
        others = _noting(points.passing(source.events(job_id)), errors)
        if logs:
            _write_logs(others, dest / "logs")
        for _ in others:  # all of them pass, whoever looks
            pass
        write_tracking(dest, info.job_id, records, points.reader, export=export and info.ended)
        whole = summary(info, records, dest, len(errors)) | {"tracking": points.summary()}
        whole |= {"cross_site_val": summary_of(matrix)} if matrix else {}
        _write_text(dest / SUMMARY_FILE, json.dumps(whole, indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"{dest}: {error.strerror or error}") from None
    return dest


def summary(info: JobInfo, records: list[dict[str, Any]], dest: Path, errors: int = 0) -> dict[str, Any]:
    """What summary.json holds: the job, its last metrics, totals over the rounds, and the files beside it.

    Args:
        errors: scripts that failed behind their `send`, which no round's record has.
    """
    trained = [record for record in records if not is_evaluation(record)]
    last = trained[-1] if trained else {}
    # a round's metrics are the sites' scores of the model that they received: the round before's
    best = [int(record["round"]) - 1 for record in records if record.get("best")]
    seconds = None
    if info.submitted_at is not None:
        seconds = (info.ended_at if info.ended_at is not None else time.time()) - info.submitted_at
    return {
        "schema_version": 1,
        **info.to_json(),
        "seconds": seconds,
        "metrics": last.get("metrics", {}),
        "best_round": best[-1] if best else None,
        "stopped_early": next((text for record in records if (text := record.get("stopped_early"))), None),
        "results": sum(int(record.get("results") or 0) for record in records),
        "failures": errors + sum(len(record.get("failures") or ()) for record in records),
        "bytes": sum(int(record.get("bytes") or 0) for record in records),
        "files": {
            name: (dest / name).stat().st_size
            for name in (MODEL_FILE, BEST_MODEL_FILE, name_in(records), METRICS_FILE)
            if name is not None and (dest / name).is_file()
        },
    }


def _noting(events: Iterable[dict[str, Any]], errors: list[SiteFailure]) -> Iterator[dict[str, Any]]:
    for event in events:
        errors.extend(script_errors([event]))
        yield event


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records in a result folder's metrics.jsonl."""
    file = folder / METRICS_FILE
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


def _job_of(folder: Path) -> str:
    """The job whose results lie in a folder, or ""."""
    try:
        return str(json.loads((folder / SUMMARY_FILE).read_text("utf-8"))["job_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _write_model(source: ResultSource, ref: PayloadRef | None, path: Path) -> None:
    if ref is not None:
        source.fetch(ref, path)
    else:
        path.unlink(missing_ok=True)


def _write_job(source: ResultSource, info: JobInfo, dest: Path) -> None:
    if info.archive is None or dest.is_dir():
        return
    archive = dest.with_name("job.tar")
    try:
        source.fetch(info.archive, archive)
        unpack_archive(archive, dest)
    except FaultError:  # an ended job's archive need not be kept for ever
        shutil.rmtree(dest, ignore_errors=True)
    finally:
        archive.unlink(missing_ok=True)


def _write_logs(events: Iterable[dict[str, Any]], folder: Path) -> None:
    """One file a site, and ``server.log`` for what belongs to none. Memory is one buffer, however many there are."""
    waiting: dict[str, list[str]] = {}
    started: set[str] = set()
    held = 0
    for event in events:
        line = log_text(event)
        waiting.setdefault(folder_name(str(event.get("site") or "")) or SERVER_LOG, []).append(line)
        held += len(line)
        if held > _LOG_BUFFER_CHARS:
            held = _flush(waiting, started, folder)
    _flush(waiting, started, folder)


def _flush(waiting: dict[str, list[str]], started: set[str], folder: Path) -> int:
    for site, lines in waiting.items():
        with (folder / f"{site}.log").open("a" if site in started else "w", encoding="utf-8") as file:
            file.writelines(lines)
        started.add(site)
    waiting.clear()
    return 0


def log_text(event: dict[str, Any]) -> str:
    """An event as it stands in a site's log: what a script printed just as it was, all else as a line."""
    if event.get("kind") == "log":
        text = str(event.get("text") or "")
        return text if text.endswith("\n") else text + "\n"
    return event_line(event) + "\n"


def event_line(event: dict[str, Any]) -> str:
    """An event as a line of a log: time, kind, text and data. Plain logs are their text alone, with the time."""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(event.get("at") or 0.0)))
    kind = str(event.get("kind") or "")
    text = str(event.get("text") or "").rstrip("\n")
    data: dict[str, Any] = event.get("data") or {}
    if kind == POINTS_KIND and "sites" in data:
        text, data = event_words(data), {}
    parts = [at, "" if kind == "log" else kind, text, json.dumps(data) if data else ""]
    return " ".join(part for part in parts if part)


def _sites(records: list[dict[str, Any]]) -> set[str]:
    return {str(site.get("name")) for record in records for site in record.get("sites") or () if site.get("name")}


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    part.replace(path)
