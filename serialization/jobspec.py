"""A job as a folder: what runs where, with which arguments.

::

    meta.json                           name, min_clients, seed, num_rounds, sites, deploy_map
    app/config/config_fed_server.json   workflows (run one after another) and components
    app/config/config_fed_client.json   executors by task name, and components
    app/custom/                         the job's own code, first on sys.path
    app/initial_model.safetensors       where a workflow names it

A component is ``{"id", "path": "package.module.Class", "args": {...}}``; one nested in ``args`` is built first, unless
it has ``"config_type": "dict"``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, cast

from .errors import JobError

FORMAT = "fedloom/1"
ALL_SITES = "@ALL"
META_FILE = "meta.json"
SERVER_CONFIG = "config/config_fed_server.json"
CLIENT_CONFIG = "config/config_fed_client.json"
CUSTOM_DIR = "custom"
DEFAULT_APP = "app"
MAX_CONFIG_BYTES = 4 * 1024**2
MAX_SITES = 1_000_000

_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_COMPONENT_KEYS = frozenset({"id", "path", "args", "config_type"})
_FILTERS = ("task_data_filters", "task_result_filters")
#: meta.json keys with a field of their own; all others are kept in `JobSpec.extra`.
_META_KEYS = frozenset(
    {"format", "name", "min_clients", "deploy_map", "seed", "num_rounds", "sites", "threads_per_task"}
)


def check_site_name(name: str) -> str:
    """The name, if a site may be called so.

    Raises:
        JobError: it is not 1 to 128 letters, digits, '.', '_' and '-' with a letter or digit first.
    """
    if not _SITE.fullmatch(name):
        raise JobError(
            f"site name {name!r}; allowed are 1 to 128 letters, digits, '.', '_' and '-', a letter or digit first"
        )
    return name


def check_job_name(name: str) -> str:
    """The name, if a job may be called so (it names a folder too).

    Raises:
        JobError: empty, over 128 characters, not printable, with '/' or '\\', or with '.' first.
    """
    if not 0 < len(name) <= 128 or not name.isprintable() or name[0] in ". " or set(name) & {"/", "\\"}:
        raise JobError(f"job name {name!r}; allowed are 1 to 128 printable characters, no '/' or '\\', no '.' first")
    return name


@dataclass(frozen=True, slots=True)
class Component:
    """A class by its import path, and the arguments it is built with."""

    path: str
    args: dict[str, Any] = field(default_factory=dict[str, Any])
    id: str = ""

    def load(self) -> Any:
        """The class or function that ``path`` names.

        Raises:
            JobError: the module cannot be imported, or has no such name.
        """
        module, _, name = self.path.rpartition(".")
        if not module:
            raise JobError(f"component path {self.path!r}; it must be 'module.Class'")
        try:
            return getattr(importlib.import_module(module), name)
        except AttributeError:
            raise JobError(f"component {self.path!r}: module {module!r} has no {name!r}") from None
        except ImportError as error:
            raise JobError(f"component {self.path!r} cannot be imported: {error}") from error

    def build(self, **extra: Any) -> Any:
        """Import and call it with its arguments and ``extra``, which wins.

        Raises:
            JobError: it cannot be imported, or takes other arguments.
        """
        target = self.load()
        kwargs = {key: _build_nested(value, f"{self.path}.{key}") for key, value in self.args.items()} | extra
        try:
            signature = inspect.signature(target)
        except (TypeError, ValueError):  # some builtins have none: the call itself will tell
            signature = None
        if signature is not None:
            try:
                signature.bind(**kwargs)
            except TypeError as error:
                allowed = ", ".join(signature.parameters) or "none"
                raise JobError(f"component {self.path!r}: {error}; its arguments are: {allowed}") from None
        return target(**kwargs)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a config file."""
        return ({"id": self.id} if self.id else {}) | {"path": self.path, "args": self.args}

    @staticmethod
    def parse(data: object, where: str) -> Component:
        """Out of a config file's map.

        Raises:
            JobError: no map, a key unknown or missing, or a value of the wrong type.
        """
        entry = _map(data, where)
        if unknown := sorted(entry.keys() - _COMPONENT_KEYS):
            raise JobError(f"{where}: unknown key {unknown[0]!r}; allowed are {', '.join(sorted(_COMPONENT_KEYS))}")
        path = _text(entry.get("path"), f"{where}: path")
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", path):
            raise JobError(f"{where}: path {path!r}; it must be 'module.Class'")
        return Component(
            path, _map(entry.get("args", {}), f"{where}: args"), _text(entry.get("id", ""), f"{where}: id")
        )


def _build_nested(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_build_nested(item, where) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    entry = cast("dict[str, Any]", value)
    if entry.get("config_type") == "dict":
        return {key: item for key, item in entry.items() if key != "config_type"}
    if isinstance(entry.get("path"), str) and "." in entry["path"] and entry.keys() <= _COMPONENT_KEYS:
        return Component.parse(entry, where).build()
    return {key: _build_nested(item, where) for key, item in entry.items()}


@dataclass(frozen=True, slots=True)
class ExecutorSpec:
    """Which task names (exact, or patterns such as ``*``) a component works on."""

    tasks: tuple[str, ...]
    component: Component


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A job, typed and checked. ``sites`` is None where every connected site takes part."""

    name: str
    workflows: tuple[Component, ...]
    executors: tuple[ExecutorSpec, ...]
    min_clients: int = 1
    num_rounds: int = 1
    seed: int = 0
    sites: tuple[str, ...] | None = None
    threads_per_task: int = 1
    components: tuple[Component, ...] = ()
    client_components: tuple[Component, ...] = ()
    app: str = DEFAULT_APP
    extra: dict[str, Any] = field(default_factory=dict[str, Any])
    #: What else the config files hold, such as filters: kept for those who know it.
    server_extra: dict[str, Any] = field(default_factory=dict[str, Any])
    client_extra: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        check_job_name(self.name)
        _whole(self.min_clients, "min_clients", 1, MAX_SITES)
        _whole(self.num_rounds, "num_rounds", 1, 10**9)
        _whole(self.seed, "seed", 0, 2**53)
        _whole(self.threads_per_task, "threads_per_task", 1, 1024)
        if not self.workflows:
            raise JobError(f"job {self.name!r} has no workflow: nothing would run")
        if not self.executors:
            raise JobError(f"job {self.name!r} has no executor: no site could work on its tasks")
        if self.sites is not None:
            for site in self.sites:
                check_site_name(site)
            if len(set(self.sites)) != len(self.sites):
                raise JobError(f"job {self.name!r} names a site twice in {list(self.sites)}")
            if self.min_clients > len(self.sites):
                raise JobError(
                    f"min_clients={self.min_clients} but the job names only {len(self.sites)} sites:"
                    " lower min_clients, or name more sites"
                )

    # ------------------------------------------------------------ where things lie

    def app_dir(self, folder: Path) -> Path:
        """The app's folder in a job folder."""
        return Path(folder) / self.app

    def custom_dir(self, folder: Path) -> Path:
        """The folder of the job's own code, whether it exists or not."""
        return Path(folder) / self.app / CUSTOM_DIR

    # ------------------------------------------------------------ questions

    def executor_for(self, task: str) -> Component:
        """The component that works on tasks of this name: an exact name first, then the first pattern that fits.

        Raises:
            JobError: none does.
        """
        for spec in self.executors:
            if task in spec.tasks:
                return spec.component
        for spec in self.executors:
            if any(fnmatchcase(task, pattern) for pattern in spec.tasks):
                return spec.component
        known = ", ".join(sorted({name for spec in self.executors for name in spec.tasks}))
        raise JobError(f"job {self.name!r} has no executor for task {task!r}; it has some for: {known}")

    def component(self, id: str) -> Component | None:
        """The server component with this id, or None."""
        return next((item for item in self.components if item.id == id), None)

    # ------------------------------------------------------------ to and from a folder

    def write(self, folder: Path) -> None:
        """Write meta.json and the two config files; the code and the model are the caller's to add."""
        folder = Path(folder)
        config_dir = self.app_dir(folder) / "config"
        config_dir.mkdir(parents=True, exist_ok=True)
        self.custom_dir(folder).mkdir(exist_ok=True)
        targets = [ALL_SITES] if self.sites is None else ["server", *self.sites]
        meta: dict[str, Any] = {
            "format": FORMAT,
            "name": self.name,
            "min_clients": self.min_clients,
            "deploy_map": {self.app: targets},
            "seed": self.seed,
            "num_rounds": self.num_rounds,
            "threads_per_task": self.threads_per_task,
        }
        if self.sites is not None:
            meta["sites"] = list(self.sites)
        _write_json(folder / META_FILE, meta | self.extra)
        filters: dict[str, Any] = {key: [] for key in _FILTERS}
        server: dict[str, Any] = {
            "format_version": 2,
            "workflows": [item.to_json() for item in self.workflows],
            "components": [item.to_json() for item in self.components],
        }
        client: dict[str, Any] = {
            "format_version": 2,
            "executors": [{"tasks": list(e.tasks), "executor": e.component.to_json()} for e in self.executors],
            "components": [item.to_json() for item in self.client_components],
        }
        _write_json(self.app_dir(folder) / SERVER_CONFIG, server | filters | self.server_extra)
        _write_json(self.app_dir(folder) / CLIENT_CONFIG, client | filters | self.client_extra)

    @staticmethod
    def load(folder: Path) -> JobSpec:
        """A job out of its folder, with the files it names looked for.

        Raises:
            JobError: a file is missing or malformed, or a value is not allowed; names the file, what was seen and what
                is allowed.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise JobError(f"job folder {folder} does not exist (a job is a folder with a {META_FILE})")
        meta_file = folder / META_FILE
        meta = _read_json(meta_file)
        if meta.get("format") != FORMAT:
            raise JobError(
                f"{meta_file}: format {meta.get('format')!r}; this version of fedloom reads {FORMAT!r},"
                " which `recipe.export(job_dir)` writes"
            )
        app, sites = _deployment(meta, meta_file)
        server_file, client_file = folder / app / SERVER_CONFIG, folder / app / CLIENT_CONFIG
        server, client = _read_json(server_file), _read_json(client_file)
        try:
            spec = JobSpec(
                name=_text(meta.get("name"), "name"),
                min_clients=cast("int", meta.get("min_clients", 1)),
                num_rounds=cast("int", meta.get("num_rounds", 1)),
                seed=cast("int", meta.get("seed", 0)),
                sites=sites,
                threads_per_task=cast("int", meta.get("threads_per_task", 1)),
                workflows=_components(server, "workflows", server_file),
                components=_components(server, "components", server_file),
                executors=_executors(client, client_file),
                client_components=_components(client, "components", client_file),
                app=app,
                extra={key: value for key, value in meta.items() if key not in _META_KEYS},
                server_extra=_rest(server, {"format_version", "workflows", "components"}),
                client_extra=_rest(client, {"format_version", "executors", "components"}),
            )
        except JobError as error:
            text = str(error)
            raise (error if str(folder) in text else JobError(f"{meta_file}: {text}")) from None
        spec.check_files(folder)
        return spec

    def check_files(self, folder: Path) -> None:
        """Look for the files that the config names by a relative path.

        Raises:
            JobError: a training script, or a workflow's initial model, is not in the folder.
        """
        wanted = [
            (f"executor {e.component.path}", "task_script_path", e.component.args, self.custom_dir(folder))
            for e in self.executors
        ]
        wanted += [(f"workflow {w.path}", "initial_model", w.args, self.app_dir(folder)) for w in self.workflows]
        for who, key, args, base in wanted:
            name = args.get(key)
            if not isinstance(name, str) or not name or PurePosixPath(name).is_absolute():
                continue  # absolute: a file that the sites have already
            if ".." in PurePosixPath(name).parts or not _is_file(base / name):
                raise JobError(f"{who}: {key} {name!r} is not in {base}; add the file, or name one that is there")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have: too long, or no text
        return False


def _deployment(meta: Mapping[str, Any], where: Path) -> tuple[str, tuple[str, ...] | None]:
    """The app's folder name and the sites, out of deploy_map and sites."""
    deploy = _map(meta.get("deploy_map", {DEFAULT_APP: [ALL_SITES]}), f"{where}: deploy_map")
    if len(deploy) != 1:
        raise JobError(f"{where}: deploy_map has {len(deploy)} apps; exactly one is supported in this version")
    app, targets = next(iter(deploy.items()))
    if app in ("", ".", "..") or "/" in app or "\\" in app or not app.isprintable():
        raise JobError(f"{where}: app name {app!r} in deploy_map; it must be the name of a folder beside meta.json")
    names = _texts(targets, f"{where}: deploy_map[{app!r}]")
    sites = None if ALL_SITES in names else tuple(name for name in names if name != "server")
    if meta.get("sites") is not None:
        sites = tuple(_texts(meta["sites"], f"{where}: sites"))
    return app, sites or None


def _components(config: Mapping[str, Any], key: str, where: Path) -> tuple[Component, ...]:
    return tuple(
        Component.parse(item, f"{where}: {key}[{number}]")
        for number, item in enumerate(_list(config.get(key, []), f"{where}: {key}"))
    )


def _executors(config: Mapping[str, Any], where: Path) -> tuple[ExecutorSpec, ...]:
    out: list[ExecutorSpec] = []
    for number, item in enumerate(_list(config.get("executors", []), f"{where}: executors")):
        at = f"{where}: executors[{number}]"
        entry = _map(item, at)
        tasks = _texts(entry.get("tasks", ["*"]), f"{at}: tasks")
        out.append(ExecutorSpec(tuple(tasks), Component.parse(entry.get("executor"), f"{at}: executor")))
    return tuple(out)


def _rest(config: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in known and not (key in _FILTERS and value == [])}


# ---------------------------------------------------------------- JSON, strictly


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise JobError(f"{path}: {path.stat().st_size} bytes; at most {MAX_CONFIG_BYTES}")
        text = path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise JobError(f"{path} is missing: is this a job folder, as `recipe.export(job_dir)` writes it?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path} cannot be read: {error}") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_float=_float, parse_constant=_no_constant)
        return _map(value, str(path))
    except (ValueError, RecursionError) as error:
        raise JobError(f"{path} is not valid JSON: {error}") from None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise JobError(f"{path.name} cannot hold these settings: {error}; allowed are JSON's types") from None
    path.write_text(text + "\n", "utf-8")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        raise ValueError(f"key {next(key for key, _ in pairs if key in seen or seen.add(key))!r} twice")
    return out


def _float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_constant(text[:40])  # JSON has no largest number


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name}; numbers must be finite")


def _map(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise JobError(f"{where}: {type(value).__name__} where a map belongs")
    return cast("dict[str, Any]", value)


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise JobError(f"{where}: {type(value).__name__} where a list belongs")
    return cast("list[Any]", value)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise JobError(f"{where}: {type(value).__name__} where text belongs")
    return value


def _texts(value: object, where: str) -> list[str]:
    return [_text(item, where) for item in _list(value, where)]


def _whole(value: object, what: str, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise JobError(f"{what}={value!r}; a whole number from {low} to {high} belongs here")
