"""``fedloom broker``, ``controller`` and ``executor``: the three services."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ...serialization.errors import JobError
from .common import Broker, Compat, LogFormat, LogLevel, command, enable_compat

DEFAULT_BIND = "tcp://127.0.0.1:7600"
_DURABILITIES = ("power", "process")


@command
def broker(
    bind: Annotated[str, typer.Option("--bind", metavar="ENDPOINT", help="The control endpoint.")] = DEFAULT_BIND,
    store: Annotated[
        Path, typer.Option("--store", metavar="DIR", help="Where the journal and the payloads are kept.")
    ] = Path("fedloom-store"),
    data_bind: Annotated[
        str | None, typer.Option("--data-bind", metavar="ENDPOINT", help="The data endpoint; default the next port.")
    ] = None,
    advertise: Annotated[
        str | None, typer.Option("--advertise", metavar="HOST:PORT", help="Where peers reach the data endpoint.")
    ] = None,
    durability: Annotated[
        str, typer.Option("--durability", metavar="MODE", help="power: survives a power cut; process: only a kill.")
    ] = "power",
    quota_bytes: Annotated[
        int, typer.Option("--quota-bytes", metavar="N", min=0, help="The store's bound; default 80% of the free disk.")
    ] = 0,
    bounds: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A bound or time of docs/bounds.md; may be repeated."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow other machines to connect, although nothing is encrypted.")
    ] = False,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
) -> None:
    """Start the broker: the only one that listens; a killed one goes on where it was."""
    from ..logs import setup

    if durability not in _DURABILITIES:
        raise JobError(f"--durability {durability!r}; allowed are {' and '.join(_DURABILITIES)}")
    bind = _endpoint(bind)
    from ...broker.options import parse
    from ...broker.service import BrokerConfig, run_broker

    chosen = parse([*(bounds or ()), *([f"quota_bytes={quota_bytes}"] if quota_bytes else ())])
    setup(log_level, log_format)
    run_broker(
        BrokerConfig(
            bind=bind,
            store=store.expanduser().resolve(),
            data_bind=_endpoint(data_bind) if data_bind else "",
            advertise=advertise or "",
            durability="power" if durability == "power" else "process",
            insecure=insecure,
            bounds=chosen,
        )
    )


@command
def controller(
    broker: Broker = None, compat: Compat = None, log_level: LogLevel = None, log_format: LogFormat = None
) -> None:
    """Start a controller, which claims jobs and runs them. Start two for a hot standby."""
    from ...controller.service import run_controller
    from ..logs import setup

    level, json_lines = setup(log_level, log_format)
    enable_compat(compat)
    run_controller(_broker(broker), log_level=level, log_json=json_lines)


@command
def executor(
    site: Annotated[
        list[str] | None, typer.Option("--site", metavar="NAME", help="A site that it works for; may be repeated.")
    ] = None,
    pool: Annotated[
        str | None, typer.Option("--pool", metavar="NAME", help="Its own name, where it works for many sites.")
    ] = None,
    workspace: Annotated[
        Path, typer.Option("--workspace", "-w", metavar="DIR", help="Where it keeps its cache, results and sites.")
    ] = Path("fedloom-executor"),
    capacity: Annotated[
        int | None, typer.Option("--capacity", min=1, metavar="N", help="Tasks at a time; default one a site.")
    ] = None,
    share_logs: Annotated[
        bool, typer.Option("--share-logs/--no-share-logs", help="Send what the sites' scripts print to the broker.")
    ] = True,
    broker: Broker = None,
    compat: Compat = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
) -> None:
    """Start an executor, which works for one site, or for several."""
    from ...serialization.jobspec import check_site_name
    from ..logs import setup

    sites = list(dict.fromkeys(name.strip() for entry in site or () for name in entry.split(",") if name.strip()))
    if not sites:
        raise JobError("an executor works for a site: name it, as in --site site-1 (repeat it for several)")
    for name in [*sites, *([pool] if pool else [])]:
        check_site_name(name)
    from ...executor.config import AgentConfig
    from ...executor.service import run_executor

    setup(log_level, log_format)
    enable_compat(compat)
    run_executor(
        AgentConfig(
            endpoint=_broker(broker),
            workspace=workspace.expanduser().resolve(),
            sites=tuple(sites),
            pool=pool or "",
            capacity=capacity or len(sites),
            share_logs=share_logs,
        )
    )


def _broker(given: str | None) -> str:
    from ..client import DEFAULT_BROKER

    return _endpoint(given or os.environ.get("FEDLOOM_BROKER") or DEFAULT_BROKER)


def _endpoint(text: str) -> str:
    if "://" not in text:
        raise JobError(f"endpoint {text!r}; one such as {DEFAULT_BIND} belongs here")
    return text
