"""From a job, or a job folder, to a finished simulation: what `SimEnv` and `fedloom sim` share."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..serialization.archive import folder_entries
from ..serialization.errors import FedloomError, GatherError, JobError, TaskError
from ..serialization.jobspec import SITE_CONFIG, JobSpec, check_site_name
from . import overrides
from .failures import describe
from .intake import job_folder
from .notes import note
from .options import whole
from .run import ABORTED, COMPLETED
from .workspace import UNFINISHED, is_ours, previous, run_folder

if TYPE_CHECKING:
    from ..sim.launcher import SimResult
    from .job import Job


DEFAULT_WORKSPACE = "fedloom-workspace"
#: As many clients as a simulation without any other word has.
_DEFAULT_CLIENTS = 2
#: Fields of `sim.launcher.SimConfig` that these options fill in by themselves.
_OWN_FIELDS = frozenset(
    {
        "job_folder",
        "workspace",
        "sites",
        "threads",
        "gpu",
        "gpu_memory_share",
        "seed",
        "profile",
        "resume",
        "show_progress",
        "log_level",
        "log_json",
    }
)


@dataclass(frozen=True, slots=True)
class SimOptions:
    """A simulation's settings, whether they come from a script, a command line or both."""

    num_clients: int = 0
    clients: tuple[str, ...] = ()
    num_threads: int | None = None
    gpu_config: str | None = None
    gpu_memory_share: float | str | None = None
    workspace_root: Path | None = None
    max_clients: int | None = None
    seed: int | None = None
    profile: bool = False
    resume: bool = False
    log_level: str = "warning"
    log_json: bool = False
    show_progress: bool = True
    extra: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        whole(self.num_clients, "num_clients")
        if self.num_threads is not None:
            whole(self.num_threads, "num_threads", 1)
        if self.profile not in (True, False):
            raise JobError(f"profile={self.profile!r}; True or False: the files go to profile/ in the result folder")
        for name in self.clients:
            check_site_name(name)
        if len(set(self.clients)) != len(self.clients):
            raise JobError(f"clients={list(self.clients)} names a client twice")
        if self.clients and self.num_clients not in (0, len(self.clients)):
            raise JobError(f"num_clients={self.num_clients} but clients names {len(self.clients)}: give one of the two")

    def overridden(self, by: overrides.Overrides | None) -> SimOptions:
        """These settings with a command line's before them."""
        if by is None:
            return self
        clients = self.clients if by.clients is None and by.num_clients is None else (by.clients or ())
        num_clients = self.num_clients if by.clients is None and by.num_clients is None else (by.num_clients or 0)
        return SimOptions(
            num_clients=num_clients,
            clients=clients,
            num_threads=_first(by.num_threads, self.num_threads),
            gpu_config=_first(by.gpu_config, self.gpu_config),
            gpu_memory_share=_first(by.gpu_memory_share, self.gpu_memory_share),
            workspace_root=_first(by.workspace_root, self.workspace_root),
            max_clients=_first(by.max_clients, self.max_clients),
            seed=_first(by.seed, self.seed),
            profile=by.profile or self.profile,
            resume=by.resume or self.resume,
            log_level=by.log_level or self.log_level,
            log_json=self.log_json if by.log_json is None else by.log_json,
            show_progress=self.show_progress if by.show_progress is None else by.show_progress,
            extra=self.extra,
        )

    def sites_for(self, spec: JobSpec) -> list[str]:
        """The simulated sites: those named, site-1 to site-N, or the job's own; without any word two, or min_clients.

        Of a job that names its sites, some may be chosen, but no others.

        Raises:
            JobError: fewer than ``min_clients``, more than ``max_clients``, or not those that the job names.
        """
        sites = list(self.clients) or [f"site-{number + 1}" for number in range(self.num_clients)]
        if spec.sites is not None:
            if strangers := [site for site in sites if site not in spec.sites]:
                raise JobError(
                    f"client {strangers[0]!r} has no part in job {spec.name!r}: its meta.json names"
                    f" {', '.join(spec.sites)} (deploy_map, sites); choose among them, or name nobody there"
                )
            sites = sites or list(spec.sites)
        sites = sites or [f"site-{number + 1}" for number in range(max(_DEFAULT_CLIENTS, spec.min_clients))]
        if spec.min_clients > len(sites):
            raise JobError(
                f"min_clients={spec.min_clients} but the simulation has {len(sites)} clients: no round could close;"
                " raise num_clients or lower min_clients"
            )
        if missing := [name for name in spec.mandatory_clients if name not in sites]:
            raise JobError(
                f"mandatory client {missing[0]!r} of job {spec.name!r} is not among the clients {', '.join(sites)}:"
                " name it (-c, or clients=[...]), or take it out of mandatory_clients"
            )
        if self.max_clients is not None and len(sites) > self.max_clients:
            raise JobError(f"{len(sites)} clients; at most {self.max_clients}: raise it with -m, or have fewer")
        return sites

    def workspace_for(self, name: str) -> Path:
        """The folder of this job's runs.

        Raises:
            JobError: the workspace is a file.
        """
        root = self.workspace_root or Path(os.environ.get("FEDLOOM_WORKSPACE") or DEFAULT_WORKSPACE)
        root = root.expanduser().resolve()
        if root.exists() and not root.is_dir():
            raise JobError(f"workspace {root} is a file; name a folder, in which {name!r} is made")
        return root / name


def _first(one: Any, other: Any) -> Any:
    return other if one is None else one


def simulate(options: SimOptions, *, job: Job | None = None, folder: Path | None = None) -> SimResult:
    """Run a job, or the job in a folder (NVFLARE's are converted), to its end in a workspace of its own.

    Raises:
        JobError: the job does not fit the options, or the workspace is not fedloom's to write into.
    """
    if folder is None:
        return _simulate(options, job, None)
    with job_folder(folder) as ours:
        return _simulate(options, job, ours)


def _simulate(options: SimOptions, job: Job | None, folder: Path | None) -> SimResult:
    spec = job.spec() if job is not None else JobSpec.load(_given(folder))
    sites, seed, threads = checked(options, spec)
    from ..sim import preload

    try:
        preload.start_early()  # it loads what it needs while this process does
        return _run(options, job, folder, spec, sites, seed, threads)
    finally:
        preload.end_early()


def checked(options: SimOptions, spec: JobSpec) -> tuple[list[str], int, int | None]:
    """The sites, the seed and T; what is wrong with any of the options is said before anything is moved.

    Raises:
        JobError: the job does not fit the options, or the machine has no such GPUs.
    """
    _check_extra(options.extra)
    sites = options.sites_for(spec)
    check_named(spec, sites)
    threads = None if options.num_threads is None else min(len(sites), options.num_threads)
    from ..sim.devices import check_present
    from ..sim.gpus import parse_gpus, slots, unmet, worker_count

    groups = parse_gpus(options.gpu_config)
    slots(groups, worker_count(len(sites), threads, groups), options.gpu_memory_share)
    check_present(groups)
    if text := unmet(spec.resource_spec, sites, groups):
        note(text)
    return sites, spec.seed if options.seed is None else options.seed, threads


def check_named(spec: JobSpec, sites: Sequence[str]) -> None:
    """Look for names of clients that are not in the simulation: a name that is misspelled would be ignored.

    Raises:
        JobError: an evaluation would wait for one.
    """
    for workflow in spec.workflows:
        listed = workflow.args.get("participating_clients")
        for site in cast("list[Any]", listed) if isinstance(listed, list | tuple) else ():
            if site not in sites:
                raise JobError(
                    f"participating_clients: {site!r} is not among the clients {', '.join(sites)}: name those that are,"
                    " or leave it out for all"
                )
    named = {site for app in spec.site_apps for site in app.sites}
    for item in (*spec.executors, *spec.client_input, *spec.client_output):
        named |= set(item.sites)
    maps = [spec.client_extra.get(SITE_CONFIG), *(item.args.get("aggregation_weights") for item in spec.workflows)]
    for given in maps:
        named |= set(cast("Mapping[str, Any]", given)) if isinstance(given, Mapping) else set()
    if absent := sorted(named - set(sites)):
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        note(
            f"the job has settings for {', '.join(absent[:5])}{more}, not among the clients of this simulation"
            f" ({', '.join(sites[:5])}{', ...' if len(sites) > 5 else ''}): they are not used"
        )


def _check_extra(extra: Mapping[str, Any]) -> None:
    """Look at the settings that `SimEnv` passes on, before the last run's folder is moved."""
    from ..sim.prepare import SimConfig

    allowed = {item.name for item in fields(SimConfig)} - _OWN_FIELDS
    if unknown := sorted(extra.keys() - allowed):
        raise JobError(f"extra: unknown {unknown[0]!r}; allowed are {', '.join(sorted(allowed))}")


def _run(
    options: SimOptions,
    job: Job | None,
    folder: Path | None,
    spec: JobSpec,
    sites: list[str],
    seed: int,
    threads: int | None,
) -> SimResult:
    from ..sim.launcher import SimConfig, run_simulation  # only now: it is slow, and what is wrong was said before

    place = options.workspace_for(spec.name)
    resumed = options.resume and is_ours(place) and (place / UNFINISHED).is_file()
    if options.resume and not resumed:
        note(f"nothing to resume in {place}: the job begins anew")
    if not resumed and folder is not None and (inner := folder.expanduser().resolve()).is_relative_to(place):
        folder = previous(place) / inner.relative_to(place)  # the last run's own job: it moves away with it
    with run_folder(place, resume=resumed) as workspace:
        source = workspace / "job"
        if job is not None:
            if resumed:
                shutil.rmtree(source, ignore_errors=True)
            job.export(source)
        elif _given(folder).expanduser().resolve() != source:
            shutil.rmtree(source, ignore_errors=True)
            _copy(_given(folder), source)
        return run_simulation(SimConfig(**sim_settings(options, source, workspace, sites, seed, threads)))


def sim_settings(
    options: SimOptions, job: Path, workspace: Path, sites: Sequence[str], seed: int, threads: int | None
) -> dict[str, Any]:
    """The fields of `sim.launcher.SimConfig`."""
    return {
        "job_folder": job,
        "sites": sites,
        "threads": threads,
        "gpu": options.gpu_config,
        "gpu_memory_share": options.gpu_memory_share,
        "workspace": workspace,
        "seed": seed,
        "profile": options.profile,
        "resume": options.resume,
        "show_progress": options.show_progress,
        "log_level": options.log_level,
        "log_json": options.log_json,
        **options.extra,
    }


def _given(folder: Path | None) -> Path:
    assert folder is not None, "a job or a folder"
    return folder


def _copy(folder: Path, dest: Path) -> None:
    for name, path in folder_entries(folder):
        place = dest / name
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)


def compat_hint(text: str) -> str:
    """What to do where a script imports NVFLARE, and there is none; "" for other errors."""
    missing = "No module named 'nvflare"
    return "the script imports nvflare: run it as it is with `fedloom sim --compat nvflare`" if missing in text else ""


def raise_failure(result: SimResult) -> None:
    """Raise what ended a simulation before its time.

    Raises:
        TaskError: a site's code failed; its traceback is the message.
        GatherError: the job failed for another reason. FedloomError: it was aborted.
    """
    if result.status == COMPLETED:
        return
    error: FedloomError
    failure = next((item for item in result.failures if item.text), None)
    if result.status == ABORTED:
        error = FedloomError(f"job {result.job_id} was aborted{': ' if result.reason else ''}{result.reason}")
    elif failure is not None:
        error = TaskError(failure.site, failure.text)
        if why := result.reason.partition("\n")[0]:  # what follows in the reason is that traceback again
            error.add_note(why)
        if hint := compat_hint(failure.text):
            error.add_note(hint)
    else:
        error = GatherError(result.reason or f"job {result.job_id} ended as {result.status}")
    if result.result_dir.is_dir():
        error.add_note(f"logs and results: {result.result_dir}")
    if result.unfinished:
        from ..sim.committed import RESUME_HINT

        error.add_note(RESUME_HINT)
    raise error


def show_failures(result: SimResult) -> bool:
    """Say which clients failed in a simulation that was completed without them; whether there are any."""
    if result.status == COMPLETED and result.failures:
        print(f"warning: {describe(result.failures)}", file=sys.stderr)
    return bool(result.failures)
