"""From a job, or a job folder, to the plan of its simulation: what `SimEnv.plan` and `fedloom sim --plan` share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..serialization.jobspec import JobSpec
from ..serialization.scratch import Scratch
from .intake import job_folder
from .simulate import SimOptions, checked, sim_settings

if TYPE_CHECKING:
    from ..sim.planning.figures import Plan
    from .job import Job

__all__ = ["Planned", "plan_job"]


class Planned(SystemExit):
    """Ends a job script that was run for its plan alone, where it would have run its job."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(0)
        self.plan = plan


def plan_job(options: SimOptions, *, job: Job | None = None, folder: Path | None = None) -> Plan:
    """What a simulation would take, from a run of one client for two rounds in a temporary folder.

    Raises:
        JobError: the job does not fit the options.
        TaskError: the client's code failed; the message is its traceback.
    """
    if folder is not None:
        with job_folder(folder) as ours:
            return _plan(options, ours)
    assert job is not None, "a job or a folder"
    with Scratch("job") as temporary:
        return _plan(options, job.export(temporary / "job"))


def _plan(options: SimOptions, folder: Path) -> Plan:
    spec = JobSpec.load(folder)
    sites, seed, threads = checked(options, spec)
    from ..sim import preload

    try:
        preload.start_early()
        from ..sim.planning.trial import plan_simulation
        from ..sim.prepare import SimConfig

        settings = sim_settings(options, folder, options.workspace_for(spec.name), sites, seed, threads)
        return plan_simulation(SimConfig(**settings))
    finally:
        preload.end_early()
