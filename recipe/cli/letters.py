"""``fedloom job letters``, ``retry`` and ``drop``: the tasks of a job that were given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...serialization.errors import FaultError, JobError
from .common import Broker, ConnectTimeout, Json, command, print_json, print_table
from .jobs import JobId, connect, when

if TYPE_CHECKING:
    from ..client import JobClient

#: So much of a task's id tells it from a job's others.
_SHOWN = 12

Sites = Annotated[list[str] | None, typer.Option("--site", metavar="S", help="Those of this site; may be repeated.")]
Tasks = Annotated[
    list[str] | None, typer.Option("--task", metavar="T", help="This task, by its id or the beginning of it.")
]
All = Annotated[bool, typer.Option("--all", help="All of them.")]


def join(app: typer.Typer) -> None:
    """Add the commands to those of ``fedloom job``."""
    for function in (letters, retry, drop):
        app.command()(function)


@command
def letters(
    job_id: JobId,
    site: Sites = None,
    trace: Annotated[bool, typer.Option("--trace", help="Show each site's whole error, with its traceback.")] = False,
    broker: Broker = None,
    as_json: Json = False,
    connect_timeout: ConnectTimeout = 10.0,
) -> None:
    """List a job's dead letters: tasks that were given up, and neither retried nor dropped since."""
    with connect(broker, connect_timeout) as client:
        found = [letter for letter in client.letters(job_id) if not site or letter["site"] in site]
    if as_json:
        print_json({"job_id": job_id, "letters": found})
        return
    if trace:
        for letter in found:
            typer.echo("  ".join(_row(letter)[:-1]))
            typer.echo(f"{letter.get('code')}\n{str(letter.get('text', '')).rstrip()}\n")
        return
    columns = ["site", "task", "id", "round", "step", "attempts", "when", "error"]
    print_table(columns, [_row(letter) for letter in found], "no dead letters")


@command
def retry(
    job_id: JobId,
    site: Sites = None,
    task: Tasks = None,
    every: All = False,
    broker: Broker = None,
    as_json: Json = False,
    connect_timeout: ConnectTimeout = 10.0,
) -> None:
    """Queue tasks that were given up again, with fresh attempts; while their step is open."""
    with connect(broker, connect_timeout) as client:
        chosen = _chosen(client, job_id, site, task, every)
        # the others are named only where that leaves none: then the broker says why not
        chosen = [letter for letter in chosen if letter["open"]] or chosen[-1:]
        _carry_out(client.retry, "retried", job_id, chosen, as_json)


@command
def drop(
    job_id: JobId,
    site: Sites = None,
    task: Tasks = None,
    every: All = False,
    broker: Broker = None,
    as_json: Json = False,
    connect_timeout: ConnectTimeout = 10.0,
) -> None:
    """Take dead letters off the list: their tasks stay failed, and in their round's record."""
    with connect(broker, connect_timeout) as client:
        _carry_out(client.drop, "dropped", job_id, _chosen(client, job_id, site, task, every), as_json)


def _chosen(
    client: JobClient, job_id: str, sites: list[str] | None, tasks: list[str] | None, every: bool
) -> list[dict[str, Any]]:
    if every == bool(sites or tasks):
        raise JobError("which of the dead letters: --site S, --task T or --all")
    found = [
        letter
        for letter in client.letters(job_id)
        if (not sites or letter["site"] in sites) and (not tasks or str(letter["task"]).startswith(tuple(tasks)))
    ]
    if not found:
        raise JobError(f"job {job_id} has no such dead letter; `fedloom job letters {job_id}` lists those that it has")
    return found


def _carry_out(
    order: Callable[[str, int], None], said: str, job_id: str, chosen: list[dict[str, Any]], as_json: bool
) -> None:
    """One order a letter; one that is refused does not keep the others from theirs."""
    done: list[dict[str, Any]] = []
    refused: FaultError | None = None
    for letter in chosen:
        try:
            order(job_id, letter["letter"])
        except FaultError as error:
            refused = error
            continue
        done.append({key: letter.get(key) for key in ("site", "task", "name", "round", "step")})
    if as_json and (done or refused is None):
        print_json({"job_id": job_id, said: done})
    elif not as_json:
        for letter in done:
            where = f"round {letter['round']}, step {letter['step']}, {letter['name']}"
            typer.echo(f"{said} {letter['site']}: {where} ({str(letter['task'])[:_SHOWN]})")
    if refused is not None:
        raise refused


def _row(letter: dict[str, Any]) -> list[str]:
    lines = str(letter.get("text") or "").strip().splitlines() or [""]
    return [
        str(letter["site"]),
        str(letter.get("name", "")),
        str(letter["task"])[:_SHOWN],
        str(letter.get("round", "")),
        "open" if letter["open"] else "closed",
        str(letter.get("attempts", letter.get("tries", ""))),
        when(letter["at"]),
        f"{letter.get('code')}: {lines[-1].strip()}",
    ]
