"""An executor inside a program of yours: a few lines beside a service that is already running.

::

    executor = Executor("tcp://127.0.0.1:7600", site="site-1")

    @executor.task("train")
    def train(model: FLModel, ctx: TaskContext) -> FLModel: ...

    executor.start()          # a background thread; the program goes on
    ...
    executor.stop()

It sets no signal handlers, no global generators and no logging. With asyncio: ``async with executor: ...``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from ..serialization.errors import JobError
from ..serialization.jobspec import check_site_name
from ..serialization.model import FLModel, ParamsType
from .agent import Agent
from .config import AgentConfig
from .context import TaskContext, TaskFunction
from .hosts import Spawner
from .script import FunctionExecutor

__all__ = ["Executor", "FLModel", "FunctionExecutor", "ParamsType", "TaskContext", "default_workspace"]

F = TypeVar("F", bound=Callable[..., Any])


def default_workspace(name: str) -> Path:
    """Where an executor keeps its cache, results and site states unless told: ``~/.local/state/fedloom/<name>``."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "fedloom" / name.replace("/", "-")


class Executor:
    """An executor for one site or several, with the task functions that are registered on it.

    Args:
        endpoint: the broker's, such as ``tcp://127.0.0.1:7600``.
        site: the site's name; or ``sites`` for several, and ``pool`` to name them together.
        workspace: a folder of its own that outlives the process; see `default_workspace`.
        capacity: how many tasks run at once, each in a thread.
        connect_s: how long `start` waits for the broker.
        stop_s: how long `stop` waits for running hosts of scripts (functions are told through ``ctx.cancelled``).
    """

    def __init__(
        self,
        endpoint: str,
        *,
        site: str = "",
        sites: Sequence[str] = (),
        pool: str = "",
        workspace: Path | str | None = None,
        capacity: int = 1,
        connect_s: float = 30.0,
        stop_s: float = 0.3,
        spawner: Spawner | None = None,
        **options: Any,
    ) -> None:
        wanted: list[str] = [*([site] if site else []), *sites]
        names: tuple[str, ...] = tuple(dict.fromkeys(wanted))
        if not names:
            raise JobError('an executor needs a site: Executor(endpoint, site="site-1")')
        for name in names:
            check_site_name(name)
        self._link_factory = options.pop("link_factory", None)
        self.config = AgentConfig(
            endpoint=endpoint,
            workspace=Path(workspace) if workspace is not None else default_workspace(pool or names[0]),
            sites=names,
            pool=pool,
            capacity=capacity,
            connect_s=connect_s,
            **options,
        )
        self._spawner = spawner
        self._stop_s = stop_s
        self._functions: dict[str, TaskFunction] = {}
        self._agent: Agent | None = None

    @property
    def functions(self) -> Mapping[str, TaskFunction]:
        """The task functions, by task name."""
        return dict(self._functions)

    def task(self, name: str = "train") -> Callable[[F], F]:
        """Register a function for tasks of this name (``"*"``: any other). It stays what it is and may be called.

        The function takes the model and, where it has a second parameter, the `TaskContext`; it returns an `FLModel`.
        ``async def`` functions run in a loop of their own.

        Raises:
            JobError: there is one for this name already, or the executor has started.
        """
        if name in self._functions:
            raise JobError(f"there is a function for task {name!r} already: {self._functions[name]!r}")
        if self._agent is not None:
            raise JobError("register tasks before start()")

        def register(function: F) -> F:
            self._functions[name] = function
            return function

        return register

    def start(self) -> Self:
        """Connect and work in the background.

        Raises:
            LinkTimeout: no broker answered within ``connect_s``. FaultError: it refused, such as a site that another
                live executor serves. JobError: no function is registered, or another executor works in the workspace.
        """
        if self._agent is not None:
            raise JobError("the executor has started already; make a new one to start again")
        if not self._functions:
            raise JobError('no task function: register one with @executor.task("train")')
        more: dict[str, Any] = {} if self._link_factory is None else {"link_factory": self._link_factory}
        agent = Agent(self.config, self._spawner, self._functions, **more)
        agent.start()
        self._agent = agent
        return self

    def stop(self) -> None:
        """Stop. A running function's result is not sent any more; its task goes to the next executor of the site."""
        if self._agent is not None:
            self._agent.stop(self._stop_s)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the executor has ended; False if it has not in time.

        Raises:
            FaultError: the broker ended it.
        """
        return self._started().wait(timeout_s)

    @property
    def running(self) -> bool:
        """Whether it has started and not ended."""
        return self._agent is not None and not self._agent.ended

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        unwanted = threading.Event()

        def start() -> None:
            self.start()
            if unwanted.is_set():
                self.stop()

        try:
            await asyncio.to_thread(start)
        except asyncio.CancelledError:
            unwanted.set()  # the thread cannot be cancelled: what it starts, or has just started, is stopped
            threading.Thread(target=self.stop, name="fedloom-stop", daemon=True).start()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    async def wait_async(self) -> None:
        """Wait until the executor has ended, without a thread.

        Raises:
            FaultError: the broker ended it.
        """
        agent = self._started()
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits
                loop.call_soon_threadsafe(ended.set)

        agent.when_ended(tell)
        await ended.wait()
        agent.wait(0)

    def _started(self) -> Agent:
        if self._agent is None:
            raise JobError("call start() first")
        return self._agent
