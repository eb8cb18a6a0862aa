"""What `fedloom executor` runs: an agent until it is told to stop."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import structlog

from ..serialization.errors import FaultError, LinkError, LinkTimeout
from .agent import Agent
from .config import AgentConfig
from .hosts import Spawner

log = structlog.get_logger(__name__)

#: How long the name's last holder may take to be noticed as dead: the broker's dead_s, and some.
TAKEOVER_S = 45.0
_RETRY_S = (0.5, 10.0)


def run_executor(
    config: AgentConfig,
    spawner: Spawner | None = None,
    *,
    stop: threading.Event | None = None,
    takeover_s: float = TAKEOVER_S,
    make_agent: Callable[[AgentConfig, Spawner | None], Agent] = Agent,
    on_up: Callable[[Agent], None] | None = None,
) -> None:
    """Work until SIGTERM, SIGINT (in the main thread) or ``stop``. Waits for a broker for as long as it takes.

    If the executor before this one in the workspace was killed, a name that is taken is asked for again for
    ``takeover_s``: its holder is this executor's own past life, which the broker has not given up yet.

    Raises:
        FaultError: the broker refused this executor for good.
    """
    stop = stop or threading.Event()
    previous = _catch_signals(stop)
    tries = 0
    refused_since: float | None = None
    try:
        while not stop.is_set():
            agent = make_agent(config, spawner)
            try:
                agent.start()
            except FaultError as error:
                refused_since = refused_since or time.monotonic()
                waits = error.code == "name_taken" and agent.was_killed
                if not waits or time.monotonic() - refused_since > takeover_s:
                    raise
                log.warning("name_taken", node=config.node, text=str(error), waits_s=takeover_s)
            except (LinkTimeout, LinkError) as error:
                log.warning("broker_not_reached", endpoint=config.endpoint, reason=str(error))
            else:
                tries, refused_since = 0, None
                if on_up is not None:
                    on_up(agent)
                _watch(agent, stop)
                continue
            tries += 1
            stop.wait(min(_RETRY_S[1], _RETRY_S[0] * 2**tries) * (0.5 + random.random()))
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _watch(agent: Agent, stop: threading.Event) -> None:
    """Until told to stop, or the agent's end, which raises when the broker was its reason."""
    try:
        agent.when_ended(stop.set)
        stop.wait()
    finally:
        agent.stop()
    agent.wait(0)


Handlers = dict[int, Callable[[int, FrameType | None], object] | int | None]


def _catch_signals(stop: threading.Event) -> Handlers:
    if threading.current_thread() is not threading.main_thread():
        return {}

    def handle(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        stop.set()

    return {signum: signal.signal(signum, handle) for signum in (signal.SIGTERM, signal.SIGINT)}
