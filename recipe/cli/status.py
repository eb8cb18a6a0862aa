"""``fedloom status``: how full a broker is, and which of its bounds were reached."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .common import Broker, ConnectTimeout, Json, command, print_json, print_table


@command
def status(
    broker: Broker = None,
    everything: Annotated[bool, typer.Option("--all", help="Show bounds that hold nothing, too.")] = False,
    as_json: Json = False,
    connect_timeout: ConnectTimeout = 10.0,
) -> None:
    """Show how full the broker is: its spool, its sessions and jobs, and each bound (docs/bounds.md)."""
    from ..client import JobClient
    from ..logs import setup

    setup(default="error")
    with JobClient(broker, connect_s=connect_timeout) as client:
        told = client.broker()
    if as_json:
        print_json(told)
        return
    spool = told["spool"]
    quota = _bytes(spool["quota_bytes"]) if spool["quota_bytes"] else "no quota"
    typer.echo(f"spool: {_bytes(spool['used_bytes'] + spool['coming_bytes'])} of {quota}, {spool['waiting']} wait")
    typer.echo(
        f"sessions: {told['sessions']}  jobs: {told['jobs']}  gathers: {told['gathers']}  tasks: {told['tasks']}"
    )
    rows = [
        _row(name, bound) for name, bound in told["bounds"].items() if everything or bound["used"] or bound["reached"]
    ]
    print_table(["bound", "used", "limit", "reached"], rows, "no bound holds anything")


def _row(name: str, bound: dict[str, Any]) -> list[str]:
    show = _bytes if name.endswith("_bytes") else str
    limit = show(bound["limit"]) if bound["limit"] else "none"
    return [name, show(bound["used"]), limit, str(bound["reached"])]


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
