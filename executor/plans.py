"""From an assigned task to what is told to its host: the task's description, and the host's."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..serialization.errors import JobError
from ..serialization.filters import BUILT_IN
from ..serialization.jobspec import Point
from ..serialization.jobvars import substitute
from .channel import ENV_JOB, ENV_SITE, Map
from .hostpool import HostPlan
from .hosts import HostRequest
from .jobs import JobFolders
from .runs import Run
from .script import FunctionExecutor, ScriptExecutor
from .seeding import start_seed, task_seed
from .slots import Slot
from .taskio import TaskSpec

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def task_spec(
    run: Run, jobs: JobFolders, state_path: Path | None, state_out: str, result_path: str, digest: bool
) -> TaskSpec:
    """An attempt as its host is told of it.

    The total number of rounds is the Assign's ``config["total_rounds"]``, else the job's own. Rounds count from
    ``config["first_round"]``: a job's second workflow starts at 0 like its first.
    """
    assign, item, work = run.work.assign, run.item, run.work
    settings, job = run.settings, work.job
    total: Any = assign.config.get("total_rounds", job.spec.num_rounds if job is not None else None)
    first: Any = assign.config.get("first_round", 0)
    serves_any = isinstance(settings, FunctionExecutor) and work.function is None
    return TaskSpec(
        task=item.task,
        attempt=item.attempt,
        site=item.site,
        job=assign.job,
        round=max(0, assign.round - first) if isinstance(first, int) else assign.round,
        step=assign.step,
        name=assign.name,
        total_rounds=total if isinstance(total, int) else None,
        payload_path=str(work.payload) if isinstance(work.payload, Path) else "",
        payload_bytes=work.payload if isinstance(work.payload, bytes) else None,
        exchange_format=settings.params_exchange_format if settings is not None else "numpy",
        transfer_type=settings.params_transfer_type if settings is not None else "FULL",
        codec=settings.codec if settings is not None else "",
        config=assign.config,
        seed=task_seed(assign.seed, assign.round, assign.step, item.site),
        threads=job.spec.threads_per_task if job is not None else 1,
        result_path=result_path,
        digest=digest,
        state_path=str(state_path) if state_path is not None else "",
        state_out=state_out,
        log_path=jobs.log_path(assign.job, item.site) if serves_any else "",
        cwd=jobs.site_place(assign.job, item.site) if serves_any else "",  # made by who works there
        settings=_settings(run, jobs) if job is not None else {},
        filters=_filters(run, jobs) if job is not None else {},
        fold=assign.gather if work.in_workers else "",
    )


def _settings(run: Run, jobs: JobFolders) -> dict[str, Any]:
    """What the job's config holds for its own code at this site."""
    job, site = run.work.job, run.item.site
    assert job is not None
    app = job.spec.client_app_of(site)
    found = app.config_of(site) if app.extra else {}
    return substitute(found, run_variables(run.job, site, jobs), "the client's config") if found else {}


def _filters(run: Run, jobs: JobFolders) -> dict[str, Any]:
    """The job's filters for this task, as its host makes them; in a program of somebody's own only fedloom's are.

    Raises:
        JobError: a filter of the job's own, for a function that is embedded in this process.
    """
    job, item, name = run.work.job, run.item, run.work.assign.name
    assert job is not None
    app = job.spec.client_app_of(item.site)
    if not app.input_filters and not app.output_filters:
        return {}
    points: tuple[Point, ...] = ("client_input", "client_output")
    found = {point: job.spec.filters_for(point, name, item.site) for point in points}
    if run.work.function is not None:
        own = [one.path for chain in found.values() for one in chain if one.path not in BUILT_IN]
        if own:
            raise JobError(
                f"filter {own[0]!r} is the job's own code, which does not run within this program, beside its functions"
                f" for {name!r}: give the site a script of the job, or filters of fedloom's ({', '.join(BUILT_IN)})"
            )
    if not any(found.values()):
        return {}
    variables = run_variables(run.job, item.site, jobs)
    return {
        point: [substitute(one.to_json(), variables, f"filter {one.path}") for one in chain]
        for point, chain in found.items()
        if chain
    }


def run_variables(job: str, site: str, jobs: JobFolders) -> dict[str, str]:
    """What ``{SITE_NAME}`` and its like stand for in a job's configs at this site."""
    return {"SITE_NAME": site, "JOB_ID": job, "WORKSPACE": str(jobs.site_folder(job, site))}


def host_plan(run: Run, slot: Slot, jobs: JobFolders, env: Mapping[str, str]) -> HostPlan:
    """The host that this task needs.

    Raises:
        JobError: the script is not there, or its command line cannot be read.
    """
    work, item, assign = run.work, run.item, run.work.assign
    job, settings = work.job, run.settings
    if job is None or settings is None:
        raise JobError(f"task {assign.name!r} of job {assign.job} has no code: neither a function here nor a script")
    threads = job.spec.threads_per_task
    environ: dict[str, str] = {name: str(threads) for name in _THREAD_VARIABLES}
    environ |= {**env, **dict(slot.env)}
    custom = job.custom(item.site)
    script = str(job.script(settings.task_script_path, item.site))
    start: Map = {
        "kind": "script",
        "script": script,
        "custom": str(custom),
        "job": assign.job,
        "site": item.site,
        "threads": threads,
        "exchange_format": settings.params_exchange_format,
        "transfer_type": settings.params_transfer_type,
    }
    if isinstance(settings, FunctionExecutor):
        cwd = jobs.folder(assign.job)
        start |= {"kind": "function", "function": settings.function, "cwd": str(cwd), "site": ""}
        start["seed"] = start_seed(assign.seed, "")
        log = jobs.log_path(assign.job, f"worker-{slot.index + 1}")
        request = HostRequest(environ, str(cwd), str(log), slot.index, name=f"worker-{slot.index + 1}")
        key = f"function/{assign.job}/{custom.parent.name}/{settings.task_script_path}:{settings.function}/{slot.index}"
        return HostPlan(key, assign.job, "", start, request, launch_s=3600.0)
    cwd = jobs.site_folder(assign.job, item.site)
    start |= {"cwd": str(cwd), "argv": settings.argv, "once": settings.launch_once}
    start |= {"memory_gc_rounds": settings.client_memory_gc_rounds, "cuda_empty_cache": settings.cuda_empty_cache}
    start["seed"] = start_seed(assign.seed, item.site)
    log = jobs.log_path(assign.job, item.site)
    request = HostRequest(environ, str(cwd), str(log), slot.index, name=item.site)
    client: Map | None = None
    if settings.launch_external_process:
        client = start
        start = _command(settings, script, custom, str(cwd))
        start["environ"] |= {ENV_SITE: str(item.site), ENV_JOB: str(assign.job)}
    key = f"script/{assign.job}/{settings.task_script_path} {settings.task_script_args}/{item.site}"
    return HostPlan(
        key,
        assign.job,
        run.lane,
        start,
        request,
        client=client,
        once=not settings.launch_once,
        grace_s=settings.shutdown_timeout,
        launch_s=settings.launch_timeout if settings.launch_external_process else 3600.0,
    )


def _command(settings: ScriptExecutor, script: str, custom: Path, cwd: str) -> Map:
    """What the keeper of an external command starts.

    ``python3`` is the interpreter that runs fedloom: it goes first on PATH, as in an activated virtual environment.
    """
    command = settings.command_argv
    if not command:
        raise JobError("command is empty; such as 'python3 -u' belongs here")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if shutil.which(command[0], path=path) is None:
        raise JobError(f"command {settings.command!r}: no {command[0]!r} on this site's PATH")
    modules = os.pathsep.join(filter(None, [str(custom), os.environ.get("PYTHONPATH", "")]))
    environ = {"PATH": path, "PYTHONPATH": modules, "PYTHONUNBUFFERED": "1"}
    return {"kind": "command", "argv": [*command, script, *settings.argv], "environ": environ, "cwd": cwd}
