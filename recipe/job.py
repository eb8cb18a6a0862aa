"""A job put together by hand: workflows, executors, code and an initial model, written as a job folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..serialization.errors import JobError
from ..serialization.jobspec import Component, ExecutorSpec, JobSpec, check_job_name
from . import code

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
    ) -> None:
        self.name = check_job_name(name)
        self.min_clients = min_clients
        self.num_rounds = num_rounds
        self.seed = seed
        self.sites = tuple(sites) if sites is not None else None
        self.threads_per_task = threads_per_task
        self.workflows: list[Component] = []
        self.executors: list[ExecutorSpec] = []
        self.components: list[Component] = []
        self.files: dict[str, Path] = {}
        self.params: Mapping[str, Any] | None = None

    def add_workflow(self, path: str, args: Mapping[str, Any] | None = None, *, id: str = "") -> None:
        """Add a workflow by its import path; several run one after another."""
        number = len(self.workflows)
        self.workflows.append(Component(path, dict(args or {}), id or f"controller{number or ''}"))

    def add_executor(self, component: Component, tasks: Sequence[str] = ("*",)) -> None:
        """Say what works on tasks of these names (exact, or patterns such as ``*``)."""
        self.executors.append(ExecutorSpec(tuple(tasks), component))

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
        folders = code.script_folders()
        wanted = Path(script).expanduser()
        candidates = [wanted] if wanted.is_absolute() else [folder / wanted for folder in folders]
        path = next((candidate.resolve() for candidate in candidates if candidate.is_file()), None)
        if path is None:
            where = " or ".join(str(candidate) for candidate in candidates)
            raise JobError(f"script {str(script)!r} not found: looked for {where}")
        found = code.local_code([path, *(one for one in more if not one.is_dir())], folders)
        for folder in (one for one in more if one.is_dir()):
            found |= code.tree(folder)
        for name, file in found.items():
            code.add_file(self.files, name, file)
        return path.name

    def add_file(self, path: str | Path) -> None:
        """Take along a file or a folder: it lies at the top of the job's custom folder, beside the script.

        Raises:
            JobError: it is not there, or another file has its place.
        """
        wanted = Path(path).expanduser()
        candidates = [wanted] if wanted.is_absolute() else [folder / wanted for folder in code.script_folders()]
        found = next((candidate for candidate in candidates if candidate.exists()), None)
        if found is None:
            where = " or ".join(str(candidate) for candidate in candidates)
            raise JobError(f"file {str(path)!r} to take along not found: looked for {where}")
        for name, file in code.tree(found).items():
            code.add_file(self.files, name, file)

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
        custom = spec.custom_dir(folder)
        for name, path in self.files.items():
            place = custom / name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copy(path, place)
            except OSError as error:
                raise JobError(f"{path} cannot be taken along: {error}") from None
        spec.check_files(folder)
        return folder
