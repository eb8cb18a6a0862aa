"""What is to be simulated, and everything that can be found wrong with it, or put in its place, before it starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..serialization.archive import SKIPPED_NAMES
from ..serialization.errors import JobError
from ..serialization.jobspec import JobSpec, check_site_name
from .gpus import Slot, users

__all__ = ["SimConfig", "max_parked", "place_job", "place_workspace", "sites_of", "wants_torch"]

#: What a waiting script holds of its own: some 14 MiB after training, its data beside it, and its copies of the model.
_SCRIPT_BYTES = 64 * 1024 * 1024
_MODEL_COPIES = 4
_PARKED_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class SimConfig:
    """What is simulated, and how.

    Attributes:
        job_folder: the job; where it lies in the workspace already it is used there, else copied to ``job/``.
        workspace: the result folder. Made here, unless the job lies in it: then the caller has made it.
        sites: the simulated sites' names; none: those that the job names.
        threads: T, how many sites run at once; None: all of them, or one for each GPU group.
        gpu: ``"0,1"`` or ``"[0,1],[2,3]"``, dealt to the T slots in turn.
        gpu_memory_share: the part of each of its GPUs' memory that a worker may take: a number up to 1, or "equal".
        seed: in place of the job's own.
        max_parked: how many scripts may wait between their tasks before the least recently used is ended; None: what
            this machine's memory allows; with GPUs, whose memory each of them would hold, one for each slot, or where
            shares are set and there are more sites than slots, as many as have their share left beside the slots.
        profile: write where the time of the rounds went to ``profile/`` in the result folder.
        prefold: let the agent fold results before it sends them, where the aggregator allows it.
        log_level: which lines of the processes' logs are shown while it runs; all from "info" on are in ``logs/``.
        timeout_s: the run's bound; None: as long as it takes.
        grace_s: how long scripts may go on after the job has ended.
        resume: go on with the job that the last run here left unfinished, if there is one.
        keep_store: leave the broker's store and the agent's workspace in ``.sim/``.
        on_round: called with each committed round's record, within a fifth of a second of the commit.
        env, broker, agent: see `PipelineSettings`.
    """

    job_folder: Path
    workspace: Path
    sites: Sequence[str] = ()
    threads: int | None = None
    gpu: str | None = None
    gpu_memory_share: float | str | None = None
    seed: int | None = None
    max_parked: int | None = None
    profile: bool = False
    prefold: bool = True
    show_progress: bool = True
    log_level: str = "warning"
    log_json: bool = False
    timeout_s: float | None = None
    grace_s: float = 10.0
    resume: bool = False
    keep_store: bool = False
    on_round: Callable[[dict[str, Any]], None] | None = None
    env: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    broker: Mapping[str, Any] = field(default_factory=dict[str, Any])
    agent: Mapping[str, Any] = field(default_factory=dict[str, Any])


def sites_of(config: SimConfig, spec: JobSpec) -> tuple[str, ...]:
    sites = tuple(config.sites or spec.sites or ())
    if not sites:
        raise JobError("no sites to simulate: say how many clients there are, or name them")
    for site in sites:
        check_site_name(site)
    if len(set(sites)) != len(sites):
        raise JobError(f"the sites {list(sites)} name one twice")
    if strangers := sorted(set(sites) - set(spec.sites or sites)):
        raise JobError(
            f"site {strangers[0]!r} has no part in job {spec.name!r}, which names {', '.join(spec.sites or ())}"
        )
    if spec.min_clients > len(sites):
        raise JobError(
            f"min_clients={spec.min_clients} but {len(sites)} sites take part: no round could ever close;"
            " simulate more, or lower min_clients"
        )
    return sites


def place_workspace(config: SimConfig, stack: ExitStack) -> Path:
    from ..recipe.workspace import run_folder

    workspace = config.workspace.expanduser().resolve()
    if config.job_folder.resolve() == workspace / "job":
        return workspace  # whoever put the job there holds the folder
    return stack.enter_context(run_folder(workspace, resume=config.resume))


def place_job(config: SimConfig, workspace: Path, sites: tuple[str, ...]) -> JobSpec:
    """The job in its place, with the run's sites and seed in it."""
    folder = workspace / "job"
    if config.job_folder.resolve() != folder:
        shutil.rmtree(folder, ignore_errors=True)  # of the run that is resumed
        shutil.copytree(config.job_folder, folder, ignore=shutil.ignore_patterns(*SKIPPED_NAMES, "*.pyc"))
    spec = JobSpec.load(folder)
    wanted = replace(spec, sites=sites, seed=spec.seed if config.seed is None else config.seed)
    if wanted != spec:
        wanted.write(folder)
    return wanted


def max_parked(config: SimConfig, spec: JobSpec, folder: Path, slots: Sequence[Slot], sites: int) -> int:
    """How many scripts may wait between their tasks."""
    workers = len(slots)
    if config.max_parked is not None:
        return config.max_parked
    if slots[0].gpus:
        shared = max(sum(slot.share for slot in slots if gpu in slot.gpus) for gpu in users(slots))
        return int(workers * (1 / shared - 1) + 1e-6) if shared and sites > workers else workers
    model = max((path.stat().st_size for path in spec.app_dir(folder).glob("*.safetensors")), default=0)
    available = _available_bytes() * _PARKED_SHARE
    return max(workers, int(available / (_SCRIPT_BYTES + _MODEL_COPIES * model)))


def _available_bytes() -> int:
    """Memory that processes could still have, as the kernel estimates it."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def wants_torch(spec: JobSpec) -> bool:
    return any(e.component.args.get("params_exchange_format") == "pytorch" for e in spec.all_executors)
