"""A job's own process: claims, fetches the job's code, runs its workflows, and says how it ended.

One job a process, so that a job's code cannot hurt another job. The process keeps nothing: killed at any instant,
another one goes on from the last commit.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import structlog

from ..broker.link import Link
from ..serialization import crew
from ..serialization.archive import unpack_archive
from ..serialization.errors import FaultError, FedloomError, FencedError, JobError, LinkError
from ..serialization.faultpoints import fault_point
from ..serialization.jobspec import JobSpec
from ..serialization.messages import Claimed, ClaimJob, EndJob, Hello, JobId
from ..serialization.processes import die_with_parent, setup_logging
from ..serialization.scratch import Scratch
from .federation import GIVE_UP_S, Federation
from .filters import filled
from .inbox import Inbox
from .mailbox import JobAborted
from .workflow import Workflow

log = structlog.get_logger(__name__)

Status = Literal["FINISHED:COMPLETED", "FINISHED:FAILED"]

#: Exit codes: the job has ended and the broker knows; or it has not, and whoever claims it next goes on.
ENDED = 0
FENCED = 3
LOST = 4
_MAX_REASON = 15 * 1024
#: Threads of a large fold where there are cores for them: with more, memory is what it waits for.
_FOLD_THREADS = 4


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What a job process needs to know."""

    broker: str
    job: str
    claim: int
    log_level: str = "info"
    log_json: bool = False


def run_job(request: JobRequest, work: Path) -> int:
    """Run a claimed job to its end, with its code unpacked in ``work``; the exit code of its process."""
    inbox = Inbox()
    hello = Hello(
        node=f"job/{request.job}/{request.claim}",
        role="job",
        boot=os.urandom(16).hex(),
        job=JobId(request.job),
        claim=request.claim,
    )
    link = Link(request.broker, hello, on_message=inbox.put, give_up_s=GIVE_UP_S)
    structlog.contextvars.bind_contextvars(job=request.job)
    try:
        link.start()
        claimed, _ = link.request(ClaimJob(link.next_ref(), JobId(request.job), request.claim))
        assert isinstance(claimed, Claimed)
        status, reason = _run(link, inbox, claimed, work)
        fault_point("job.before_end")
        link.request(EndJob(link.next_ref(), claimed.job, claimed.claim, status, reason), timeout_s=GIVE_UP_S)
        return ENDED
    except JobAborted as error:
        log.info("job_aborted", reason=str(error))
        return ENDED
    except FencedError as error:
        log.warning("job_fenced", reason=str(error))
        return FENCED
    except (FaultError, LinkError) as error:
        log.error("job_lost", reason=str(error))
        return LOST
    finally:
        link.close("the job process ends")


def _run(link: Link, inbox: Inbox, claimed: Claimed, work: Path) -> tuple[Status, str]:
    """The job's end: status and reason. Errors of the wire go to the caller, the job's own end the job."""
    try:
        fed = _prepare(link, inbox, claimed, work)
        for number, component in enumerate(fed.spec.workflows):
            if not fed.enter(number):
                continue
            workflow = component.build()
            if not isinstance(workflow, Workflow):
                raise JobError(f"workflow {component.path} is a {type(workflow).__name__}, not a fedloom Workflow")
            workflow.run(fed)
            fed.settle()
    except (JobAborted, FencedError, LinkError):
        raise
    except FedloomError as error:
        if link.fatal is not None:
            raise LinkError(str(error)) from error  # not the job's fault: another process goes on
        log.error("job_failed", error=type(error).__name__, reason=str(error).partition("\n")[0])
        return "FINISHED:FAILED", _clean(str(error)[:_MAX_REASON])
    except (Exception, SystemExit):  # noqa: BLE001 - the job's own code may raise anything; its traceback is the answer
        text = traceback.format_exc()
        log.error("job_failed", reason=text)
        return "FINISHED:FAILED", _clean(text[-_MAX_REASON:])
    return "FINISHED:COMPLETED", ""


def _clean(text: str) -> str:
    """What a message may hold: a traceback may quote names that are no text."""
    return text.encode("utf-8", "replace").decode()


def _prepare(link: Link, inbox: Inbox, claimed: Claimed, work: Path) -> Federation:
    if claimed.archive is None:
        raise JobError(f"job {claimed.job} has no archive")
    unpack_archive(link.fetch(claimed.archive, dest=work / "job.tar"), work / "job")
    spec = JobSpec.load(work / "job")
    custom = spec.custom_dir(work / "job")
    if custom.is_dir():
        sys.path.insert(0, str(custom))
    app_dir = spec.app_dir(work / "job")
    return Federation(link, inbox, claimed, filled(spec, claimed.job, app_dir), app_dir)


def main(request: dict[str, Any] | None = None) -> None:
    """Entry of the process: ``python -m fedloom.controller.job JSON``, or forked with the request as a map."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process decides when it stops
    values = json.loads(sys.argv[1]) if request is None else request
    parsed = JobRequest(**values)
    setup_logging(parsed.log_level, parsed.log_json)
    crew.allow(_FOLD_THREADS)
    with Scratch("job") as work:
        code = run_job(parsed, work)
    sys.exit(code)


def as_argument(request: JobRequest) -> str:
    """The request as the argument of `main`'s command line."""
    return json.dumps(asdict(request))


if __name__ == "__main__":
    main()
