"""Entry points of the simulation's own processes; each runs forked from the warm process, with plain arguments.

SIGTERM ends one of them in good order, SIGKILL at any point does no harm that the run could see.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import structlog

from ..serialization.errors import FedloomError
from ..serialization.processes import setup_logging
from .forkserver.client import ForkedProcess, WarmClient
from .forkserver.spawner import ForkSpawner

__all__ = ["run_agent", "run_broker", "run_controller", "run_data"]

log = structlog.get_logger(__name__)

POOL = "sim"
#: Only this machine's processes can die, all of one user and with one page cache between them.
_BROKER: dict[str, Any] = {"durability": "process", "integrity": "size", "trust_local": True}
#: How long the agent's hosts may take to end when the run is over; `SimConfig.grace_s` bounds the whole.
HOSTS_END_S = 8.0
#: How many tasks the one agent takes on beyond those that run.
_MOST_AHEAD = 1024


def run_broker(
    endpoint: str, store: str, internal: str, ready: str, options: dict[str, Any], log_level: str, log_json: bool
) -> None:
    """The broker's control process; writes a byte to the pipe ``ready`` once peers can connect."""
    from ..broker.control import ControlConfig, run_control

    _enter(log_level, log_json)
    stop = _stop_on_terminate()
    config = ControlConfig(store=Path(store), bind=endpoint, internal=internal, **(_BROKER | options))
    run_control(config, stop, on_ready=lambda _: _say_ready(ready))


def run_data(
    endpoint: str, store: str, internal: str, ready: str, options: dict[str, Any], log_level: str, log_json: bool
) -> None:
    """The broker's data process; ``ready`` as `run_broker`'s."""
    from ..broker.data import DataConfig, DataLoop

    _enter(log_level, log_json)
    stop = _stop_on_terminate()
    known = {item.name for item in fields(DataConfig)}  # the rest is for the control process alone
    mine = {name: value for name, value in (_BROKER | options).items() if name in known}
    loop = DataLoop(DataConfig(store=Path(store), bind=f"{endpoint}.data", internal=internal, **mine))
    try:
        _say_ready(ready)
        loop.run(stop)
    finally:
        loop.close()


def run_controller(
    endpoint: str, warm: str, job_log: str, job_env: dict[str, str], log_level: str, log_json: bool
) -> None:
    """The controller; its job processes are forked too, and end with it."""
    from ..controller.job import JobRequest
    from ..controller.service import run_controller as serve

    _enter(log_level, log_json)
    client = WarmClient(warm)

    def start_job(request: JobRequest) -> ForkedProcess:
        args = {"request": asdict(request)}
        return client.fork("job", "fedloom.controller.job:main", args, env=job_env, log_path=job_log)

    try:
        serve(endpoint, start_job, log_level=log_level, log_json=log_json)
    finally:
        client.close()


def run_agent(
    endpoint: str,
    warm: str,
    workspace: str,
    sites: list[str],
    slot_envs: list[dict[str, str]],
    prefold: bool,
    max_parked: int | None,
    options: dict[str, Any],
    log_level: str,
    log_json: bool,
) -> int:
    """One pool agent for all sites, with a slot for each that runs at once; its hosts are forked and end with it."""
    from ..executor.agent import Agent, AgentConfig

    _enter(log_level, log_json)
    stop = _stop_on_terminate()
    settings: dict[str, Any] = {
        "pool": POOL,
        "capacity": len(slot_envs),
        "slot_envs": tuple(slot_envs) if any(slot_envs) else (),
        "share_logs": False,  # the run takes the files themselves
        "queue_ahead": max(32, 2 * len(slot_envs), min(_MOST_AHEAD, len(sites))),  # nobody else could take them
    }
    if not prefold:
        settings["partial_max_tasks"] = 1  # a batch of one leaves as a single result
    if max_parked is not None:
        settings["max_parked"] = max_parked
    client = WarmClient(warm, on_lost=stop.set)
    config = AgentConfig(endpoint=endpoint, workspace=Path(workspace), sites=tuple(sites), **(settings | options))
    agent = Agent(config, ForkSpawner(client))
    try:
        agent.start()
        agent.when_ended(stop.set)
        while not stop.wait(60.0):
            pass
        if agent.wait(0.0):  # the broker has refused it, or it has failed: it raises which
            return 1
        agent.stop(HOSTS_END_S)
    except FedloomError as error:
        log.error("agent_ended", reason=str(error))
        return 1
    finally:
        client.close()
    return 0


def _enter(log_level: str, log_json: bool) -> None:
    setup_logging(log_level, log_json)
    # hundreds of sites are hundreds of connections; hosts are forked elsewhere and keep the user's limit
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _say_ready(pipe: str) -> None:
    # never blocks: the launcher holds both ends, and without it there is nobody to tell
    with contextlib.suppress(OSError):
        fd = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(fd, b".")
        finally:
            os.close(fd)


def _stop_on_terminate() -> threading.Event:
    stop = threading.Event()

    def end(number: int, frame: object) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    return stop
