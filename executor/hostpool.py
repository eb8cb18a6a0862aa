"""The agent's hosts: started when a task needs one, handed tasks one at a time, seen to their end.

Everything here runs in the agent's thread. What happens to a host is told through `HostEvents`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final, Literal, Protocol

import structlog

from .channel import ChannelServer, Map
from .hosts import HostProcess, HostRequest, Spawner, describe_exit, log_size
from .prefold import Gather
from .runs import MAX_PLANS, Run, mark_of
from .siteoutput import salvage
from .taskio import TaskSpec

log = structlog.get_logger(__name__)

State = Literal["starting", "waiting", "busy", "settling", "leaving"]
#: How long after a host's death its last words may still be on the channel.
_LAST_WORDS_S = 2.0
#: How often hosts are looked at while something is about to happen to one, and otherwise.
_LOOK_S = 0.02
_GLANCE_S = 0.5
_DEATH_S = 5.0
_FIELDS: Final = tuple(field.name for field in fields(TaskSpec))


@dataclass(frozen=True, slots=True)
class HostPlan:
    """What a host is to be: its key, its first message, and its process.

    Attributes:
        key: hosts with the same key stand for each other: a script of one site, a job's functions in one slot.
        start: the first message on its channel; of an external command, what its keeper gets.
        client: what an external command's own Client API gets.
        once: it serves one task and ends.
        grace_s: how long it may take to end by itself.
        launch_s: how long until it asks for its first task.
    """

    key: str
    job: str
    lane: str
    start: Map
    request: HostRequest
    client: Map | None = None
    once: bool = False
    grace_s: float = 0.0
    launch_s: float = 300.0


@dataclass(slots=True)
class Host:
    """A live host."""

    id: str
    plan: HostPlan
    process: HostProcess
    started_at: float
    state: State = "starting"
    run: Run | None = None
    behind: deque[Run] = field(default_factory=deque[Run])  # what it does after that
    connections: dict[str, int] = field(default_factory=dict[str, int])  # by role
    sent: int = 0
    last_round: int = 0  # of the task that was answered last
    told: bool = False  # that answer was its failure: the end of its process is no news
    waiting_since: float = 0.0
    end_by: float = float("inf")  # killed then
    dead_at: float = 0.0
    exit_code: int | None = None  # an external command's own, told by its keeper
    left: bool = False  # ended by itself: said so
    heard: bool = False  # an external command's Client API has connected
    stopping: bool = False
    leftovers: list[Path] = field(default_factory=list[Path])  # to be removed once it is dead
    failure: tuple[str, str] | None = None  # (code, text): why it could not even start working
    plans: dict[str, None] = field(default_factory=dict[str, None])  # gathers of which it has the fold plan, by age

    @property
    def task_connection(self) -> int | None:
        """Where tasks are sent."""
        return self.connections.get("host" if self.plan.client is None else "client")


class HostEvents(Protocol):
    """What the agent does when something happens to a host."""

    def on_idle(self, host: Host) -> None:
        """It waits for a task and has none."""
        ...

    def on_message(self, host: Host, message: Map) -> None:
        """A result, failure, progress or event of its task."""
        ...

    def on_ended(self, host: Host, run: Run | None, behind: Sequence[Run]) -> None:
        """It is gone, and ``run`` with it if that was not answered; with those behind it nothing had begun."""
        ...


class HostPool:
    """All hosts of one agent, by key."""

    def __init__(self, channel: ChannelServer, spawner: Spawner, events: HostEvents) -> None:
        self._channel = channel
        self._spawner = spawner
        self._events = events
        self._by_key: dict[str, Host] = {}
        self._closing = False
        self._by_id: dict[str, Host] = {}
        self._serial = 0
        self._look_at = 0.0

    @property
    def live(self) -> int:
        """How many processes there are."""
        return len(self._by_id)

    def hosts(self) -> list[Host]:
        """All of them."""
        return list(self._by_id.values())

    def find(self, key: str) -> Host | None:
        """The host that takes tasks under this key."""
        return self._by_key.get(key)

    def parked(self) -> list[Host]:
        """Scripts that wait for a task, the longest first."""
        waiting = [h for h in self._by_id.values() if h.state == "waiting" and h.run is None and h.plan.lane]
        return sorted(waiting, key=lambda host: host.waiting_since)

    def give(self, run: Run, plan: HostPlan, behind: Sequence[Run] = ()) -> Host:
        """Hand a task, and others to be done behind it, to the host of this plan, which is started if it is not there.

        Raises:
            OSError: it cannot be started.
        """
        host = self._by_key.get(plan.key) or self._start(plan)
        host.run = run
        host.behind.extend(behind)
        if host.state == "waiting":
            self._dispatch(host)
        return host

    def _start(self, plan: HostPlan) -> Host:
        self._serial += 1
        id = f"h{self._serial}"
        env = {**plan.request.env, **self._channel.environ(id)}
        request = HostRequest(
            env, plan.request.cwd, plan.request.log_path, plan.request.slot, plan.request.argv, plan.request.name
        )
        process = self._spawner.spawn(request)
        host = Host(id, plan, process, time.monotonic())
        self._look_at = 0.0
        self._by_key[plan.key] = self._by_id[id] = host
        log.debug("host_started", host=id, key=plan.key, pid=process.pid)
        return host

    def _dispatch(self, host: Host) -> None:
        run, connection = host.run, host.task_connection
        if run is None or connection is None:
            return
        assert run.spec is not None
        host.state = "busy"
        run.started_at = time.monotonic()
        if host.plan.lane:
            run.log_start = log_size(run.log_path)
            message: Map = {"op": "task", "task": run.spec.to_map()}
        else:
            self._tell_plan(host, connection, run)
            message = together([other.spec for other in (run, *host.behind) if other.spec is not None])
        if not self._channel.send(connection, message):
            log.warning("host_unreachable", host=host.id)  # its end is on its way

    def _tell_plan(self, host: Host, connection: int, run: Run) -> None:
        gather = run.spec.fold if run.spec is not None else ""
        if gather and gather not in host.plans:
            host.plans[gather] = None
            if len(host.plans) > MAX_PLANS:  # it may have dropped that one
                del host.plans[next(iter(host.plans))]
            self._channel.send(connection, {"op": "plan", "gather": gather, "plan": run.work.plan})

    def flush(self, id: str, gather: Gather, path: str, digest: bool) -> bool:
        """Ask a worker for what it has folded of a gather; False where there is no such worker any more."""
        host = self._by_id.get(id)
        connection = host.task_connection if host is not None else None
        message = {"op": "flush", "gather": gather[1], "path": path, "digest": digest}
        return connection is not None and self._channel.send(connection, message)

    def cancel(self, host: Host, run: Run) -> None:
        """Tell a host that one of its tasks is wanted no more."""
        if (connection := host.task_connection) is not None:
            self._channel.send(connection, {"op": "cancel", "task": run.key[0], "attempt": run.key[1]})

    def stop(self, host: Host, grace_s: float) -> None:
        """Tell a host to end by itself, and kill it if it has not in time."""
        host.stopping = True
        self._retire(host)
        if host.end_by == float("inf"):
            for connection in host.connections.values():
                self._channel.send(connection, {"op": "stop"})
        host.end_by = min(host.end_by, time.monotonic() + grace_s)
        self._look_at = 0.0

    def kill(self, host: Host) -> None:
        """End a host now, with all it started."""
        host.stopping = True
        self._look_at = 0.0
        self._retire(host)
        host.process.kill()

    def _retire(self, host: Host) -> None:
        """Give it no more tasks."""
        if host.state != "busy":
            host.state = "leaving"
        if self._by_key.get(host.plan.key) is host:
            del self._by_key[host.plan.key]

    # ------------------------------------------------------------ what hosts say

    def on_channel(self, connection: int, id: str, role: str, message: Map | None) -> None:
        """A map off the channel, or None: that connection ended."""
        host = self._by_id.get(id)
        if host is None:
            self._channel.disconnect(connection)
            return
        if self._closing and message is not None and message["op"] != "event" and not _of_no_task(message):
            return  # its answer comes too late: the attempt is another's
        if message is None:
            if host.connections.get(role) == connection:
                del host.connections[role]
                self._look_at = 0.0  # it is ending, or has ended
            return
        match message["op"]:
            case "hello":
                self._hello(host, connection, role)
            case "waiting":
                self._waiting(host)
            case "exited":
                code = message.get("code")
                host.exit_code = code if isinstance(code, int) else None
                host.left = host.left or code == 0
                self._retire(host)
                host.end_by = min(host.end_by, time.monotonic() + max(_LAST_WORDS_S, host.plan.grace_s))
                self._look_at = 0.0
                if role == "host" and host.plan.client is not None:
                    host.process.kill()  # the command has ended: what it left behind goes too
            case "leaving":
                host.left = True
                self._retire(host)
            case "failed" if _of_no_task(message):
                host.failure = (str(message.get("code", "exception")), str(message.get("text", "")))
                self._retire(host)
            case _:
                self._events.on_message(host, message)

    def _hello(self, host: Host, connection: int, role: str) -> None:
        host.connections[role] = connection
        host.heard = host.heard or role == "client"
        start: Map = dict(host.plan.start if role == "host" else (host.plan.client or {}))
        if not host.plan.lane:
            start["mark"] = self._mark(host)
        self._channel.send(connection, {"op": "start", **start})
        if host.stopping:
            self._channel.send(connection, {"op": "stop"})

    def _waiting(self, host: Host) -> None:
        if host.stopping or host.state in ("busy", "leaving"):
            return
        host.state = "waiting"
        host.waiting_since = time.monotonic()
        if host.run is not None:
            self._dispatch(host)
        else:
            self._events.on_idle(host)

    def answered(self, host: Host, now: float | None = None) -> None:
        """Its task is over, with a result or without."""
        if host.run is not None:
            host.last_round = host.run.work.assign.round
        host.sent += 1
        host.run = host.behind.popleft() if host.behind else None
        if host.run is not None:
            host.run.started_at = now or time.monotonic()
            return
        host.state = "settling"
        if host.plan.once:
            self._retire(host)
            host.end_by = time.monotonic() + max(30.0, host.plan.grace_s)
            self._look_at = 0.0

    # ------------------------------------------------------------ time

    def tick(self, now: float) -> None:
        """See which hosts have ended, and end those that are late. Cheap where it is not time to look."""
        if now < self._look_at:
            return
        for host in self.hosts():
            if not host.dead_at:
                if host.process.poll() is not None:
                    host.dead_at = now
                    self._retire(host)
                elif now > host.end_by:
                    log.debug("host_killed_late", host=host.id, key=host.plan.key)
                    host.process.kill()
                elif host.state == "starting" and not host.stopping and now - host.started_at > host.plan.launch_s:
                    what = f"it did not ask for a task within {host.plan.launch_s:g} s: does the script call"
                    host.failure = ("launch", f"{what} flare.init(), and flare.is_running() or flare.receive()?")
                    self.kill(host)
            if host.dead_at and (not host.connections or now - host.dead_at > _LAST_WORDS_S):
                self._ended(host)
        soon = any(h.dead_at or h.end_by != float("inf") or not h.connections for h in self._by_id.values())
        self._look_at = now + (_LOOK_S if soon else _GLANCE_S)

    def next_check_s(self, now: float) -> float:
        """How long until `tick` may have something to do."""
        return max(0.0, self._look_at - now)

    def _ended(self, host: Host) -> None:
        del self._by_id[host.id]
        if self._by_key.get(host.plan.key) is host:
            del self._by_key[host.plan.key]
        waiting = [host.run, *host.behind] if host.run is not None else []
        host.run = None
        host.behind.clear()
        run = self._at_work(host, waiting)
        self._events.on_ended(host, run, [other for other in waiting if other is not run])

    def _mark(self, host: Host) -> str:
        return f"{self._channel.path}.{host.id}"

    def _at_work(self, host: Host, waiting: Sequence[Run]) -> Run | None:
        """Which of its unanswered tasks a worker that has ended was at: the answers for those before may be lost."""
        first = waiting[0] if waiting else None
        if host.plan.lane:
            return first
        mark = Path(self._mark(host))
        found = mark.read_bytes() if mark.is_file() else b""
        mark.unlink(missing_ok=True)
        run = next((run for run in waiting if mark_of(run.key) == found), None)
        if run is not None:
            run.started_at = run.started_at or time.monotonic()
        salvage(str(mark), run.log_path if run is not None else host.plan.request.log_path)
        return run or first

    def how_it_ended(self, host: Host) -> tuple[str, bool]:
        """A host's end in words, and whether the task was killed rather than wrong."""
        code = host.exit_code if host.exit_code is not None else host.process.poll()
        if code is None:
            code = -9
        # an exit that Python itself went through says goodbye first: os._exit and signals do not
        unheard = host.plan.client is not None and not host.heard and 0 < code < 128
        return describe_exit(code), not (host.left or unheard)

    def close(self, grace_s: float, drain: Callable[[float], None] | None = None) -> None:
        """End all hosts: by themselves within the grace, or killed.

        Args:
            drain: lets the channel's messages come in for so many seconds: what ended hosts said last.
        """
        deadline = time.monotonic() + grace_s
        for host in self.hosts():
            self.stop(host, grace_s)
        for host in self.hosts():
            host.process.wait(max(0.0, deadline - time.monotonic()))
            host.process.kill()
        deadline = time.monotonic() + _DEATH_S
        for host in self.hosts():
            if host.process.wait(max(0.0, deadline - time.monotonic())) is None:
                log.error("host_does_not_die", host=host.id, pid=host.process.pid)
        self._closing = True
        deadline = time.monotonic() + _LAST_WORDS_S
        while drain is not None and any(host.connections for host in self.hosts()) and time.monotonic() < deadline:
            drain(0.05)
        for host in self.hosts():
            if host.failure is not None and host.run is None:
                self._ended(host)  # it failed behind its last task: still to be told
        self._by_id.clear()
        self._by_key.clear()


def together(specs: Sequence[TaskSpec]) -> Map:
    """Tasks for one worker as one message: the first, and what is different of each."""
    first = specs[0]
    shared = [(name, getattr(first, name)) for name in _FIELDS]
    own = [
        {name: value for name, theirs in shared if (value := getattr(spec, name)) is not theirs and value != theirs}
        for spec in specs
    ]
    return {"op": "tasks", "first": first.to_map(), "own": own}


def _of_no_task(message: Map) -> bool:
    """Whether a host says that it failed with no task in hand."""
    return message["op"] == "failed" and not message.get("task")
