"""The controller: claims jobs and runs each in a process of its own. Start a second one for a hot standby."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

from ..broker.link import Link, fault_error
from ..serialization.envelope import Buffer
from ..serialization.errors import LinkError
from ..serialization.messages import Answer, Claimed, ClaimJob, Fault, Hello, JobId, Message, Welcome
from . import job as job_process
from .job import JobRequest

log = structlog.get_logger(__name__)

_POLL_S = 0.2
_STOP_S = 2.0


class JobProcess(Protocol):
    """A started job process."""

    @property
    def pid(self) -> int:
        """Its process id."""
        ...

    def poll(self) -> int | None:
        """Its exit code (negative: the signal), or None while it runs."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


StartJob = Callable[[JobRequest], JobProcess]


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """How a controller works: at most ``max_jobs`` at a time; ``start_job`` says how their processes come to be."""

    broker: str
    max_jobs: int = 4
    log_level: str = "info"
    log_json: bool = False
    connect_s: float = 30.0


class Controller:
    """Claims jobs as long as it has room, watches their processes, and gives lost jobs back at once."""

    def __init__(self, config: ControllerConfig, start_job: StartJob | None = None) -> None:
        self.config = config
        self._start_job = start_job or _spawn
        self._inbox: queue.SimpleQueue[tuple[Message, Buffer]] = queue.SimpleQueue()
        self._running: dict[str, tuple[JobProcess, int]] = {}
        self._asked = 0  # the ref of the question for a job that has no answer yet
        self._owed: dict[int, ClaimJob] = {}  # jobs given back, until the broker says that it knows
        self._stop = threading.Event()
        hello = Hello(
            node=f"controller/{socket.gethostname()}-{os.getpid()}",
            role="controller",
            boot=os.urandom(16).hex(),
            capacity=config.max_jobs,
        )
        self.link = Link(config.broker, hello, on_message=lambda message, tail: self._inbox.put((message, tail)))

    def run(self) -> None:
        """Until `stop`.

        Raises:
            LinkTimeout: no broker within ``connect_s``.
            FaultError: the broker refused this controller for good.
        """
        self.link.start(self.config.connect_s)
        log.info("controller_ready", broker=self.config.broker)
        try:
            while not self._stop.is_set():
                self._turn()
        finally:
            self._end()

    def stop(self) -> None:
        """End `run` soon; running jobs are given back for another controller. Safe in a signal handler."""
        self._stop.set()

    def _turn(self) -> None:
        if not self._asked and len(self._running) < self.config.max_jobs:
            self._asked = self.link.next_ref()
            self.link.send(ClaimJob(self._asked))
        try:
            message, _ = self._inbox.get(timeout=_POLL_S)
        except queue.Empty:
            message = None
        match message:
            case Claimed() if message.ref == self._asked:
                self._asked = 0
                self._start(message)
            case Claimed():
                pass  # the second answer to a question that was repeated
            case Answer():
                self._owed.pop(message.ref, None)
            case Welcome():
                self._ask_again()
            case Fault(fatal=True):
                raise fault_error(message.code, message.text)
            case Fault():
                if self._owed.pop(message.ref, None) is None:
                    self._asked = 0
                    log.warning("claim_refused", code=message.code, reason=message.text)
                    self._stop.wait(_POLL_S)
            case _:
                pass
        if self.link.state == "closed":
            raise self.link.fatal or LinkError("the link to the broker was closed")
        self._reap()

    def _ask_again(self) -> None:
        """After a reconnect: the same question, so that a job that was given to it is not given to nobody."""
        for message in self._owed.values():
            self.link.send(message)
        if self._asked:
            self.link.send(ClaimJob(self._asked))

    def _start(self, claimed: Claimed) -> None:
        known = self._running.pop(claimed.job, None)
        if known is not None:
            known[0].kill()  # it has lost its claim, and the broker has given it to us again
        request = JobRequest(
            self.config.broker, claimed.job, claimed.claim, self.config.log_level, self.config.log_json
        )
        try:
            process = self._start_job(request)
        except OSError as error:
            log.error("job_not_started", job=claimed.job, claim=claimed.claim, reason=str(error))
            self._give_back(claimed.job, claimed.claim, f"its process could not be started: {error}")
            return
        self._running[claimed.job] = (process, claimed.claim)
        log.info("job_started", job=claimed.job, name=claimed.name, claim=claimed.claim, pid=process.pid)

    def _reap(self) -> None:
        for job, (process, claim) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[job]
            if code == job_process.ENDED or code == job_process.FENCED:
                log.info("job_process_ended", job=job, code=code)
            else:
                then = "given back: started again from the last commit"
                log.warning("job_process_ended", job=job, code=code, next=then)
                self._give_back(job, claim, f"its process ended with {_exit_text(code)}")

    def _give_back(self, job: str, claim: int, reason: str, *, stopped: bool = False) -> None:
        message = ClaimJob(self.link.next_ref(), JobId(job), claim, reason, stopped)
        self._owed[message.ref] = message
        self.link.send(message)

    def _end(self) -> None:
        for process, _ in self._running.values():
            process.kill()
        deadline = time.monotonic() + _STOP_S
        pause = threading.Event()
        for job, (process, claim) in self._running.items():
            while process.poll() is None and time.monotonic() < deadline:
                pause.wait(0.01)
            self._give_back(job, claim, "its controller was stopped", stopped=True)
        self._running.clear()
        self.link.close("the controller stops")


def run_controller(
    broker: str, start_job: StartJob | None = None, *, log_level: str = "info", log_json: bool = False
) -> None:
    """Run a controller in this process until SIGTERM or SIGINT."""
    controller = Controller(ControllerConfig(broker, log_level=log_level, log_json=log_json), start_job)

    def stop(signum: int, frame: object) -> None:
        controller.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    controller.run()


def _exit_text(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _spawn(request: JobRequest) -> JobProcess:
    argument = job_process.as_argument(request)
    return subprocess.Popen([sys.executable, "-m", "fedloom.controller.job", argument], stdin=subprocess.DEVNULL)
