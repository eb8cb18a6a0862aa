"""Where a job runs: `SimEnv` on this machine, `ProdEnv` at a broker."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..serialization.errors import JobError
from ..serialization.scratch import Scratch
from . import overrides
from .failures import SiteFailure, failures_of, script_errors
from .logs import check_level
from .options import whole
from .run import Run
from .simulate import DEFAULT_WORKSPACE, SimOptions, raise_failure, show_failures, simulate

if TYPE_CHECKING:
    from ..sim.launcher import SimResult
    from ..sim.planning.figures import Plan
    from .base import Recipe
    from .client import JobClient
    from .job import Job


class Env(ABC):
    """Where a job runs."""

    @abstractmethod
    def deploy(self, job: Job) -> Run:
        """Hand the job over; returns its run."""


class SimEnv(Env):
    """A simulation on this machine: broker, controller and workers, with the real protocol between them.

    Args:
        num_clients: how many clients, called site-1 to site-N.
        clients: their names instead.
        num_threads: how many of them run at once; default all. The results are the same whatever it is.
        gpu_config: GPUs of the workers: ``"0,1"`` one each in turn, ``"[0,1],[2,3]"`` groups.
        log_level: what is logged to standard error while it runs: debug, info, warning, error or critical.
        workspace_root: the folder below which the job's folder is made; default ``FEDLOOM_WORKSPACE``, else
            ``./fedloom-workspace``. A folder of the job's name that fedloom made is moved to ``<name>.previous``.
        seed: instead of the job's own.
        profile: write where the time of the rounds went to ``profile/`` in the result folder, and show it at the end.
        resume: go on with the job that the last run in the workspace left unfinished; begin anew if there is none.
        show_progress: a live line on standard error.
        gpu_memory_share: the part of each of its GPUs' memory that a worker may take: a number such as 0.5, or "equal"
            for as much as the others on the GPU have; default: no bound.
        check: raise where the run fails; False returns the failed run.
        extra: further fields of `sim.launcher.SimConfig`.
        log_config: another name for ``log_level``; concise, full, verbose and msg_only are known too.

    Raises:
        JobError: a value that is not allowed.
    """

    def __init__(
        self,
        num_clients: int = 0,
        clients: Sequence[str] | None = None,
        num_threads: int | None = None,
        gpu_config: str | None = None,
        log_level: str | None = None,
        workspace_root: str | Path | None = None,
        *,
        seed: int | None = None,
        profile: bool = False,
        resume: bool = False,
        show_progress: bool = True,
        check: bool = True,
        gpu_memory_share: float | str | None = None,
        extra: dict[str, Any] | None = None,
        log_config: str | None = None,
    ) -> None:
        if isinstance(clients, str):
            clients = [name.strip() for name in clients.split(",") if name.strip()]
        self.check = check
        self.options = SimOptions(
            num_clients=num_clients,
            clients=tuple(clients or ()),
            num_threads=num_threads,
            gpu_config=gpu_config,
            gpu_memory_share=gpu_memory_share,
            workspace_root=Path(workspace_root) if workspace_root else None,
            seed=None if seed is None else whole(seed, "seed"),
            profile=profile,
            resume=resume,
            log_level=check_level(log_level or log_config, "warning"),
            show_progress=show_progress,
            extra=extra or {},
        )

    def deploy(self, job: Job) -> Run:
        """Run the job to its end.

        Raises:
            TaskError: a site's code failed. GatherError: too few results. JobError: the job does not fit.
        """
        by = overrides.active()
        options = self.options.overridden(by)
        if by is not None and by.plan:
            from .planning import Planned, plan_job

            raise Planned(plan_job(options, job=job))
        result = simulate(options, job=job)
        if by is not None:
            by.runs.append(
                overrides.Outcome(result.job_id, result.status, str(result.result_dir), bool(result.failures))
            )
        if self.check:
            raise_failure(result)
        show_failures(result)
        return Run(result.job_id, SimBackend(result))

    def plan(self, job: Job | Recipe) -> Plan:
        """What a run would take of memory, GPUs, disk and time, and whether that fits: see `docs/guides/simulation.md`.

        One client runs the job for two rounds, in a temporary folder.

        Raises:
            JobError: the job does not fit the options. TaskError: the client's code failed.
        """
        from .job import Job
        from .planning import plan_job

        return plan_job(self.options, job=job if isinstance(job, Job) else job.job)


class SimBackend:
    """A simulation that is over."""

    def __init__(self, result: SimResult) -> None:
        self._result = result

    def status(self) -> tuple[str, str]:
        return self._result.status, self._result.reason

    def wait(self, timeout_s: float | None) -> str:
        return self._result.status

    def result(self, timeout_s: float | None) -> Path:
        return self._result.result_dir

    def metrics(self) -> list[dict[str, Any]]:
        from .results import read_metrics

        return read_metrics(self._result.result_dir)

    def failures(self) -> list[SiteFailure]:
        return list(self._result.failures)

    def abort(self) -> None:
        return


class ProdEnv(Env):
    """A broker that is running elsewhere, with its controllers and executors.

    Args:
        endpoint: the broker's control endpoint, such as ``tcp://host:7600``; default ``FEDLOOM_BROKER``.
        connect_s: seconds to wait for it.
        workspace_root: the folder below which `Run.get_result` writes ``<job id>/``.
    """

    def __init__(
        self, endpoint: str | None = None, *, connect_s: float = 10.0, workspace_root: str | Path | None = None
    ) -> None:
        from .client import DEFAULT_BROKER

        self.endpoint = endpoint or os.environ.get("FEDLOOM_BROKER") or DEFAULT_BROKER
        self.connect_s = connect_s
        self.workspace_root = Path(workspace_root or DEFAULT_WORKSPACE)

    def deploy(self, job: Job) -> Run:
        """Submit the job; returns at once.

        Raises:
            LinkError: the broker cannot be reached. FaultError: it refused the job.
            JobError: ``--profile`` or ``--plan``, which are for simulations.
        """
        by = overrides.active()
        if by is not None and (by.profile or by.plan):
            asked = "--plan" if by.plan else "--profile"
            raise JobError(f"{asked} is for simulations: this script submits its job to a broker (ProdEnv)")
        if by is not None and by.seed is not None:
            job.seed = by.seed
        with Scratch("job") as temporary:
            folder = job.export(temporary / "job")
            with self.open() as client:
                job_id = client.submit(folder)
        if by is not None:
            by.runs.append(overrides.Outcome(job_id, "SUBMITTED"))
        return self.attach(job_id)

    def attach(self, job_id: str) -> Run:
        """The run of a job that was submitted before."""
        return Run(job_id, BrokerBackend(self, job_id))

    def open(self) -> JobClient:
        """A connection to this environment's broker."""
        from .client import JobClient

        return JobClient(self.endpoint, connect_s=self.connect_s)


class BrokerBackend:
    """A job at a broker; each question is a connection of its own, so that a run holds no thread."""

    def __init__(self, env: ProdEnv, job_id: str) -> None:
        self._env = env
        self._job_id = job_id

    def status(self) -> tuple[str, str]:
        with self._env.open() as client:
            info = client.info(self._job_id)
        return info.status, info.reason

    def wait(self, timeout_s: float | None) -> str:
        with self._env.open() as client:
            return client.wait(self._job_id, timeout_s).status

    def result(self, timeout_s: float | None) -> Path:
        dest = self._env.workspace_root.expanduser().resolve() / self._job_id
        with self._env.open() as client:
            client.wait(self._job_id, timeout_s)
            return client.download(self._job_id, dest, export=True)

    def metrics(self) -> list[dict[str, Any]]:
        with self._env.open() as client:
            return client.rounds(self._job_id)

    def failures(self) -> list[SiteFailure]:
        with self._env.open() as client:
            found = failures_of(client.rounds(self._job_id), client.info(self._job_id).reason)
            return [*found, *script_errors(client.events(self._job_id))]

    def abort(self) -> None:
        with self._env.open() as client:
            client.abort(self._job_id)
