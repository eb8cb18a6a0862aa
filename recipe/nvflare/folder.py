"""A job folder on its way in: fedloom's stays as it is, NVFLARE's becomes one of fedloom's, beside the original."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ...serialization.archive import folder_entries
from ...serialization.component import KNOWN_NAMES, Component
from ...serialization.errors import FedloomError, JobError
from ...serialization.jobfolder import (
    CLIENT_CONFIGS,
    SERVER_CONFIGS,
    Deployment,
    config_file,
    deployment_of,
    write_job,
)
from ...serialization.jobjson import list_of, map_of, read_json, texts_of
from ...serialization.jobspec import (
    CUSTOM_DIR,
    DEFAULT_APP,
    FORMAT,
    META_FILE,
    ClientApp,
    ExecutorSpec,
    FilterSpec,
    JobSpec,
    check_job_name,
)
from ...serialization.jobvars import resolve_config
from ...serialization.model import FLModel
from ...serialization.payload import encode_model
from ..job import INITIAL_MODEL
from ..models import numpy_model
from ..options import whole
from .build_model import build_model
from .convert import (
    PREFIX,
    TRAINER_SCRIPT,
    Notes,
    Part,
    executor,
    filter_component,
    left_over,
    part_of,
    trainer_delta,
    workflow,
)
from .table import FEDAVG

#: What NPModelPersistor starts from where it is given no model.
_DEFAULT_ARRAY = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
_FILTERS = ("task_data_filters", "task_result_filters")
_META_KEYS = frozenset({"format", "name", "min_clients", "mandatory_clients", "resource_spec", "deploy_map", "sites"})
_TRAINER = '''"""What NVFLARE's NPTrainer does: add a number to every array; asked for a model, send the last one."""

from fedloom.client import FLModel

DELTA = {delta!r}


def train(model, ctx):
    """Add DELTA, or give the model that was trained last."""
    if ctx.task == "submit_model":
        return FLModel(params={{name: ctx.state[name] for name in ctx.state}})
    params = {{name: value + DELTA for name, value in model.params.items()}}
    for name, value in params.items():
        ctx.state[name] = value
    return FLModel(params=params, meta={{"NUM_STEPS_CURRENT_ROUND": 1}})
'''


def needs_conversion(folder: Path) -> bool:
    """Whether this is a job of NVFLARE's: a meta.json without ``format``, none at all, or a config with its classes."""
    meta_file = folder / META_FILE
    if not meta_file.is_file():
        return _is_app(folder)
    meta = read_json(meta_file)
    if "format" not in meta:
        return True
    if meta["format"] != FORMAT:
        return False  # said where it is read
    return _names_theirs(folder.glob("*/config/*.json"))


def _names_theirs(files: Iterable[Path]) -> bool:
    return any(f'"{PREFIX}' in file.read_text("utf-8", "replace") for file in files if file.is_file())


def _with_paths(value: Any) -> Any:
    """A config of fedloom's own components, those that are named by their class alone with their paths."""
    if isinstance(value, list):
        return [_with_paths(item) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    entry = {key: _with_paths(item) for key, item in cast("dict[str, Any]", value).items()}
    if "args" in entry and entry.get("name") in KNOWN_NAMES and "path" not in entry:
        entry["path"] = KNOWN_NAMES[entry.pop("name")]
    return entry


def _is_app(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*SERVER_CONFIGS, *CLIENT_CONFIGS))


def convert_folder(folder: Path, dest: Path, environ: Mapping[str, str] | None = None) -> Notes:
    """Write the job in a folder of NVFLARE's as one of fedloom's.

    Args:
        folder: a job folder, or an app's folder alone.
        dest: a folder that is not there yet.
        environ: where ``FEDLOOM_<NAME>`` variables are looked for; None: this process's.

    Raises:
        JobError: a component or an argument that has no equivalent, named with the nearest; or a folder that is no job.
    """
    return _Conversion(folder, dest, os.environ if environ is None else environ).run()


class _Conversion:
    def __init__(self, folder: Path, dest: Path, environ: Mapping[str, str]) -> None:
        self._folder = folder
        self._dest = dest
        self._environ = environ
        self._notes = Notes()
        self._alone = not (folder / META_FILE).is_file()  # an app without a job around it
        self._theirs = _names_theirs(folder.glob("config/*.json" if self._alone else "*/config/*.json"))

    def run(self) -> Notes:
        meta_file = self._folder / META_FILE
        meta: dict[str, Any] = {} if self._alone else read_json(meta_file)
        deployment = Deployment(DEFAULT_APP, DEFAULT_APP, {}, None) if self._alone else deployment_of(meta, meta_file)
        server_file = config_file(self._app(deployment.server), SERVER_CONFIGS)
        server = self._config(server_file)
        self._copy(deployment)
        min_clients = cast("int", meta.get("min_clients") or 1)
        workflows, components = self._server(server, server_file, deployment.server, min_clients)
        common = None if deployment.common is None else self._client(deployment.common, ())
        site_apps = tuple(self._client(name, sites) for name, sites in deployment.site_apps.items())
        apps = [*([common] if common else []), *site_apps]
        workflows = [_with_transfer(item, apps) for item in workflows]
        spec = JobSpec(
            name=check_job_name(str(meta.get("name") or self._name())),
            workflows=tuple(workflows),
            components=tuple(components),
            min_clients=min_clients,
            num_rounds=sum(_rounds(item, server_file) for item in workflows) or 1,
            sites=deployment.sites,
            mandatory_clients=tuple(texts_of(meta.get("mandatory_clients") or [], f"{meta_file}: mandatory_clients")),
            resource_spec=map_of(meta.get("resource_spec") or {}, f"{meta_file}: resource_spec"),
            server_output=self._filters(server, _FILTERS[0], server_file),
            server_input=self._filters(server, _FILTERS[1], server_file),
            server_extra=_rest(server, {"workflows"}),
            executors=common.executors if common else (),
            client_components=common.components if common else (),
            client_input=common.input_filters if common else (),
            client_output=common.output_filters if common else (),
            client_extra=common.extra if common else {},
            app=deployment.server,
            client_app="" if deployment.common in (None, deployment.server) else str(deployment.common),
            site_apps=site_apps,
            extra={key: value for key, value in meta.items() if key not in _META_KEYS},
        )
        write_job(spec, self._dest)
        return self._notes

    def _config(self, file: Path) -> dict[str, Any]:
        config = resolve_config(read_json(file), self._environ, str(file))
        return config if self._theirs else _with_paths(config)

    def _app(self, name: str) -> Path:
        return self._folder if self._alone else self._folder / name

    def _name(self) -> str:
        folder = self._folder.resolve()
        return (folder.parent if self._alone and folder.name == DEFAULT_APP else folder).name

    def _copy(self, deployment: Deployment) -> None:
        """Everything but the configs and meta.json, which are written anew."""
        apps = {deployment.server, *([deployment.common] if deployment.common else []), *deployment.site_apps}
        for app in sorted(apps):
            source = self._app(app)
            if not source.is_dir():
                raise JobError(
                    f"{self._folder / META_FILE}: deploy_map names app {app!r}, and there is no folder {source}"
                )
            (self._dest / app / CUSTOM_DIR).mkdir(parents=True)
            for name, path in folder_entries(source):
                if path.is_file() and not name.startswith("config/"):
                    place = self._dest / app / name
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, place)

    # ------------------------------------------------------------ server

    def _server(
        self, config: Mapping[str, Any], file: Path, app: str, min_clients: int
    ) -> tuple[list[Component], list[Component]]:
        listed = [
            part_of(item, f"{file}: components[{number}]")
            for number, item in enumerate(list_of(config.get("components", []), f"{file}: components"))
        ]
        parts = {part.id: part for part in listed}
        found = list_of(config.get("workflows", []), f"{file}: workflows")
        workflows = [
            workflow(part_of(item, at), parts, self._notes, at, min_clients=min_clients)
            for number, item in enumerate(found)
            for at in [f"{file}: workflows[{number}]"]
        ]
        used = {str(part.args.get("model")) for part in listed if part.theirs} | {
            str(part_of(item, str(file)).args.get("aggregator_id", "aggregator")) for item in found
        }
        components = left_over(listed, used, self._notes, str(file))
        model = self._initial(listed, parts, app, str(file))
        first = next((number for number, item in enumerate(workflows) if "initial_model" not in item.args), None)
        if model and first is not None:
            item = workflows[first]
            workflows[first] = Component(item.path, {**item.args, **model}, item.id)
        return workflows, components

    def _initial(self, listed: Sequence[Part], parts: Mapping[str, Part], app: str, where: str) -> dict[str, Any]:
        """The workflow's arguments for what a persistor starts from; its file is written."""
        persistor = next(
            (p for p in listed if p.theirs and p.name in ("NPModelPersistor", "PTFileModelPersistor")), None
        )
        if persistor is None:
            return {}
        at = f"{where}: component {persistor.id!r}"
        checkpoint, given = persistor.args.get("source_ckpt_file_full_name"), persistor.args.get("model")
        if isinstance(checkpoint, str) and checkpoint and not Path(checkpoint).is_absolute():
            return self._write(self._checkpoint(checkpoint, app, at), app, at)
        out: dict[str, Any] = {"initial_ckpt": checkpoint} if checkpoint else {}
        if persistor.name == "NPModelPersistor":
            if checkpoint and given is None:
                return out
            return out | self._write(numpy_model(_DEFAULT_ARRAY if given is None else given)[0], app, at)
        if isinstance(given, str) and given:
            if given not in parts:
                raise JobError(f"{at}: model {given!r} is no component of the server's")
            model = parts[given].component
        elif isinstance(given, dict):
            model = part_of(cast("object", given), f"{at}: model").component
        else:
            return out
        build_model(model, self._dest / app / CUSTOM_DIR, self._dest / app / INITIAL_MODEL, at)
        return out | {"initial_model": INITIAL_MODEL}

    def _checkpoint(self, name: str, app: str, where: str) -> Any:
        from ...controller.checkpoints import read_checkpoint

        places = [self._dest / app / CUSTOM_DIR / name, self._dest / app / name]
        found = next((place for place in places if place.is_file()), None)
        if found is None or ".." in Path(name).parts:
            raise JobError(f"{where}: source_ckpt_file_full_name={name!r} is not in the job's app; nor is it absolute")
        return read_checkpoint(found, "source_ckpt_file_full_name")

    def _write(self, params: Any, app: str, where: str) -> dict[str, Any]:
        try:
            encoded = encode_model(FLModel(params=params))
        except (FedloomError, TypeError, ValueError) as error:
            raise JobError(f"{where}: the initial model cannot be written: {error}") from None
        with (self._dest / app / INITIAL_MODEL).open("wb") as file:
            encoded.write_to(file)
        return {"initial_model": INITIAL_MODEL}

    # ------------------------------------------------------------ sites

    def _client(self, app: str, sites: tuple[str, ...]) -> ClientApp:
        file = config_file(self._app(app), CLIENT_CONFIGS)
        config = self._config(file)
        listed = [
            part_of(item, f"{file}: components[{number}]")
            for number, item in enumerate(list_of(config.get("components", []), f"{file}: components"))
        ]
        parts = {part.id: part for part in listed}
        executors: list[ExecutorSpec] = []
        for number, item in enumerate(list_of(config.get("executors", []), f"{file}: executors")):
            at = f"{file}: executors[{number}]"
            entry = map_of(item, at)
            part = part_of(entry.get("executor"), f"{at}: executor")
            component = executor(part, parts, self._notes, at)
            if component.args.get("task_script_path") == TRAINER_SCRIPT and part.theirs:
                self._write_trainer(app, trainer_delta([part]))
            executors.append(
                ExecutorSpec(
                    tuple(texts_of(entry.get("tasks", ["*"]), f"{at}: tasks")),
                    component,
                    tuple(texts_of(entry.get("sites", []), f"{at}: sites")),
                )
            )
        return ClientApp(
            app,
            sites,
            tuple(executors),
            tuple(left_over(listed, set(), self._notes, str(file))),
            self._filters(config, _FILTERS[0], file),
            self._filters(config, _FILTERS[1], file),
            _rest(config, {"executors"}),
        )

    def _write_trainer(self, app: str, delta: Any) -> None:
        custom = self._dest / app / CUSTOM_DIR
        custom.mkdir(parents=True, exist_ok=True)
        (custom / TRAINER_SCRIPT).write_text(_TRAINER.format(delta=json.loads(json.dumps(delta))), "utf-8")

    def _filters(self, config: Mapping[str, Any], key: str, file: Path) -> tuple[FilterSpec, ...]:
        out: list[FilterSpec] = []
        for number, item in enumerate(list_of(config.get(key, []), f"{file}: {key}")):
            at = f"{file}: {key}[{number}]"
            entry = map_of(item, at)
            chain = tuple(
                filter_component(part_of(one, at), self._notes, at)
                for one in list_of(entry.get("filters", []), f"{at}: filters")
            )
            tasks = tuple(texts_of(entry.get("tasks", ["*"]), f"{at}: tasks"))
            out.append(FilterSpec(chain, tasks, tuple(texts_of(entry.get("sites", []), f"{at}: sites"))))
        return tuple(out)


def _with_transfer(item: Component, apps: Sequence[ClientApp]) -> Component:
    """FedAvg, told of the differences that its sites send."""
    told = {spec.component.args.get("params_transfer_type") for app in apps for spec in app.executors}
    if item.path != FEDAVG or told != {"DIFF"}:
        return item
    return Component(item.path, item.args | {"params_transfer_type": "DIFF"}, item.id)


def _rounds(item: Component, file: Path) -> int:
    return whole(item.args.get("num_rounds", 0), f"{file}: num_rounds of workflow {item.id!r}")


def _rest(config: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    taken = {"format_version", "components", *_FILTERS, *known}
    return {key: value for key, value in config.items() if key not in taken}
