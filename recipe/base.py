"""The base of recipes: a job with a name, what travels with it, and where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .job import Job

if TYPE_CHECKING:
    from .env import Env
    from .run import Run


class Recipe:
    """A job that a few arguments describe. Subclasses fill in ``self.job``."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @property
    def name(self) -> str:
        """The job's name."""
        return self.job.name

    def add_client_file(self, path: str | Path) -> None:
        """Take along a file or folder that the training script needs and that is not found by its imports.

        Raises:
            JobError: it is not there, or another file has its place.
        """
        self.job.add_file(path)

    def add_server_file(self, path: str | Path) -> None:
        """Take along a file or folder for the server's side; a job carries one set of files for both."""
        self.job.add_file(path)

    def export(self, job_dir: str | Path) -> Path:
        """Write the job folder, which `fedloom job submit` and `fedloom sim` take.

        Raises:
            JobError: the folder holds something else, or a part of the job is not allowed.
        """
        return self.job.export(job_dir)

    def execute(self, env: Env) -> Run:
        """Run the job in an environment: `SimEnv` on this machine until it ends, `ProdEnv` at a broker.

        Raises:
            JobError: the job does not fit the environment.
            TaskError: (simulation) a site's code failed; the message is its traceback.
            LinkError: the broker cannot be reached.
        """
        return env.deploy(self.job)

    def run(self, env: Env) -> Run:
        """The same as `execute`."""
        return self.execute(env)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r})"


def torch_params(model: Any) -> dict[str, Any]:
    """A torch module's state: its parameters and buffers by name, on the CPU."""
    state: dict[str, Any] = model.state_dict()
    return {key: value.detach().cpu() if hasattr(value, "detach") else value for key, value in state.items()}
