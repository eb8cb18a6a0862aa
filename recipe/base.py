"""The base of recipes: a job with a name, what travels with it, and where it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..serialization.errors import JobError
from ..serialization.jobspec import Point
from .components import component_of
from .job import Job

if TYPE_CHECKING:
    from .env import Env
    from .options import ExchangeOptions, ScriptOptions
    from .run import Run


class Recipe:
    """A job that a few arguments describe. Subclasses fill in ``self.job``."""

    #: what a recipe of scripts has its sites run, and how models pass; None where it runs none
    script: ScriptOptions | None = None
    exchange: ExchangeOptions | None = None

    def __init__(self, job: Job) -> None:
        self.job = job
        self._per_site = False

    @property
    def name(self) -> str:
        """The job's name."""
        return self.job.name

    def add_client_file(self, path: str | Path, clients: Sequence[str] | None = None) -> None:
        """Take along a file or folder that the training script needs and that is not found by its imports.

        It lies beside the script at every site, or at those of ``clients``, and not at the server.

        Raises:
            JobError: it is not there, or another file has its place.
        """
        self.job.add_client_file(path, clients)

    def add_server_file(self, path: str | Path) -> None:
        """Take along a file or folder for the server's side alone: at the top of its folder on ``sys.path``.

        Raises:
            JobError: it is not there, or another file has its place.
        """
        self.job.add_server_file(path)

    def add_client_config(self, config: Mapping[str, Any], clients: Sequence[str] | None = None) -> None:
        """Add settings of your own to the clients' config: `flare.get_config()` and ``ctx.config`` hold them.

        Args:
            config: JSON's types by name.
            clients: who gets them; None: all.

        Raises:
            JobError: a name that the job fills in by itself, or a value that JSON cannot hold.
        """
        self.job.sides.add_config(config, "client", clients)

    def add_server_config(self, config: Mapping[str, Any]) -> None:
        """Add settings of your own to the server's config: a workflow finds them in ``fed.config``.

        Raises:
            JobError: as `add_client_config`.
        """
        self.job.sides.add_config(config, "server", None)

    # ------------------------------------------------------------ filters

    def add_server_output_filter(self, filter: object, tasks: Sequence[str] | None = None) -> None:
        """Let a filter change what the server sends: once a gather, on a copy of the model.

        Args:
            filter: an object with ``process(model, context) -> FLModel | None`` (see `docs/guides/job-folders.md`), of
                a class in a module beside the job script; or ``{"class_path": ..., "args": ...}``.
            tasks: names or patterns of tasks; None: all.

        Raises:
            JobError: no such object, or one whose arguments cannot be known.
        """
        self._add_filter("server_output", filter, tasks, None)

    def add_client_input_filter(
        self, filter: object, tasks: Sequence[str] | None = None, clients: Sequence[str] | None = None
    ) -> None:
        """Let a filter change what comes in at the sites, or at those of ``clients``, before user code sees it.

        Raises:
            JobError: as `add_server_output_filter`.
        """
        self._add_filter("client_input", filter, tasks, clients)

    def add_client_output_filter(
        self, filter: object, tasks: Sequence[str] | None = None, clients: Sequence[str] | None = None
    ) -> None:
        """Let a filter change what sites send, after the difference was taken (DIFF) and before it leaves the site.

        Raises:
            JobError: as `add_server_output_filter`.
        """
        self._add_filter("client_output", filter, tasks, clients)

    def add_server_input_filter(self, filter: object, tasks: Sequence[str] | None = None) -> None:
        """Let a filter change each result before it is used: it is decoded for that, and sites send no partials.

        Raises:
            JobError: as `add_server_output_filter`.
        """
        self._add_filter("server_input", filter, tasks, None)

    def _add_filter(
        self, point: Point, filter: object, tasks: Sequence[str] | None, clients: Sequence[str] | None
    ) -> None:
        component, sources = component_of(filter, "filter")
        made: Any = component.load() if isinstance(filter, Mapping) else filter
        if not callable(getattr(made, "process", None)):
            raise JobError(
                f"filter {component.path} has no process(model, context) that returns an FLModel or None: see"
                " docs/guides/job-folders.md"
            )
        self.job.add_sources(sources)
        self.job.add_filter(point, component, tasks, clients)

    def set_per_site_config(self, config: Mapping[str, Mapping[str, Any]]) -> None:
        """Give sites a script, arguments or settings of their own; the others keep the recipe's.

        Args:
            config: by site, the options that differ there: ``train_script``, ``train_args``,
                ``launch_external_process``, ``command``, ``framework``, ``launch_once``, ``launch_timeout``,
                ``shutdown_timeout`` and so on.

        Raises:
            JobError: called twice, no such option, a value that is not allowed, or a recipe that runs no script.
        """
        from .sitescripts import add_site_scripts

        if self.script is None or self.exchange is None:
            raise JobError(f"{type(self).__name__} runs no training script, so there is none to set for a site")
        if self._per_site:
            raise JobError("the per-site configuration was set already: give all sites in one map")
        add_site_scripts(self.job, self.script, self.exchange, config)
        self._per_site = True

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
