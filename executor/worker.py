"""The working side of an agent: a task that has its slot gets a host or a thread, and what comes of it is told on.

Runs in the agent's thread.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from ..serialization.codec import check_plain
from ..serialization.errors import FedloomError
from ..serialization.messages import Event, JobId, Progress, Site
from .channel import ChannelServer, Map
from .config import parked_by_memory
from .context import TaskContext, TaskFunction
from .desk import Desk
from .host import run_task
from .hostpool import Host, HostPool
from .hosts import Spawner, log_tail
from .plans import host_plan, task_spec
from .runs import Run
from .script import ScriptExecutor
from .sitelogs import SiteLogs
from .slots import Slot
from .state import version_name

log = structlog.get_logger(__name__)

_LIMITS_S = 0.05


class Worker:
    """Starts tasks, hears of their hosts, and ends what must end.

    Args:
        finished: told of each result that a host or a function gave.
        stopping: whether the agent is on its way out.
    """

    def __init__(
        self,
        desk: Desk,
        channel: ChannelServer,
        spawner: Spawner,
        finished: Callable[[Run, Map], None],
        stopping: Callable[[], bool],
    ) -> None:
        self._desk = desk
        self._finished = finished
        self._stopping = stopping
        self.hosts = HostPool(channel, spawner, self)
        config = desk.config
        self.logs = SiteLogs(self._tell_log if config.share_logs else None, config.log_bytes)
        self._max_parked = parked_by_memory() if config.max_parked is None else config.max_parked
        self._limits_at = 0.0
        self._lost_memory: set[str] = set()
        self._seen_lanes: set[str] = set()

    def end_job(self, job: str) -> None:
        """The job is over: its hosts may finish what they do behind their loop, its files go after them."""
        for host in [host for host in self.hosts.hosts() if host.plan.job == job]:
            self.hosts.stop(host, max(host.plan.grace_s, self._desk.config.stop_grace_s))
        self.logs.flush(job, time.monotonic())
        self.forget_job(job)

    def forget_job(self, job: str) -> None:
        """Let its files go, if it has ended and nothing of it runs any more."""
        if job not in self._desk.ended_jobs or any(host.plan.job == job for host in self.hosts.hosts()):
            return
        self.logs.flush(job, time.monotonic(), closed=True)
        self._lost_memory = {lane for lane in self._lost_memory if not lane.startswith(f"{job}/")}
        self._seen_lanes = {lane for lane in self._seen_lanes if not lane.startswith(f"{job}/")}
        self._desk.jobs.forget(job)
        self._desk.jobs.prune_logs(self._desk.config.keep_logs)
        self._desk.states.forget(job, self._desk.config.sites)

    def close(self, grace_s: float, drain: Callable[[float], None] | None = None) -> None:
        """End everything that runs; ``drain`` lets what hosts said last come in."""
        for run in self._desk.runs.values():
            if run.context is not None:
                run.context.cancel()
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
            self._begin(run, slot)
        except (FedloomError, OSError) as error:
            self._desk.fail(run, "job", f"{run.item.site} cannot start the task: {error}")

    def _begin(self, run: Run, slot: Slot) -> None:
        link, hosts = self._desk.link, self.hosts
        run.stage = "running"
        run.started_at = 0.0
        state_path = self._state_path(run)
        incoming = ""
        result_path = self._desk.outbox.payload_path(*run.key)
        if link.local is not None and not run.work.prefolds:
            incoming = f"x-{run.item.task}.{run.item.attempt}.{secrets.token_hex(4)}"
            result_path = link.local.incoming_path(incoming)
        run.incoming = incoming
        run.spec = task_spec(run, self._desk.jobs, state_path, self._state_out(run), result_path, self._desk.digest)
        if run.work.function is not None:
            self._embedded(run, run.work.function)
            return
        plan = host_plan(run, slot, self._desk.jobs, self._desk.config.env)
        run.log_path = plan.request.log_path if not run.spec.log_path else run.spec.log_path
        self.logs.watch(run.job, run.item.site, run.log_path, time.monotonic())
        if plan.lane:
            fresh = hosts.find(plan.key) is None
            self._note_restart(run, fresh and not plan.once and not state_path)
        hosts.give(run, plan)
        if plan.lane:
            self._desk.slots.bind(plan.lane, slot)

    def _note_restart(self, run: Run, fresh: bool) -> None:
        """Whether a script that may have kept memory of its own starts without it."""
        lane = run.lane
        if fresh:
            elsewhere = lane not in self._seen_lanes and run.item.settled > 0
            run.restarted = run.restarted or elsewhere or lane in self._lost_memory
        self._seen_lanes.add(lane)
        self._lost_memory.discard(lane)

    def _state_path(self, run: Run) -> Path | None:
        item = run.item
        if not item.state:
            return None
        path = self._desk.states.path(item.site, run.job, item.state)
        if path.is_file():
            return path
        log.warning("state_lost", job=run.job, site=item.site, version=item.state)
        run.restarted = True
        data = {"task": item.task, "attempt": item.attempt, "version": item.state, "round": run.work.assign.round}
        text = f"{item.site} starts round {run.work.assign.round} without its state: version {item.state} is not here"
        self._desk.link.send(Event(run.work.assign.job, "state_lost", item.site, data, text))
        return None

    def _state_out(self, run: Run) -> Path:
        return self._desk.states.path(run.item.site, run.job, version_name(run.item.task, run.item.attempt))

    def _embedded(self, run: Run, function: TaskFunction) -> None:
        spec = run.spec
        assert spec is not None
        run.started_at = time.monotonic()

        def report(op: str, data: dict[str, Any]) -> None:
            check_plain(data)  # in the caller's thread, who can do something about it
            self._desk.post(lambda: self._told(run, {"op": op, **data}))

        def context_made(context: TaskContext) -> None:
            self._desk.post(lambda: self._has_context(run, context))

        def work() -> None:
            answer = run_task(function, spec, report, context_made)
            self._desk.post(lambda: self._told(run, answer))

        threading.Thread(target=work, name=f"fedloom-task-{run.item.site}", daemon=True).start()

    def _has_context(self, run: Run, context: TaskContext) -> None:
        run.context = context
        if run.cancelled or self._stopping():
            context.cancel()

    def on_idle(self, host: Host) -> None:
        """A host waits for its next task."""
        hosts = self.hosts
        parked = hosts.parked()
        for other in parked[: max(0, len(parked) - self._max_parked)]:
            log.info("host_parked_too_long", key=other.plan.key, parked=len(parked), allowed=self._max_parked)
            self._lost_memory.add(other.plan.lane)
            hosts.stop(other, self._desk.config.stop_grace_s)

    def on_message(self, host: Host, message: Map) -> None:
        """A host's word about its task."""
        if host.run is None:
            if message["op"] == "event":
                self._desk.event(host.plan.job, host.plan.lane.partition("/")[2], message)
            return
        self._told(host.run, message, host)

    def on_ended(self, host: Host, run: Run | None) -> None:
        """A host is gone; its unanswered task with it."""
        hosts = self.hosts
        plan = host.plan
        if plan.lane and hosts.find(plan.key) is None:
            self._desk.slots.unbind(plan.lane)
        text, killed = hosts.how_it_ended(host)
        if plan.lane and not host.stopping and not host.left and not plan.once:
            self._lost_memory.add(plan.lane)
        if run is not None and run.cancelled:
            self._thrown_away(run)
        elif run is not None and run.key in self._desk.runs:
            self._unanswered(host, run, text, killed)
        elif host.failure is not None or (killed and not host.stopping and not host.told):
            self._unheard(host, host.failure[1] if host.failure is not None else f"its process {text}")
        for left in host.leftovers:
            left.unlink(missing_ok=True)
        if plan.lane:
            self.logs.flush(plan.job, time.monotonic())
        self.forget_job(plan.job)

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

    def _told(self, run: Run, message: Map, host: Host | None = None) -> None:
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
        if run.key not in self._desk.runs or run.cancelled:
            self._thrown_away(run)
        elif message["op"] == "failed":
            self._desk.fail(run, str(message.get("code", "exception")), str(message.get("text", "")))
        else:
            with self._desk.answering(run):
                self._finished(run, message)

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
        host = next((host for host in hosts.hosts() if host.run is run), None)
        if run.stage != "running" or (host is None and run.work.function is None):
            self._desk.end(run)
            return
        if host is None:
            run.kill_at = float("inf")
        elif host.state == "starting" or host.plan.once:
            self._kill_host(host, run)
            self._desk.end(run)
        else:
            hosts.cancel(host)
            keeps_memory = isinstance(run.settings, ScriptExecutor)
            run.kill_at = float("inf") if keeps_memory else time.monotonic() + self._desk.config.cancel_grace_s
        self._desk.let_go(run.key)

    def _thrown_away(self, run: Run) -> None:
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
        for run in list(self._desk.runs.values()):
            if run.stage != "running":
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
        for host in hosts.hosts():
            if host.run is run:
                if host.plan.lane and not host.plan.once:
                    self._lost_memory.add(host.plan.lane)
                self._kill_host(host, run)

    def _kill_host(self, host: Host, run: Run) -> None:
        host.run = None
        if run.spec is not None:  # it may still be writing when the run's files are removed
            host.leftovers += [Path(run.spec.result_path), Path(run.spec.state_out)]
        self.hosts.kill(host)
