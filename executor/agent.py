"""The agent: an executor's link, leases, payloads, slots and hosts, in one thread that is handed everything as calls.

A task's way: Assign, Accept, prepared (code, payload, fold plan) in a pool thread, a slot, a host (or a thread, for
functions embedded in this process), a result, the outbox or a batch to fold, Done, Stored.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping

import structlog

from ..broker.link import Link
from ..serialization.envelope import Buffer
from ..serialization.errors import FaultError, FedloomError, JobError
from ..serialization.messages import (
    Accept,
    Assign,
    Cancel,
    Decline,
    Fault,
    Hello,
    Message,
    Ping,
    Stored,
    TaskRef,
    Welcome,
)
from .channel import ChannelServer, Map
from .collector import Collector
from .config import AgentConfig
from .context import TaskFunction
from .deliver import LinkLike
from .desk import Desk
from .hosts import Spawner, SubprocessSpawner
from .lock import WorkspaceLock
from .prepare import Preparer
from .runs import Run, Work
from .worker import Worker

__all__ = ["Agent", "AgentConfig", "LinkFactory"]

log = structlog.get_logger(__name__)

_DECLINE_S = 2.0
_CALLS_A_TURN = 1024
_MAX_ENDED_JOBS = 1024
_PING_SHARE = 8  # of what it may hold must have become free before it says so, while there is work here still

LinkFactory = Callable[..., LinkLike]


class Agent:
    """One executor. `start` connects, `stop` ends it; both from any thread. It is started once.

    Args:
        spawner: what starts its hosts.
        functions: task functions embedded in this process, by task name (``"*"``: any).
        link_factory: what makes the link; tests give a fake.
    """

    def __init__(
        self,
        config: AgentConfig,
        spawner: Spawner | None = None,
        functions: Mapping[str, TaskFunction] | None = None,
        *,
        link_factory: LinkFactory = Link,
    ) -> None:
        if not config.sites:
            raise JobError("an executor without sites: name at least one")
        self.config = config
        self.fatal: FaultError | None = None
        self._sites = frozenset(config.sites)
        self._functions = dict(functions or {})
        self._spawner = spawner or SubprocessSpawner()
        self._link_factory = link_factory
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._end_lock = threading.Lock()
        self._when_ended: list[Callable[[], None]] = []
        self._stop_grace_s = 0.0
        self._told_free = 0
        self._lock: WorkspaceLock | None = None
        self._desk: Desk | None = None
        self._channel: ChannelServer | None = None
        self._worker: Worker | None = None
        self._collector: Collector | None = None
        self._preparer: Preparer | None = None
        self._asking = False
        self._closing = False  # hosts are ended: of what comes in, their last words count
        self._thread = threading.Thread(target=self._main, name="fedloom-agent", daemon=True)

    # ------------------------------------------------------------ any thread

    def start(self) -> Welcome:
        """Connect and begin to work.

        Raises:
            LinkTimeout: no broker answered. FaultError: it refused (``name_taken``: another live executor serves the
                site). JobError: another process works in this workspace.
        """
        config = self.config
        self._lock = WorkspaceLock(config.workspace, config.node)
        try:
            welcome = self._connect(config)
        except (FedloomError, OSError):
            self._close()
            raise
        log.info("executor_up", node=config.node, sites=len(config.sites), capacity=config.capacity)
        return welcome

    def _connect(self, config: AgentConfig) -> Welcome:
        assert self._lock is not None
        desk = self._desk = Desk(config, self._post)
        hello = Hello(
            node=config.node, role="executor", boot=secrets.token_hex(16), capacity=config.announced, pool=config.pool
        )
        desk.link = self._link_factory(
            config.endpoint,
            hello,
            sites=config.sites,
            held=desk.held_refs,
            on_message=self._receive,
            free=lambda: desk.free,
        )
        self._collector = Collector(desk)
        self._channel = ChannelServer(self._from_channel)
        self._worker = Worker(desk, self._channel, self._spawner, self._collector, self._stopping.is_set)
        self._collector.workers = self._worker
        self._preparer = Preparer(desk, self._functions)
        self._told_free = desk.free
        welcome = desk.link.start(config.connect_s)
        self._lock.connected()
        desk.digest = welcome.integrity == "digest"
        self._thread.start()
        return welcome

    def stop(self, grace_s: float = 0.3) -> None:
        """End all hosts, say goodbye and stop. What is in the outbox is sent by the next agent in this workspace."""
        self._stop_grace_s = grace_s
        self._stopping.set()
        self._post(lambda: None)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(grace_s + 15.0)

    @property
    def was_killed(self) -> bool:
        """Whether the executor before this one in the workspace ended without saying goodbye."""
        return self._lock is not None and self._lock.was_killed

    @property
    def ended(self) -> bool:
        """Whether it has stopped, by itself or told to."""
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the agent's end; True once it has ended.

        Raises:
            FaultError: the broker ended it, such as another executor under the same name.
        """
        ended = self._ended.wait(timeout_s)
        if ended and self.fatal is not None:
            raise self.fatal
        return ended

    def when_ended(self, tell: Callable[[], None]) -> None:
        """Call this once it has ended, in the agent's thread (now, if it has)."""
        with self._end_lock:
            if not self._ended.is_set():
                self._when_ended.append(tell)
                return
        tell()

    def _post(self, call: Callable[[], None]) -> None:
        self._calls.put(call)

    def _receive(self, message: Message, tail: Buffer) -> None:
        data = bytes(tail)  # the link's memory is its own again when this returns
        self._post(lambda: self._on_message(message, data))

    def _from_channel(self, connection: int, host: str, role: str, message: Map | None) -> None:
        self._post(lambda: self._parts[1].hosts.on_channel(connection, host, role, message))

    # ------------------------------------------------------------ the loop

    @property
    def _parts(self) -> tuple[Desk, Worker, Collector]:
        assert self._desk is not None and self._worker is not None and self._collector is not None
        return self._desk, self._worker, self._collector

    def _main(self) -> None:
        try:
            while not self._stopping.is_set():
                self._turn()
        except Exception as error:
            log.exception("agent_crashed")
            self.fatal = FaultError("internal", f"the agent failed: {error!r}")
        finally:
            self._closing = True
            self._parts[1].close(self._stop_grace_s, self._drain)
            if self._lock is not None and self.fatal is None:
                self._lock.goodbye()
            self._close()
            with self._end_lock:
                self._ended.set()
            for tell in self._when_ended:
                tell()
            log.info("executor_down", node=self.config.node)

    def _close(self) -> None:
        if self._desk is not None:
            self._desk.link.close("the executor stops")
            self._desk.close()
        if self._channel is not None:
            self._channel.close()
        if self._lock is not None:
            self._lock.close()

    def _turn(self) -> None:
        desk, worker, collector = self._parts
        now = time.monotonic()
        timeout = min(worker.next_due_s(now), collector.next_due_s(now))
        try:
            call = self._calls.get(timeout=timeout)
            for _ in range(_CALLS_A_TURN):
                self._guarded(call)
                call = self._calls.get_nowait()
            self._guarded(call)
        except queue.Empty:
            pass
        now = time.monotonic()
        worker.turn(now)
        for key, slot in desk.slots.take():
            run = desk.runs[key]
            with desk.answering(run):
                worker.begin(run, slot)
        collector.turn(now)
        free = desk.free
        more = free - self._told_free
        if more > 0 and (not desk.slots.waiting or more > self.config.announced // _PING_SHARE):
            if desk.parked or collector.delivery.uploading:  # else the broker counts as we do: all was told in a Done
                desk.link.send(Ping(free))  # room for more at once, not at the next ping
            self._told_free = free
        elif more < 0:
            self._told_free = free

    def _drain(self, timeout_s: float) -> None:
        with contextlib.suppress(queue.Empty):
            self._guarded(self._calls.get(timeout=timeout_s))

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            log.exception("agent_call_failed")

    # ------------------------------------------------------------ the broker's messages

    def _on_message(self, message: Message, tail: bytes) -> None:
        desk, _, collector = self._parts
        if self._closing:
            return
        match message:
            case Assign():
                work = Work(message, tail)
                runs = [Run(work, item) for item in message.items]
                with desk.answering(*runs):
                    self._assign(work, runs)
            case Stored():
                collector.delivery.stored(message)
            case Cancel():
                self._cancel(message)
            case Welcome():
                collector.delivery.repeat()
                desk.points.again()
                self._ask_after_jobs()
            case Fault() if message.fatal:
                self.fatal = FaultError(message.code, message.text)
                log.error("executor_refused", code=message.code, text=message.text)
                self._stopping.set()
            case Fault():
                log.warning("fault", code=message.code, text=message.text)
            case _:
                log.debug("message_ignored", kind=type(message).__name__)

    def _assign(self, work: Work, runs: list[Run]) -> None:
        desk, worker, collector = self._parts
        message = work.assign
        accepted: list[TaskRef] = []
        declined: list[TaskRef] = []
        fresh: list[Run] = []
        for run in runs:
            item = run.item
            if item.site not in self._sites or message.job in desk.ended_jobs:
                declined.append(run.ref)
                continue
            accepted.append(run.ref)
            if run.key in desk.runs or run.key in collector.delivery:
                continue
            for old in desk.attempts(item.task):
                worker.abandon(old)  # an attempt that the broker has given up
            collector.delivery.drop_older(run.key)
            desk.add(run)
            fresh.append(run)
        if accepted:
            desk.link.send(Accept(tuple(accepted)))
        if declined:
            reason = f"{self.config.node} does not serve this site, or the job has ended"
            desk.link.send(Decline(tuple(declined), reason, _DECLINE_S))
        if fresh:
            work.open = len(fresh)
            work.runs = fresh
            work.known = desk.count_tasks((message.job, message.gather), len(fresh))
            preparer = self._preparer
            assert preparer is not None
            desk.submit(lambda: preparer.prepare(work), lambda _, error: self._prepared(work, error))
            if not message.redo:  # which may start from an older version than the current one
                collector.drop_old_states(message.job, [run.item.site for run in fresh])

    def _prepared(self, work: Work, error: Exception | None) -> None:
        _, worker, _ = self._parts
        assert self._preparer is not None
        self._preparer.prepared(work, error)
        worker.forget_job(work.assign.job)  # where the job ended meanwhile, its code was unpacked for nobody

    def _cancel(self, message: Cancel) -> None:
        desk, worker, collector = self._parts
        for ref in message.tasks:
            if (run := desk.runs.get((ref.task, ref.attempt))) is not None:
                worker.abandon(run)
            else:
                collector.delivery.drop((ref.task, ref.attempt))
        if message.tasks:
            return
        for run in [run for run in desk.runs.values() if run.job == message.job]:
            worker.abandon(run)
        if message.ended:
            self._job_ended(message.job)

    def _job_ended(self, job: str) -> None:
        desk, worker, collector = self._parts
        for run in [run for run in desk.runs.values() if run.job == job]:
            worker.abandon(run)
        desk.ended_jobs[job] = None
        while len(desk.ended_jobs) > _MAX_ENDED_JOBS:
            del desk.ended_jobs[next(iter(desk.ended_jobs))]
        collector.drop_job(job)
        worker.end_job(job)

    def _ask_after_jobs(self) -> None:
        """Whether the jobs that this executor has something of go on: it may have missed their end."""
        desk, worker, _ = self._parts
        jobs = sorted({*desk.jobs.on_disk(), *(host.plan.job for host in worker.hosts.hosts())})
        preparer = self._preparer
        if self._asking or not jobs or preparer is None:
            return
        self._asking = True

        def told(ended: list[str] | None, error: Exception | None) -> None:
            self._asking = False
            if error is not None:
                log.warning("jobs_not_known", error=repr(error))
            for job in ended or ():
                self._job_ended(job)

        desk.submit(lambda: preparer.ended_jobs(jobs), told)
