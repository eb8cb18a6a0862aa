"""`run_simulation`: a job folder in, a result folder out, with the whole pipeline on this machine in between."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import structlog

from ..broker.link import Link
from ..recipe.workspace import UNFINISHED
from ..serialization.errors import LinkError, LinkTimeout
from ..serialization.jobspec import JobSpec
from ..serialization.messages import Hello
from ..serialization.processes import setup_logging
from .committed import Committed
from .devices import check_present
from .forkserver.warm import Warm
from .gpus import parse_gpus, slots, worker_count
from .interrupts import Shield, interruptible
from .pipeline import LogTail, Pipeline, PipelineSettings
from .preload import modules_for, take_warm
from .prepare import SimConfig, max_parked, place_job, place_workspace, sites_of, wants_torch
from .progress import Record, Reporter, SilentReporter, View, make_reporter, metrics_of, print_summary, rate_of

if TYPE_CHECKING:
    from ..recipe.client import JobClient, JobInfo
    from ..recipe.failures import SiteFailure

__all__ = ["SimConfig", "SimResult", "run_simulation"]

log = structlog.get_logger(__name__)

COMPLETED = "FINISHED:COMPLETED"
#: The run's own folder in the workspace: the broker's store, the agent's workspace, the processes' logs.
WORK_DIR = UNFINISHED.parent

#: How long between two looks at the job: a share of how long it has run, so that a short run is not mostly waiting.
_POLL_SHARE = 0.02
_POLL_S = (0.01, 0.2)
#: Events of the processes' logs that the run reports in its own words.
_REPORTED = ("task_failed", "job_failed")
_CONNECT_S = 10.0
#: After so long without its connection a process of the run that is resumed is dead: all of them are.
_GONE_S = 0.5
#: A broker on this machine that says nothing for so long hangs.
_SILENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class SimResult:
    """How a simulation ended. ``result_dir`` is laid out as a downloaded job; ``rounds`` are metrics.jsonl's lines."""

    job_id: str
    status: str
    reason: str
    result_dir: Path
    rounds: tuple[Record, ...] = ()
    failures: tuple[SiteFailure, ...] = ()
    seconds: float = 0.0
    #: Whether another run in the same workspace can go on with the job.
    unfinished: bool = False

    @property
    def completed(self) -> bool:
        """Whether the job did all of its rounds."""
        return self.status == COMPLETED

    @property
    def metrics(self) -> dict[str, Any]:
        """The last round's aggregated metrics."""
        return metrics_of(self.rounds[-1]) if self.rounds else {}


def run_simulation(config: SimConfig) -> SimResult:
    """Run a job to its end. A job that fails is a result too; what keeps it from running is an exception.

    Ctrl-C and SIGTERM end every process within about a second and raise KeyboardInterrupt. Whatever ends it early, the
    results of the committed rounds are written first, in at most a second more; a note of the error says where.

    Raises:
        JobError: the job, its sites, the GPUs or the workspace are not what they must be.
        ProcessError: a process of the simulation could not be started, or died.
        LinkTimeout: the run took longer than ``timeout_s``.
        KeyboardInterrupt: it was interrupted.
    """
    started = time.monotonic()
    groups = parse_gpus(config.gpu)
    sites = sites_of(config, JobSpec.load(config.job_folder))
    places = slots(groups, worker_count(len(sites), config.threads, groups), config.gpu_memory_share)
    check_present(groups)
    if not structlog.is_configured():
        setup_logging(config.log_level, config.log_json)
    with ExitStack() as stack:
        shield = stack.enter_context(interruptible())
        workspace = place_workspace(config, stack)
        spec = place_job(config, workspace, sites)
        modules = modules_for(spec.custom_dirs(workspace / "job"), torch=wants_torch(spec))
        warm = take_warm(modules)
        stack.callback(shield.run, warm.close)
        if config.profile:
            _profile(config, workspace, warm, shield, stack)
        work_dir = workspace / WORK_DIR
        resumed = (workspace / UNFINISHED).is_file()
        settings = PipelineSettings(
            work_dir,
            sites,
            tuple(slot.env for slot in places),
            config.prefold,
            max_parked(config, spec, workspace / "job", places, len(sites)),
            "debug" if config.log_level == "debug" else "info",
            config.log_json,
            config.env,
            {**({"lost_s": _GONE_S} if resumed else {}), **config.broker},
            config.agent,
        )
        return _Run(config, spec, workspace, started, shield).go(warm, settings, stack)


def _profile(config: SimConfig, workspace: Path, warm: Warm, shield: Shield, stack: ExitStack) -> None:
    from .profile.recording import Profile

    profile = Profile(workspace, warm, show=config.show_progress)

    def write(kind: type[BaseException] | None, error: object, trace: object) -> None:
        shield.run(lambda: profile.write(whole=kind is None))

    stack.push(write)


class _Run:
    """One run, after everything that can be wrong beforehand was found right."""

    def __init__(self, config: SimConfig, spec: JobSpec, workspace: Path, started: float, shield: Shield) -> None:
        self._config = config
        self._spec = spec
        self._workspace = workspace
        self._started = started
        self._shield = shield
        self._died = threading.Event()
        self._records: list[Record] = []
        key = next((w.args["key_metric"] for w in spec.workflows if w.args.get("key_metric")), "accuracy")
        self._key_metric = str(key)
        self._reporter: Reporter = SilentReporter()
        self._note = workspace / UNFINISHED
        self._unfinished = False

    def go(self, warm: Warm, settings: PipelineSettings, stack: ExitStack) -> SimResult:
        from ..recipe.client import JobClient

        pipeline = Pipeline(warm, settings, self._died.set)
        committed = Committed(pipeline, self._workspace)
        stack.callback(self._shield.run, lambda: self._leave(pipeline))
        stack.callback(self._shield.run, committed.clear)
        stack.callback(self._shield.run, warm.close)  # nobody writes any more when the files are moved
        if self._config.show_progress:
            self._reporter = make_reporter(sys.stderr, key_metric=self._key_metric)
        stack.callback(self._reporter.close)
        self._reporter.show(View(f"starting {len(settings.sites)} sites, {len(settings.slot_envs)} at once"))
        self._put_aside()
        pipeline.start()
        link = self._connect(pipeline, stack)
        stack.callback(self._shield.run, warm.close)  # whatever ends the run, the processes go first
        client = JobClient(pipeline.endpoint, link=link, timeout_s=_SILENCE_S)
        with _deaths_told(pipeline):
            job_id = self._submit(client)
        with committed.kept(job_id, self._records, lambda: self._unfinished), _deaths_told(pipeline):
            self._show_files(pipeline, job_id)
            info = self._watch(client, pipeline, job_id)
            failures = self._failures(pipeline, info)
            self._reporter.close()
            return self._collect(client, pipeline, info, failures)

    def _submit(self, client: JobClient) -> str:
        """A new job; or the one that the last run left: itself, or if it cannot go on, one behind its commits."""
        job = self._workspace / "job"
        before = str(json.loads(self._note.read_text())["job_id"]) if self._note.is_file() else ""
        if before:
            info = client.info(before)
            same = client.is_of(info, job)
            if not info.ended and not same:
                client.abort(before)
            job_id = before if same and not info.ended else client.submit(job, start=before)
            self._records += client.rounds(job_id)
            self._unfinished = bool(self._records)
            self._reporter.note(f"{job_id} goes on behind {len(self._records)} committed rounds")
        else:
            job_id = client.submit(job)
        part = self._note.with_suffix(".part")
        part.write_text(json.dumps({"job_id": job_id}))
        part.replace(self._note)
        return job_id

    def _connect(self, pipeline: Pipeline, stack: ExitStack) -> Link:
        token = secrets.token_hex(8)
        link = Link(pipeline.endpoint, Hello(node=f"client/{token}", role="client", boot=secrets.token_hex(16)))
        stack.callback(self._shield.run, link.close)
        # the broker is ready, so this takes milliseconds. A death may close the link only then: `start` does not see it
        with _deaths_told(pipeline):
            link.start(_CONNECT_S)
        ended = threading.Thread(target=self._close_on_death, args=(link,), name="fedloom-sim-deaths", daemon=True)
        ended.start()
        stack.callback(ended.join, 5.0)
        stack.callback(self._shield.run, self._died.set)
        return link

    def _close_on_death(self, link: Link) -> None:
        """So that nobody waits for an answer of a broker that is dead."""
        self._died.wait()
        link.close()

    # ------------------------------------------------------------ while it runs

    def _watch(self, client: JobClient, pipeline: Pipeline, job_id: str) -> JobInfo:
        level = self._config.log_level
        tail = LogTail(pipeline.log_dir, level, () if level in ("debug", "info") else _REPORTED)
        deadline = None if self._config.timeout_s is None else self._started + self._config.timeout_s
        begun = time.monotonic()
        while True:
            info = client.info(job_id, sites=False)
            # a round, or results of the first one: worth going on with
            self._unfinished = info.status != COMPLETED and bool(info.round or self._view(info).done)
            if info.round > len(self._records) or info.ended:
                self._new_rounds(client, job_id, info.rounds)
            self._reporter.show(self._view(info))
            for line in tail.lines():
                self._reporter.note(line)
            if info.ended:
                return info
            if deadline is not None and time.monotonic() >= deadline:
                raise LinkTimeout(
                    f"job {job_id} is {info.status} after {self._config.timeout_s:g} s, with round {info.round} of"
                    f" {info.rounds} done: the run was bounded by timeout_s"
                )
            pipeline.check()
            if self._records:
                _load_ahead()
            self._died.wait(min(max(_POLL_S[0], (time.monotonic() - begun) * _POLL_SHARE), _POLL_S[1]))

    def _new_rounds(self, client: JobClient, job_id: str, rounds: int) -> None:
        from ..recipe.failures import failures_of

        for record in client.rounds(job_id, after=len(self._records)):
            self._records.append(record)
            self._reporter.round_done(record, rounds)
            if self._config.on_round is not None:
                self._config.on_round(record)
            for failure in failures_of([record]):
                what = failure.text.strip().rpartition("\n")[2] or failure.code
                self._reporter.note(f"  {failure.site} failed: {what}")

    def _view(self, info: JobInfo) -> View:
        gather = cast("dict[str, Any]", info.raw.get("gather") or {})
        last = self._records[-1] if self._records else {}
        return View(
            info.status,
            info.round,
            info.rounds,
            int(gather.get("done") or gather.get("results") or 0),
            int(gather.get("tasks") or 0),
            metrics_of(last),
            rate_of(last),
        )

    # ------------------------------------------------------------ after it

    def _failures(self, pipeline: Pipeline, info: JobInfo) -> tuple[SiteFailure, ...]:
        """Sites that failed, first things first; their tracebacks lead to the code that stays in ``job/``."""
        from ..recipe.failures import failures_of

        found = failures_of(self._records, "" if info.status == COMPLETED else info.reason)
        return tuple(
            dict.fromkeys(replace(failure, text=self._lasting(pipeline, info, failure.text)) for failure in found)
        )

    def _lasting(self, pipeline: Pipeline, info: JobInfo, text: str) -> str:
        code = pipeline.agent_dir / "jobs" / info.job_id / "code"
        logs = pipeline.agent_dir / "logs" / info.job_id
        lasting = text.replace(str(code), str(self._workspace / "job"))
        return lasting.replace(str(logs), str(self._workspace / "logs"))

    def _collect(
        self, client: JobClient, pipeline: Pipeline, info: JobInfo, failures: tuple[SiteFailure, ...]
    ) -> SimResult:
        from ..recipe.matrix import FOLDER, JSON_FILE, matrix_of
        from ..recipe.matrix import shown as shown_matrix
        from ..recipe.results import BEST_MODEL_FILE, METRICS_FILE, MODEL_FILE, write_results

        if not pipeline.end_agent(self._config.grace_s):
            log.warning("scripts_killed", job=info.job_id, after_s=self._config.grace_s)
        self._keep_files(pipeline, info.job_id)
        errors: list[SiteFailure] = []
        write_results(client, info.job_id, self._workspace, logs=False, export=True, errors=errors)
        told = (replace(error, text=self._lasting(pipeline, info, error.text)) for error in errors)
        pipeline.stopping()
        if self._config.show_progress:
            names = (MODEL_FILE, BEST_MODEL_FILE, METRICS_FILE, f"{FOLDER}/{JSON_FILE}")
            files = [self._workspace / name for name in names]
            shown = [path for path in files if path.is_file() and path.stat().st_size]
            if table := shown_matrix(matrix_of(self._records), self._key_metric):
                print(f"\n{table}", file=sys.stderr)
            print_summary(sys.stderr, self._records, info.rounds, shown, self._key_metric)
        seconds = time.monotonic() - self._started
        return SimResult(
            info.job_id,
            info.status,
            self._lasting(pipeline, info, info.reason),
            self._workspace,
            tuple(self._records),
            tuple(dict.fromkeys((*failures, *told))),
            seconds,
            self._unfinished,
        )

    def _show_files(self, pipeline: Pipeline, job_id: str) -> None:
        """Let ``logs/`` and ``sites/`` lead to where the agent writes, for those who look while it runs."""
        for name, place in _agent_folders(pipeline, job_id):
            with suppress(OSError):
                place.mkdir(parents=True, exist_ok=True)
                (self._workspace / name).symlink_to(place.relative_to(self._workspace), target_is_directory=True)

    def _put_aside(self) -> None:
        """The logs and files of a job that had ended when it was left: the one that goes on has its own."""
        for name in ("logs", "sites"):
            folder, before = self._workspace / name, self._workspace / f"{name}.before"
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(before, ignore_errors=True)
                folder.rename(before)

    def _keep_files(self, pipeline: Pipeline, job_id: str) -> None:
        for name, place in _agent_folders(pipeline, job_id):
            link = self._workspace / name
            if link.is_symlink():
                link.unlink()
            if place.is_dir() and not link.exists():
                place.rename(link)

    def _leave(self, pipeline: Pipeline) -> None:
        """The end of every run, also of one that was interrupted: logs in their place, the run's own folder gone."""
        pipeline.stopping()
        for name in ("logs", "sites"):
            link = self._workspace / name
            if link.is_symlink() and not self._unfinished:
                place = link.resolve()
                link.unlink()
                if place.is_dir():
                    place.rename(link)
        with suppress(OSError):
            pipeline.keep_logs(self._workspace / "logs")
        if not self._config.keep_store and not self._unfinished:
            shutil.rmtree(self._workspace / WORK_DIR, ignore_errors=True)


def _load_ahead() -> None:
    """What the end of the run needs, while the sites work."""
    for name in ("rich.console", "rich.table", "fedloom.recipe.results"):
        import_module(name)


def _agent_folders(pipeline: Pipeline, job_id: str) -> list[tuple[str, Path]]:
    return [
        ("logs", pipeline.agent_dir / "logs" / job_id),
        ("sites", pipeline.agent_dir / "jobs" / job_id / "sites"),
    ]


@contextmanager
def _deaths_told(pipeline: Pipeline) -> Generator[None]:
    """What a request that failed says is little; that a process has died says why."""
    try:
        yield
    except LinkError:
        pipeline.check()
        raise
    pipeline.check()
