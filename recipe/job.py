"""A job put together by hand: workflows, executors, code and an initial model, written as a job folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..serialization.errors import JobError
from ..serialization.jobspec import CUSTOM_DIR, Component, ExecutorSpec, JobSpec, Point, check_job_name
from . import code
from .jobsides import JobSides

INITIAL_MODEL = "initial_model.safetensors"


class Job:
    """What a recipe fills in, and what can be filled in without one.

    Args:
        name: the job's name; also the name of its folder in a simulation's workspace.
        min_clients: sites that a round needs.
        num_rounds: rounds, as progress shows them; a workflow has its own argument.
        seed: what sampling and the generators of each task are drawn from.
        sites: the sites that take part; None: every connected one.
        threads_per_task: threads that a task's numeric libraries use; they change a result's last bits.
        mandatory_clients: sites without whose results no round is good.
        resource_spec: what sites' tasks need, such as ``{"site-1": {"num_of_gpus": 1}}``: kept with the job.

    Raises:
        JobError: a name or number that is not allowed.
    """

    def __init__(
        self,
        name: str,
        *,
        min_clients: int = 1,
        num_rounds: int = 1,
        seed: int = 0,
        sites: Sequence[str] | None = None,
        threads_per_task: int = 1,
        mandatory_clients: Sequence[str] = (),
        resource_spec: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = check_job_name(name)
        self.min_clients = min_clients
        self.num_rounds = num_rounds
        self.seed = seed
        self.sites = tuple(sites) if sites is not None else None
        self.threads_per_task = threads_per_task
        self.mandatory_clients = tuple(mandatory_clients)
        self.resource_spec = dict(resource_spec or {})
        self.workflows: list[Component] = []
        self.executors: list[ExecutorSpec] = []
        self.components: list[Component] = []
        self.files: dict[str, Path] = {}
        self.sides = JobSides()
        self.params: Mapping[str, Any] | None = None

    def add_workflow(self, path: str, args: Mapping[str, Any] | None = None, *, id: str = "") -> None:
        """Add a workflow by its import path; several run one after another."""
        number = len(self.workflows)
        self.workflows.append(Component(path, dict(args or {}), id or f"controller{number or ''}"))

    def add_executor(self, component: Component, tasks: Sequence[str] = ("*",), sites: Sequence[str] = ()) -> None:
        """Say what works on tasks of these names (exact, or patterns such as ``*``), at these sites or at all.

        An entry that names a site goes before one for all; then an exact task name before a pattern.
        """
        self.executors.append(ExecutorSpec(tuple(tasks), component, tuple(sites)))

    def add_component(self, path: str, args: Mapping[str, Any] | None = None, *, id: str) -> None:
        """Add a component that workflows find by its id."""
        self.components.append(Component(path, dict(args or {}), id))

    def add_code(self, script: str | Path, *more: Path) -> str:
        """Take along a script with the modules beside it that it imports, and so with ``more`` files.

        Args:
            more: other modules' files, and packages' folders, which go as they are.

        Returns:
            The script's place in the job's custom folder.

        Raises:
            JobError: it is not there, is not valid Python, or another file has its place.
        """
        path = _found(script, f"script {str(script)!r}", Path.is_file).resolve()
        self.add_sources([path, *more])
        return path.name

    def add_sources(self, sources: Sequence[Path]) -> None:
        """Take along Python files with what they import beside them, and packages' folders.

        Raises:
            JobError: one is not there, is not valid Python, or another file has its place.
        """
        folders = [one for one in sources if one.is_dir()]
        found = code.local_code([one for one in sources if not one.is_dir()], code.script_folders())
        for folder in folders:
            found |= code.tree(folder)
        for name, file in found.items():
            code.add_file(self.files, name, file)

    def add_file(self, path: str | Path) -> None:
        """Take along a file or a folder: it lies at the top of the job's custom folder, beside the script.

        Raises:
            JobError: it is not there, or another file has its place.
        """
        for name, file in code.tree(_found(path, f"file {str(path)!r} to take along", Path.exists)).items():
            code.add_file(self.files, name, file)

    def add_server_file(self, path: str | Path) -> None:
        """The same for the server's side alone.

        Raises:
            JobError: as `add_file`.
        """
        self.sides.add_files(code.tree(_found(path, f"file {str(path)!r} to take along", Path.exists)), "server", None)

    def add_client_file(self, path: str | Path, clients: Sequence[str] | None = None) -> None:
        """The same for the sites' side alone: for all of them, or for these.

        Raises:
            JobError: as `add_file`.
        """
        self.sides.add_files(
            code.tree(_found(path, f"file {str(path)!r} to take along", Path.exists)), "client", clients
        )

    def add_filter(
        self,
        point: Point,
        component: Component,
        tasks: Sequence[str] | None = None,
        clients: Sequence[str] | None = None,
    ) -> None:
        """Add a filter on one of the four points, behind those that are there.

        Args:
            tasks: names or patterns of tasks; None: all.
            clients: for a point at the sites, which of them; None: all.

        Raises:
            JobError: tasks or clients that are no lists of names.
        """
        self.sides.add_filter(point, component, tasks, clients)

    def set_model(self, params: Mapping[str, Any]) -> str:
        """Set the initial global model.

        Args:
            params: arrays or tensors by name; nested maps are flattened.

        Returns:
            The file's name, which a workflow's ``initial_model`` argument takes.
        """
        self.params = params
        return INITIAL_MODEL

    def spec(self) -> JobSpec:
        """The job, checked.

        Raises:
            JobError: nothing to run, or a number that is not allowed.
        """
        sides = self.sides
        return JobSpec(
            name=self.name,
            min_clients=self.min_clients,
            num_rounds=self.num_rounds,
            seed=self.seed,
            sites=self.sites,
            threads_per_task=self.threads_per_task,
            workflows=tuple(self.workflows),
            executors=tuple(self.executors),
            components=tuple(self.components),
            mandatory_clients=self.mandatory_clients,
            resource_spec=self.resource_spec,
            server_output=sides.of("server_output"),
            server_input=sides.of("server_input"),
            client_input=sides.of("client_input"),
            client_output=sides.of("client_output"),
            server_extra=dict(sides.server_config),
            client_extra=sides.client_extra,
            app=sides.app,
            client_app=sides.client_app,
            site_apps=sides.site_apps(self.executors),
        )

    def export(self, folder: str | Path) -> Path:
        """Write the job folder; it must not exist, be empty, or be a job folder, which is replaced.

        Raises:
            JobError: something else is there, or a part of the job is not allowed.
        """
        from ..serialization.errors import PayloadError
        from ..serialization.model import FLModel
        from ..serialization.payload import encode_model

        folder = Path(folder).expanduser().resolve()
        spec = self.spec()
        if folder.exists():
            if not folder.is_dir():
                raise JobError(f"{folder} is a file; a job is written as a folder")
            if any(folder.iterdir()):
                if not (folder / "meta.json").is_file() or not (folder / spec.app / "config").is_dir():
                    raise JobError(f"{folder} holds something that is not a job; name an empty or new folder")
                shutil.rmtree(folder)
        spec.write(folder)
        if self.params is not None:
            try:
                encoded = encode_model(FLModel(params=dict(self.params)))
            except (PayloadError, TypeError, ValueError) as error:
                raise JobError(f"the initial model cannot be written: {error}") from None
            with (spec.app_dir(folder) / INITIAL_MODEL).open("wb") as file:
                encoded.write_to(file)
        for app, files in self.sides.files(spec, self.files).items():
            for name, path in files.items():
                place = folder / app / CUSTOM_DIR / name
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    shutil.copy(path, place)
                except OSError as error:
                    raise JobError(f"{path} cannot be taken along: {error}") from None
        spec.check_files(folder)
        return folder


def _found(path: str | Path, what: str, there: Callable[[Path], bool]) -> Path:
    """A path as a job names it: beside the running script, or here.

    Raises:
        JobError: it is not there.
    """
    wanted = Path(path).expanduser()
    candidates = [wanted] if wanted.is_absolute() else [folder / wanted for folder in code.script_folders()]
    found = next((candidate for candidate in candidates if there(candidate)), None)
    if found is None:
        where = " or ".join(str(candidate) for candidate in candidates)
        raise JobError(f"{what} not found: looked for {where}")
    return found
