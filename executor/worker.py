"""The working side of an agent: a task that has its slot gets a host or a thread, and what comes of it is told on.

Runs in the agent's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from ..serialization.codec import unpack
from ..serialization.errors import FedloomError
from ..serialization.messages import Event, JobId, Progress, Site
from .channel import ChannelServer, Map
from .collector import Collector
from .config import parked_by_memory
from .desk import Desk
from .hostpool import Host, HostPool
from .hosts import Spawner, log_tail
from .inprocess import HERE, InProcess
from .prefold import Gather
from .runs import Run
from .script import ScriptExecutor
from .sitelogs import SiteLogs
from .slots import Slot
from .starts import Memories, Starts

log = structlog.get_logger(__name__)

_LIMITS_S = 0.05


class Worker:
    """Starts tasks, hears of their hosts, and ends what must end.

    Args:
        collector: what it tells of each result that a host or a function gave.
        stopping: whether the agent is on its way out.
    """

    def __init__(
        self,
        desk: Desk,
        channel: ChannelServer,
        spawner: Spawner,
        collector: Collector,
        stopping: Callable[[], bool],
    ) -> None:
        self._desk = desk
        self._collector = collector
        self._stopping = stopping
        self.hosts = HostPool(channel, spawner, self)
        config = desk.config
        self.logs = SiteLogs(self._tell_log if config.share_logs else None, config.log_bytes)
        self._max_parked = parked_by_memory() if config.max_parked is None else config.max_parked
        self._limits_at = 0.0
        self._memories = Memories()
        self._starts = Starts(desk, self.hosts, self.logs, self._memories)
        self._here = InProcess(desk, self, stopping)

    def end_job(self, job: str) -> None:
        """The job is over: its hosts may finish what they do behind their loop, its files go after them."""
        for host in [host for host in self.hosts.hosts() if host.plan.job == job]:
            self.hosts.stop(host, max(host.plan.grace_s, self._desk.config.stop_grace_s))
        self.logs.flush(job, time.monotonic())
        self._here.forget(job)
        self.forget_job(job)

    def forget_job(self, job: str) -> None:
        """Let its files go, if it has ended and nothing of it runs any more."""
        if job not in self._desk.ended_jobs or any(host.plan.job == job for host in self.hosts.hosts()):
            return
        self.logs.flush(job, time.monotonic(), closed=True)
        self._memories.forget(job)
        self._desk.slots.forget(job)
        self._desk.jobs.forget(job)
        self._desk.jobs.prune_logs(self._desk.config.keep_logs)
        desk = self._desk

        def sweep() -> None:  # of thousands of sites, which takes a while
            desk.jobs.sweep(job, self._stopping)
            desk.states.forget(job, desk.config.sites)

        desk.submit(sweep, lambda _, error: None)

    def close(self, grace_s: float, drain: Callable[[float], None] | None = None) -> None:
        """End everything that runs; ``drain`` lets what hosts said last come in."""
        for run in self._desk.runs.values():
            if run.context is not None:
                run.context.cancel()
        self._here.close()
        self.hosts.close(grace_s, drain)
        for job in {host_job for host_job, _ in self.logs.watched()}:
            self.logs.flush(job, time.monotonic(), closed=True)
        self.logs.turn(time.monotonic())
        self._tell_points(time.monotonic(), everything=True)

    def _tell_log(self, job: str, site: str, text: str) -> bool:
        link = self._desk.link
        if link.state != "up":
            return False
        link.send(Event(JobId(job), "log", Site(site), text=text))
        return True

    def _tell_points(self, now: float, everything: bool = False) -> None:
        desk = self._desk
        desk.points.turn(now, desk.link.state == "up", desk.points.jobs if everything else desk.ended_jobs)

    # ------------------------------------------------------------ a task begins

    def begin(self, run: Run, slot: Slot) -> None:
        """Start a task in its slot, which it keeps until it is answered."""
        self._desk.slot_of[run.key] = slot
        try:
            self._starts.describe(run)
            if run.work.function is not None:
                self._here.begin(run, run.work.function)
                for other in self._starts.along(run, slot):
                    with self._desk.answering(other):
                        self._here.begin(other, run.work.function)
            else:
                self._starts.give(run, slot)
        except (FedloomError, OSError) as error:
            self._desk.fail(run, "job", f"{run.item.site} cannot start the task: {error}")

    def flush(self, id: str, gather: Gather, path: str, digest: bool) -> bool:
        """Ask a worker for what it has folded of a gather; False where there is no such worker any more."""
        if id != HERE:
            return self.hosts.flush(id, gather, path, digest)
        self._here.flush(*gather, path, digest)
        return True

    def on_idle(self, host: Host) -> None:
        """A host waits for its next task."""
        hosts = self.hosts
        parked = hosts.parked()
        for other in parked[: max(0, len(parked) - self._max_parked)]:
            log.info("host_parked_too_long", key=other.plan.key, parked=len(parked), allowed=self._max_parked)
            self._memories.lose(other.plan.lane)
            hosts.stop(other, self._desk.config.stop_grace_s)

    def on_message(self, host: Host, message: Map) -> None:
        """A host's word about its task."""
        if message["op"] == "partial":
            self.handed_over(host.id, host.plan.job, message)
            return
        if message["op"] == "results":
            self._folded(host, message["items"])
            return
        if host.run is None:
            if message["op"] == "event":
                self._desk.event(host.plan.job, host.plan.lane.partition("/")[2], message)
            return
        self.told(host.run, message, host)

    def on_ended(self, host: Host, run: Run | None, behind: Sequence[Run]) -> None:
        """A host is gone; its unanswered task with it, and what it had folded."""
        for other in behind:
            self._back(other)
        hosts = self.hosts
        plan = host.plan
        if plan.lane and hosts.find(plan.key) is None:
            self._desk.slots.unbind(plan.lane)
        text, killed = hosts.how_it_ended(host)
        self._collector.worker_lost(host.id, f"its worker {text}")
        if plan.lane and not host.stopping and not host.left and not plan.once:
            self._memories.lose(plan.lane)
        if run is not None and run.cancelled:
            self.thrown_away(run)
        elif run is not None and run.key in self._desk.runs:
            self._unanswered(host, run, text, killed)
        elif host.failure is not None or (killed and not host.stopping and not host.told):
            self._unheard(host, host.failure[1] if host.failure is not None else f"its process {text}")
        for left in host.leftovers:
            left.unlink(missing_ok=True)
        if plan.lane:
            self.logs.flush(plan.job, time.monotonic())
        self.forget_job(plan.job)

    def _back(self, run: Run) -> None:
        """A task that its worker had not begun goes to another."""
        if run.key not in self._desk.runs:
            return
        if run.cancelled:
            self._desk.end(run)
            return
        self._desk.slots.release(run.key)
        self._desk.slot_of.pop(run.key, None)
        run.stage = "waiting"
        self._desk.slots.push(run.key, run.lane)

    def _unanswered(self, host: Host, run: Run, text: str, killed: bool) -> None:
        if host.sent and not run.started_at:  # it had ended before this task reached it
            if host.failure is not None:
                self._unheard(host, host.failure[1])
            self._again(run)
        elif host.failure is not None:
            self._desk.fail(run, *host.failure)
        elif host.left and not killed and (host.exit_code or 0) == 0:
            name = getattr(run.settings, "task_script_path", "the script")
            self._desk.fail(
                run,
                "no_result",
                f"{name} ended without sending a result for {run.spec}: call flare.send() once for each flare.receive()"
                + self._log_tail(run),
            )
        elif killed:
            where = f"the process of {run.item.site} {text} while it worked on {run.spec}"
            self._desk.fail(run, "killed", where + self._log_tail(run), retryable=True, killed=True)
        else:
            self._desk.fail(run, "exit", f"the script of {run.item.site} {text}" + self._log_tail(run))

    def _unheard(self, host: Host, text: str) -> None:
        """A host failed with no task in hand: nobody waits for a result, and yet its user must see it."""
        site = host.plan.lane.partition("/")[2]
        last = text.strip().rpartition("\n")[2]  # the whole of it is in the site's own log, and in the run's failures
        log.warning("host_failed_between_tasks", job=host.plan.job, site=site, text=last)
        event = {"kind": "script_error", "data": {"text": text[-4000:], "round": host.last_round}}
        self._desk.event(host.plan.job, site, event)

    def _again(self, run: Run) -> None:
        slot = self._desk.slot_of[run.key]
        self.begin(run, slot)

    @staticmethod
    def _log_tail(run: Run) -> str:
        tail = log_tail(run.log_path, run.log_start) if run.log_path else ""
        return f"; the end of its log {run.log_path}:\n{tail}" if tail else ""

    def told(self, run: Run, message: Map, host: Host | None = None) -> None:
        """Something about a running task."""
        link, hosts = self._desk.link, self.hosts
        match message["op"]:
            case "event":
                self._desk.event(run.job, run.item.site, message)
                return
            case "progress":
                done, note = min(1.0, max(0.0, float(message.get("done", 0.0)))), str(message.get("note", ""))[:1000]
                link.send(Progress(run.item.task, run.item.attempt, done, note))
                return
            case "result" | "failed":
                self._desk.points.hurry(run.job)
            case op:
                log.debug("host_op_ignored", op=op)
                return
        if (message.get("task"), message.get("attempt")) != run.key:
            return
        if host is not None:
            host.told = message["op"] == "failed"
            hosts.answered(host)
        if message["op"] == "result":
            self._took(run, float(message.get("run_s", 0.0)))
        if host is None and message.get("folded"):
            with self._desk.answering(run):
                seconds, wrote = float(message["run_s"]), bool(message["wrote_state"])
                self._collector.folded(run, seconds, wrote, message["meta"], HERE, time.monotonic())
        elif run.key not in self._desk.runs or run.cancelled:
            self.thrown_away(run)
        elif message["op"] == "failed":
            self._desk.fail(run, str(message.get("code", "exception")), str(message.get("text", "")))
        else:
            with self._desk.answering(run):
                self._collector.finished(run, message)

    def handed_over(self, worker: str, job: str, message: Map) -> None:
        """A partial of what a worker, or this process, has folded."""
        self._collector.handed_over(worker, job, message)

    def _took(self, run: Run, seconds: float) -> None:
        self._starts.took(run, seconds)
        self._desk.slots.took(run.lane, seconds)

    def _folded(self, host: Host, items: Sequence[Any]) -> None:
        """Tasks of a worker that has folded their results, see `replies`."""
        now, jobs = time.monotonic(), set[str]()
        for task, attempt, run_s, wrote_state, plain in items:
            run = host.run
            if run is None or run.key != (task, attempt):
                continue
            jobs.add(run.job)
            host.told = False
            self.hosts.answered(host, now)
            self._took(run, float(run_s))
            with self._desk.answering(run):
                self._collector.folded(run, float(run_s), bool(wrote_state), unpack(plain), host.id, now)
        for job in jobs:
            self._desk.points.hurry(job)

    def abandon(self, run: Run) -> None:
        """The broker wants this attempt no more. Scripts go on to their next `send`, which is thrown away: they have
        memory to lose. Functions are told, and their worker is killed if they do not listen.
        """
        hosts = self.hosts
        if run.cancelled or run.stage in ("folding", "storing"):
            return  # its result is refused by the broker when it comes
        run.cancelled = True
        if run.context is not None:
            run.context.cancel()
        host = next((host for host in hosts.hosts() if host.run is run or run in host.behind), None)
        if run.stage != "running" or (host is None and run.work.function is None):
            self._desk.end(run)
            return
        if host is None:
            run.kill_at = float("inf")
        elif host.state == "starting" or host.plan.once:
            self._kill_host(host, run)
            self._desk.end(run)
        else:
            hosts.cancel(host, run)
            waits = isinstance(run.settings, ScriptExecutor) or host.run is not run  # for its end, or its turn
            run.kill_at = float("inf") if waits else time.monotonic() + self._desk.config.cancel_grace_s
        self._desk.let_go(run.key)

    def thrown_away(self, run: Run) -> None:
        """What came of an attempt that is wanted no more goes."""
        if run.key in self._desk.runs:
            self._desk.end(run)
        else:  # it had ended, timed out for one, while its code went on and wrote this
            self._desk.discard_files(run)

    def next_due_s(self, now: float) -> float:
        """How long until `turn` may have something to do."""
        return min(self.hosts.next_check_s(now), self.logs.next_due_s(now), self._desk.points.next_due_s(now))

    def turn(self, now: float) -> None:
        """Everything that time brings."""
        self.hosts.tick(now)
        self.logs.turn(now)
        self._tell_points(now)
        if now >= self._limits_at:
            self._limits_at = now + _LIMITS_S
            self._limits(now)

    def _limits(self, now: float) -> None:
        """End what was cancelled and goes on, and what runs longer than its user allows."""
        hosts = self.hosts
        for key in list(self._desk.slot_of):
            run = self._desk.runs.get(key)
            if run is None or run.stage != "running":
                continue
            if run.cancelled:
                if now > run.kill_at:
                    self._kill_run(run, hosts)
                    self._desk.end(run)
                continue
            limit = run.work.assign.config.get("run_s")
            if isinstance(limit, int | float) and limit > 0 and run.started_at and now - run.started_at > limit:
                self._kill_run(run, hosts)
                text = f"{run.spec} took longer than run_s={limit:g} s" + self._log_tail(run)
                self._desk.fail(run, "timeout", text, retryable=True)

    def _kill_run(self, run: Run, hosts: HostPool) -> None:
        if run.context is not None:
            run.context.cancel()
        if run.call is not None:
            self._here.give_up(run.call)
        for host in hosts.hosts():
            if host.run is run:
                if host.plan.lane and not host.plan.once:
                    self._memories.lose(host.plan.lane)
                self._kill_host(host, run)

    def _kill_host(self, host: Host, run: Run) -> None:
        host.run = None
        if run.spec is not None:  # it may still be writing when the run's files are removed
            host.leftovers += [Path(run.spec.result_path), Path(run.spec.state_out)]
        self.hosts.kill(host)
