"""What all tasks of one Assign need before they can start: the job's code, the payload, the fold's plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import structlog

from ..serialization import spans
from ..serialization.codec import unpack
from ..serialization.errors import FaultError, FedloomError, JobError, LinkError
from ..serialization.jobvars import substitute
from ..serialization.messages import INLINE_BYTES, Answer, Ask, Assign, Decline, JobId, PayloadRef
from .config import available_bytes
from .context import TaskFunction
from .desk import Desk
from .jobs import JobFolder
from .plans import run_variables
from .runs import Work
from .script import FunctionExecutor, Settings, settings_of

log = structlog.get_logger(__name__)

_FETCH_S = 24 * 3600.0
_DECLINE_S = 2.0
_ASK_S = 60.0
_MAX_ANSWER_BYTES = 1024 * 1024
#: From how many results on a partial pays: see `Preparer._pays`.
_PAYS_AFAR = 4
PAYS_HERE = 16
PAYS_A_WORKER = 4
#: Of the memory that is free when the executor starts, what its workers' sums may take; a sum has 8 bytes for each
#: value of the model, which has 4 or 2.
MEMORY_SHARE = 4
_SUM_BYTES = 4
#: A plan goes to each worker in a message of its channel.
_MAX_PLAN_BYTES = 512 * 1024


class Preparer:
    """Prepares in a pool thread; what comes of it is seen to in the agent's."""

    def __init__(self, desk: Desk, functions: Mapping[str, TaskFunction]) -> None:
        self._desk = desk
        self._functions = functions
        self._memory = available_bytes() // MEMORY_SHARE

    def prepare(self, work: Work) -> None:
        """In a pool thread. What is here already is not fetched again."""
        desk, message = self._desk, work.assign
        began = spans.start()
        work.function = self._functions.get(message.name) or self._functions.get("*")
        if message.archive is not None:
            work.job = desk.jobs.ensure(message.job, message.archive, lambda ref: desk.link.fetch(ref, _FETCH_S))
            known: dict[int, Settings] = {}  # of components that say the same at each site
            for site in {item.site for item in message.items}:
                try:
                    work.settings[site] = self._settings(work.job, message, site, known)
                except JobError as error:
                    if work.function is None:
                        work.refused[site] = error  # this site's alone: the others work on
        if message.archive is None and work.function is None:
            raise JobError(
                f"task {message.name!r} of job {message.job} has no code: no function here and no script in it"
            )
        if message.payload is not None:
            inline = len(work.tail) == message.payload.size
            work.payload = work.tail if inline else desk.cache.fetch(message.payload, self._fetch)
            work.pinned = desk.cache.holds(work.payload)
        if message.partials and message.fold is not None and self._pays(work):
            got = desk.cache.fetch(message.fold, self._fetch)
            work.plan = got.read_bytes() if isinstance(got, Path) else got
            desk.cache.unpin(message.fold.id)
            work.in_workers = self._in_process(work) or (len(work.plan) <= _MAX_PLAN_BYTES and self._in_workers(work))
        spans.end("fetch", began, round=message.round)

    def _pays(self, work: Work) -> bool:
        """Whether folding here is less work than sending each result.

        A partial is twice a result's size, and is written and added once more. Over a network that pays early. Where
        the broker takes the results' files as they lie, only what it saves of the spool counts.
        """
        payload = work.assign.payload
        if self._desk.config.partial_max_tasks < 2:
            return False
        if payload is None or payload.size <= INLINE_BYTES:
            return True
        return work.known >= (_PAYS_AFAR if self._desk.link.local is None else PAYS_HERE) or self._in_workers(work)

    def _in_workers(self, work: Work) -> bool:
        """Whether workers fold their own results: each has several, and memory holds a sum for each of them."""
        payload, workers = work.assign.payload, self._desk.config.capacity
        functions = all(isinstance(settings, FunctionExecutor) for settings in work.settings.values())
        if work.function is not None or payload is None or not work.assign.partials or not functions:
            return False
        return work.known >= PAYS_A_WORKER * workers and _SUM_BYTES * payload.size * workers <= self._memory

    @staticmethod
    def _in_process(work: Work) -> bool:
        """Whether results of embedded functions are folded where they are made: of small models, since a partial of
        one result alone is twice its size.
        """
        payload = work.assign.payload
        small = payload is not None and payload.size <= INLINE_BYTES
        return work.function is not None and small and work.known >= PAYS_A_WORKER

    def _settings(self, job: JobFolder, message: Assign, site: str, known: dict[int, Settings]) -> Settings:
        """What works on these tasks at a site.

        Raises:
            JobError: nothing does, or it is not what the job says.
        """
        component = job.spec.executor_for(message.name, site)
        if (settings := known.get(id(component))) is not None:
            return settings
        variables = run_variables(message.job, site, self._desk.jobs)
        args = substitute(component.args, variables, f"executor {component.path}")
        settings = settings_of(replace(component, args=args))
        if args == component.args:
            known[id(component)] = settings
        return settings

    def _fetch(self, ref: PayloadRef, dest: Path) -> Path | bytes:
        return self._desk.link.fetch(ref, _FETCH_S, dest)

    def prepared(self, work: Work, error: Exception | None) -> None:
        """Its tasks may start, or have ended."""
        desk = self._desk
        work.prepared = True
        runs = [run for run in work.runs if desk.runs.get(run.key) is run and run.stage == "preparing"]
        work.runs.clear()
        desk.close_work(work)  # all of them may have been cancelled meanwhile
        if error is None:
            for run in runs:
                if (refused := work.refused.get(run.item.site)) is not None:
                    desk.fail(run, "job", f"{run.item.site}: {refused}")
                    continue
                run.stage = "waiting"
                desk.slots.push(run.key, run.lane)
            return
        log.warning("task_not_prepared", job=work.assign.job, task=work.assign.name, error=str(error))
        for run in runs:
            if isinstance(error, JobError):
                desk.fail(run, "job", f"{run.item.site}: {error}")
            elif isinstance(error, LinkError):
                desk.link.send(Decline((run.ref,), f"not prepared: {error}"[:1000], _DECLINE_S))
                desk.end(run)
            else:  # a try that counts: what is missing or damaged may be so for ever
                desk.fail(run, "site_error", f"{run.item.site} cannot prepare the task: {error!r}", retryable=True)

    def ended_jobs(self, jobs: list[str]) -> list[str]:
        """Those of these jobs that are over, as the broker says. In a pool thread.

        A Cancel that ends a job is not repeated, and an executor that was away may have missed it.
        """
        link = self._desk.link
        ended: list[str] = []
        for job in jobs:
            try:
                answer, tail = link.request(Ask(link.next_ref(), "job", JobId(job)), timeout_s=_ASK_S)
            except FaultError as fault:
                if fault.code == "unknown_job":
                    ended.append(job)
                continue
            except FedloomError:
                break  # the link is gone: the next Welcome asks again
            if isinstance(answer, Answer):
                data = unpack(tail, max_bytes=_MAX_ANSWER_BYTES) if len(tail) else answer.data
                if str(data.get("status", "")).startswith("FINISHED"):
                    ended.append(job)
        return ended
