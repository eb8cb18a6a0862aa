"""``fedloom sim``: a simulation on this machine, of a job script or a job folder."""

from __future__ import annotations

import contextlib
import gc
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ...serialization.errors import FedloomError, JobError
from .common import DONE, FAILED, WRONG_USE, Compat, Json, LogFormat, LogLevel, command, enable_compat, print_json
from .plan import plan_folder, show_plan

if TYPE_CHECKING:
    from ..overrides import Overrides

#: The documents' limit on clients, which -m raises.
MAX_CLIENTS = 100


@command
def sim(
    job: Annotated[Path, typer.Argument(metavar="JOB.py|JOB_FOLDER", help="A job script, or a job folder.")],
    script_args: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGS]", help="The script's arguments.")
    ] = None,
    workspace: Annotated[
        Path | None, typer.Option("-w", "--workspace", metavar="DIR", help="The run's folder is made in here.")
    ] = None,
    n_clients: Annotated[
        int | None,
        typer.Option("-n", "--n-clients", "--n_clients", min=1, metavar="N", help="site-1 to site-N."),
    ] = None,
    clients: Annotated[str | None, typer.Option("-c", "--clients", metavar="A,B", help="The clients' names.")] = None,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", min=1, metavar="T", help="How many clients run at once.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("-gpu", "--gpu", metavar="GPUS", help="Such as 0,1 or [0,1],[2,3].")
    ] = None,
    gpu_memory_share: Annotated[
        str | None,
        typer.Option(
            "--gpu-memory-share", metavar="SHARE", help="Of its GPU's memory for each worker: such as 0.5, or equal."
        ),
    ] = None,
    max_clients: Annotated[
        int | None,
        typer.Option(
            "-m",
            "--max-clients",
            "--max_clients",
            min=1,
            metavar="MAX",
            help=f"At most so many clients; default {MAX_CLIENTS} of those that options name.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, metavar="S", help="Instead of the job's own.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Run one client, and say what all would take of memory, GPUs, disk and time.")
    ] = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Show where the rounds' time went, and write it to profile/ in the result."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the last run in the workspace was ended; else begin anew.")
    ] = False,
    compat: Compat = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    as_json: Json = False,
) -> None:
    """Run a job on this machine, with the real protocol. Options win over what the script's SimEnv says."""
    from ..logs import LEVEL_VARIABLE, setup
    from ..overrides import Overrides

    if not gc.isenabled():  # off since the command began
        gc.freeze()
        gc.enable()
    level_said = bool(log_level or os.environ.get(LEVEL_VARIABLE))
    level, json_lines = setup(log_level, log_format, default="warning")
    enable_compat(compat)
    if n_clients is not None and clients is not None:
        raise JobError("-n and -c both say which clients there are: give one of them")
    overrides = Overrides(
        num_clients=n_clients,
        clients=_names(clients),
        num_threads=threads,
        gpu_config=gpu,
        gpu_memory_share=gpu_memory_share,
        workspace_root=workspace,
        max_clients=MAX_CLIENTS if max_clients is None and (n_clients or clients or job.is_dir()) else max_clients,
        seed=seed,
        plan=plan,
        profile=profile,
        resume=resume,
        log_level=level if level_said else None,
        log_json=json_lines,
        show_progress=not as_json and not json_lines,
    )
    if plan and profile:
        raise JobError("--plan runs no job that could be profiled: give --plan or --profile")
    if job.is_dir():
        if script_args:
            raise JobError(f"arguments {script_args} are for a job script; {job} is a job folder")
        _run_folder(job, overrides, as_json)
    elif job.is_file():
        _run_script(job, list(script_args or ()), overrides, as_json)
    else:
        raise JobError(f"{job} does not exist: name a job script or a job folder")


def run(options: dict[str, Any]) -> int:
    """The command with arguments that were read without typer; the exit code."""
    try:
        sim(**options)
    except typer.Exit as end:
        return end.exit_code
    return DONE


def _names(clients: str | None) -> tuple[str, ...] | None:
    if clients is None:
        return None
    names = tuple(name.strip() for name in clients.split(",") if name.strip())
    if not names:
        raise JobError(f"-c {clients!r} names no client; write -c site-1,site-2")
    return names


def _run_folder(folder: Path, overrides: Overrides, as_json: bool) -> None:
    from ..simulate import SimOptions, raise_failure, show_failures, simulate

    if overrides.plan:
        raise typer.Exit(show_plan(plan_folder(folder, overrides), as_json))
    result = simulate(SimOptions().overridden(overrides), folder=folder)
    if as_json:
        print_json(
            {
                "job_id": result.job_id,
                "status": result.status,
                "reason": result.reason,
                "path": str(result.result_dir),
            }
        )
    else:
        typer.echo(f"{result.job_id} {result.status}")
        typer.echo(f"results: {result.result_dir}")
    raise_failure(result)
    if show_failures(result):
        raise typer.Exit(FAILED)


def _run_script(script: Path, args: list[str], overrides: Overrides, as_json: bool) -> None:
    """Run the script as Python would, with the options in force; exit as its jobs, or the script itself, did."""
    from ..overrides import applied
    from ..planning import Planned

    _load_early(script.resolve())
    sys.argv = [str(script), *args]
    sys.path.insert(0, str(script.resolve().parent))
    code, out = DONE, sys.stdout
    # with --json the script's own words go to standard error: standard output is for the one object
    with applied(overrides), contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Planned as planned:
            raise typer.Exit(show_plan(planned.plan, as_json, out)) from None
        except SystemExit as stop:
            code = _script_code(stop)
        except (FedloomError, KeyboardInterrupt):
            if as_json and not overrides.plan:
                _print_runs(overrides, out)
            raise
        except Exception as error:  # noqa: BLE001 - the user's script may raise anything; its traceback is the answer
            _show_script_error(error, script)
            code = FAILED
    if as_json and not overrides.plan:
        _print_runs(overrides, out)
    if code == DONE and not overrides.runs:
        typer.echo(f"error: {script} ran no job; it must call recipe.execute(SimEnv(...))", err=True)
        code = WRONG_USE
    # a client that failed is seen in the exit code, even where the rounds went on without it
    failed = any(run.failures or run.status not in ("FINISHED:COMPLETED", "SUBMITTED") for run in overrides.runs)
    raise typer.Exit(code or (FAILED if failed else DONE))


def _load_early(script: Path) -> None:
    """Have the warm process load what the clients will probably need, while the script itself is still loading."""
    from ...sim.preload import load_early, start_early
    from ..code import local_code, named_scripts

    with contextlib.suppress(JobError):  # the script itself will say it
        start_early()  # nothing where one was started before the options were read
        load_early(local_code(named_scripts(script), [script.parent]).values())


def _print_runs(overrides: Overrides, out: TextIO) -> None:
    runs = [{"job_id": run.job_id, "status": run.status, "path": run.path} for run in overrides.runs]
    last = runs[-1] if runs else {"job_id": None, "status": None, "path": None}
    print_json(last | {"runs": runs}, out)


def _script_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or DONE
    typer.echo(str(stop.code), err=True)
    return FAILED


def _show_script_error(error: Exception, script: Path) -> None:
    """The traceback as running the script by Python would show it: without the frames of this command."""
    from ..simulate import compat_hint

    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != str(script):
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace or error.__traceback__)
    if hint := compat_hint(str(error)):
        typer.echo(f"  {hint}", err=True)
