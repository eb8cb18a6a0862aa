"""``fedloom job``: submit jobs to a broker, watch them, and fetch what came of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    DONE,
    FAILED,
    Broker,
    ConnectTimeout,
    Json,
    command,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from ..client import JobClient, JobInfo

app = typer.Typer(no_args_is_help=True, help="Submit jobs to a broker, watch them, fetch their results.")

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]
Timeout = Annotated[
    float | None, typer.Option("--timeout", metavar="SECONDS", min=0.0, help="Exit with 4 if it takes longer.")
]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for the job's end, and exit as it did.")]


def connect(broker: str | None, connect_s: float) -> JobClient:
    from ..client import JobClient
    from ..logs import setup

    setup(default="error")  # what goes wrong is said once, by the command
    return JobClient(broker, connect_s=connect_s)


def _go_on(client: JobClient, job_id: str, said: str, wait: bool, timeout: float | None, as_json: bool) -> None:
    """Say that a job was submitted; or wait for its end, and exit so."""
    if not wait and as_json:
        print_json({"job_id": job_id})
    elif not as_json:
        typer.echo(said.format(job_id))
        if not wait:
            typer.echo(f"watch it with: fedloom job wait {job_id}", err=True)
    if wait:
        _ended(client.wait(job_id, timeout, None if as_json else _say), as_json)


def _ended(info: JobInfo, as_json: bool) -> None:
    """Show how a job ended, and exit so."""
    if as_json:
        print_json(info.to_json())
    else:
        typer.echo(f"{info.job_id} {info.status}, {info.round} of {info.rounds} rounds")
        if info.reason:
            typer.echo(info.reason, err=True)
    raise typer.Exit(DONE if info.status == "FINISHED:COMPLETED" else FAILED)


@app.command()
@command
def submit(
    job_folder: Annotated[Path, typer.Argument(metavar="JOB_FOLDER", help="A folder, as recipe.export writes it.")],
    broker: Broker = None,
    wait: Wait = False,
    timeout: Timeout = None,
    as_json: Json = False,
    connect_timeout: ConnectTimeout = 10.0,
) -> None:
    """Submit a job."""
    from ...serialization.jobspec import JobSpec
    from ..intake import job_folder as taken_in

    with taken_in(job_folder) as folder:
        if folder.is_dir() or not folder.exists():
            JobSpec.load(folder)  # what is wrong with it is said before a broker is looked for
        with connect(broker, connect_timeout) as client:
            _go_on(client, client.submit(folder), "submitted {}", wait, timeout, as_json)


@app.command()
@command
def clone(
    job_id: JobId,
    broker: Broker = None,
    wait: Wait = False,
    timeout: Timeout = None,
    as_json: Json = False,
    connect_timeout: ConnectTimeout = 10.0,
) -> None:
    """Submit a job that the broker knows once more, from its start."""
    with connect(broker, connect_timeout) as client:
        _go_on(client, client.clone(job_id), f"submitted {{}}, a clone of {job_id}", wait, timeout, as_json)


@app.command()
@command
def resume(
    job_id: JobId,
    job_folder: Annotated[
        Path | None,
        typer.Argument(metavar="[JOB_FOLDER]", help="Go on with this folder, such as the job with its fault mended."),
    ] = None,
    broker: Broker = None,
    wait: Wait = False,
    timeout: Timeout = None,
    as_json: Json = False,
    connect_timeout: ConnectTimeout = 10.0,
) -> None:
    """Let a job that failed or was aborted go on behind its last committed round, as a new job."""
    with connect(broker, connect_timeout) as client:
        rounds = client.info(job_id).round
        said = f"submitted {{}}: {job_id} goes on behind {rounds} committed round{'s' * (rounds != 1)}"
        _go_on(client, client.resume(job_id, job_folder), said, wait, timeout, as_json)


@app.command("list")
@command
def list_jobs(broker: Broker = None, as_json: Json = False, connect_timeout: ConnectTimeout = 10.0) -> None:
    """List the jobs that the broker knows."""
    with connect(broker, connect_timeout) as client:
        jobs = client.jobs()
    if as_json:
        print_json({"jobs": [info.to_json() for info in jobs]})
        return
    rows = [
        [info.job_id, info.name, info.status, f"{info.round}/{info.rounds}", when(info.submitted_at)] for info in jobs
    ]
    print_table(["job", "name", "status", "rounds", "submitted"], rows, "no jobs")


@app.command()
@command
def status(job_id: JobId, broker: Broker = None, as_json: Json = False, connect_timeout: ConnectTimeout = 10.0) -> None:
    """Show a job's status."""
    with connect(broker, connect_timeout) as client:
        info = client.info(job_id)
        records = [] if as_json else client.rounds(job_id)
    if as_json:
        print_json(info.to_json())
        return
    typer.echo(f"{info.job_id}  {info.name}  {info.status}  round {info.round} of {info.rounds}")
    if info.reason:
        typer.echo(info.reason)
    if info.sites:
        typer.echo(f"sites: {', '.join(info.sites)}")
    if records:
        print_table(["round", "results", "seconds", "metrics"], [_round_row(record) for record in records], "")


@app.command()
@command
def wait(
    job_id: JobId,
    broker: Broker = None,
    timeout: Timeout = None,
    as_json: Json = False,
    connect_timeout: ConnectTimeout = 10.0,
) -> None:
    """Wait for a job's end, and exit as it did: 0 completed, 1 failed or aborted, 4 not ended in time."""
    with connect(broker, connect_timeout) as client:
        info = client.wait(job_id, timeout, None if as_json else _say)
    _ended(info, as_json)


@app.command()
@command
def logs(
    job_id: JobId,
    site: Annotated[str | None, typer.Option("--site", help="Only what this site said.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends.")] = False,
    broker: Broker = None,
    as_json: Json = False,
    connect_timeout: ConnectTimeout = 10.0,
) -> None:
    """Show what was kept about a job: what sites said, failures, changes."""
    from ..results import event_line

    with connect(broker, connect_timeout) as client:
        if as_json:
            events = [event for event in client.events(job_id) if site in (None, event.get("site"))]
            print_json({"job_id": job_id, "events": events})
            return
        for event in client.follow(job_id) if follow else client.events(job_id):
            if site in (None, event.get("site")):
                for line in event_line(event).splitlines() or [""]:
                    typer.echo(f"{event.get('site') or '-'}  {line}")


@app.command()
@command
def abort(job_id: JobId, broker: Broker = None, as_json: Json = False, connect_timeout: ConnectTimeout = 10.0) -> None:
    """End a job now."""
    with connect(broker, connect_timeout) as client:
        after = client.abort(job_id) or client.info(job_id).status
    if as_json:
        print_json({"job_id": job_id, "status": after})
    else:
        typer.echo(f"{job_id} {after}")


@app.command()
@command
def download(
    job_id: JobId,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Where to; default ./ID.", file_okay=False)
    ] = None,
    broker: Broker = None,
    as_json: Json = False,
    connect_timeout: ConnectTimeout = 10.0,
) -> None:
    """Fetch a job's results: the model, metrics.jsonl, summary.json, the job and its logs."""
    with connect(broker, connect_timeout) as client:
        folder = client.download(job_id, output or Path(job_id))
    if as_json:
        print_json({"job_id": job_id, "path": str(folder.resolve())})
    else:
        typer.echo(str(folder))


def _say(info: JobInfo) -> None:
    typer.echo(f"{time.strftime('%H:%M:%S')} {info.status} round {info.round} of {info.rounds}", err=True)


def when(at: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if at else ""


def _round_row(record: dict[str, Any]) -> list[str]:
    metrics: dict[str, Any] = record.get("metrics") or {}
    shown = [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in metrics.items()]
    seconds = record.get("seconds")
    return [
        str(record.get("round", "")),
        str(record.get("results", "")),
        f"{seconds:.2f}" if isinstance(seconds, float | int) else "",
        "  ".join(shown),
    ]
