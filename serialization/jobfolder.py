"""A job as a folder.

::

    meta.json                           name, min_clients, seed, num_rounds, sites, deploy_map
    app/config/config_fed_server.json   workflows (run one after another), components, filters
    app/config/config_fed_client.json   executors by task name, components, filters
    app/custom/                         the job's own code, first on sys.path
    app/initial_model.safetensors       where a workflow names it

``deploy_map`` says which app runs where: ``{"app": ["@ALL"]}``, or server and sites each with an app of their own. A
component is ``{"id", "path": "package.module.Class", "args": {...}}``; one nested in ``args`` is built first, unless it
has ``"config_type": "dict"``.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from .component import Component
from .errors import JobError
from .jobjson import list_of, map_of, read_json, text_of, texts_of, write_json
from .jobspec import (
    ALL_SITES,
    CLIENT_CONFIG,
    CUSTOM_DIR,
    DEFAULT_APP,
    FORMAT,
    META_FILE,
    SERVER_CONFIG,
    SITE_CONFIG,
    ClientApp,
    ExecutorSpec,
    FilterSpec,
    JobSpec,
    check_app_name,
)
from .jobvars import resolve_config

#: The config files' names: fedloom's, and those of older folders.
SERVER_CONFIGS = (SERVER_CONFIG, "config/config_server.json")
CLIENT_CONFIGS = (CLIENT_CONFIG, "config/config_client.json")
_OTHER_FORMATS = (".yml", ".yaml", ".conf")
_FILTERS = ("task_data_filters", "task_result_filters")
_SERVER = "server"
_SERVER_KEYS = frozenset({"format_version", "workflows", "components", *_FILTERS})
_CLIENT_KEYS = frozenset({"format_version", "executors", "components", *_FILTERS})
#: meta.json keys with a field of their own; all others are kept in `JobSpec.extra`.
_META_KEYS = frozenset(
    {
        "format",
        "name",
        "min_clients",
        "deploy_map",
        "seed",
        "num_rounds",
        "sites",
        "threads_per_task",
        "mandatory_clients",
        "resource_spec",
    }
)


# ---------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class Deployment:
    """Which app runs where: the server's, the one for all sites (None: none is), and those for some."""

    server: str
    common: str | None
    site_apps: dict[str, tuple[str, ...]]
    sites: tuple[str, ...] | None


def load_job(folder: Path, environ: Mapping[str, str] | None = None) -> JobSpec:
    """A job out of its folder, see `JobSpec.load`.

    Raises:
        JobError: what is wrong with it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise JobError(f"job folder {folder} does not exist (a job is a folder with a {META_FILE})")
    environ = os.environ if environ is None else environ
    meta_file = folder / META_FILE
    meta = read_json(meta_file)
    if meta.get("format") != FORMAT:
        raise JobError(
            f"{meta_file}: format {meta.get('format')!r}; this version of fedloom reads {FORMAT!r},"
            " which `recipe.export(job_dir)` writes"
        )
    deployment = deployment_of(meta, meta_file)
    server_file = config_file(folder / deployment.server, SERVER_CONFIGS)
    server = resolve_config(read_json(server_file), environ, str(server_file))
    with _named(meta_file):
        common = None if deployment.common is None else _client_app(folder, deployment.common, (), environ)
        spec = JobSpec(
            name=text_of(meta.get("name"), "name"),
            min_clients=cast("int", meta.get("min_clients", 1)),
            num_rounds=cast("int", meta.get("num_rounds", 1)),
            seed=cast("int", meta.get("seed", 0)),
            sites=deployment.sites,
            mandatory_clients=tuple(texts_of(meta.get("mandatory_clients") or [], "mandatory_clients")),
            resource_spec=map_of(meta.get("resource_spec") or {}, "resource_spec"),
            threads_per_task=cast("int", meta.get("threads_per_task", 1)),
            workflows=_components(server, "workflows", server_file),
            components=_components(server, "components", server_file),
            server_output=_filters(server, _FILTERS[0], server_file),
            server_input=_filters(server, _FILTERS[1], server_file),
            executors=common.executors if common else (),
            client_components=common.components if common else (),
            client_input=common.input_filters if common else (),
            client_output=common.output_filters if common else (),
            client_extra=common.extra if common else {},
            app=deployment.server,
            client_app="" if deployment.common in (None, deployment.server) else str(deployment.common),
            site_apps=tuple(_client_app(folder, name, sites, environ) for name, sites in deployment.site_apps.items()),
            extra={key: value for key, value in meta.items() if key not in _META_KEYS},
            server_extra={key: value for key, value in server.items() if key not in _SERVER_KEYS},
        )
    check_files(spec, folder)
    return spec


def config_file(app: Path, names: tuple[str, ...]) -> Path:
    """The first of these config files that the app has; where it has none, the first is what should be there.

    Raises:
        JobError: it is there in another format than JSON.
    """
    for name in names:
        if _is_file(app / name):
            return app / name
        for ending in _OTHER_FORMATS:
            if _is_file(other := (app / name).with_suffix(ending)):
                raise JobError(f"{other}: configs are read as JSON; write the same maps into {Path(name).name}")
    return app / names[0]


def deployment_of(meta: Mapping[str, Any], where: Path) -> Deployment:
    """Which app runs where, out of deploy_map and sites.

    Raises:
        JobError: two apps for the server, or for a site; an app for nobody; a name that is not allowed.
    """
    deploy = map_of(meta.get("deploy_map") or {DEFAULT_APP: [ALL_SITES]}, f"{where}: deploy_map")
    server: str | None = None
    common: str | None = None
    named: dict[str, tuple[str, ...]] = {}
    for app, targets in deploy.items():
        try:
            check_app_name(app)
        except JobError as error:
            raise JobError(f"{where}: {error}") from None
        names = _targets(targets, f"{where}: deploy_map[{app!r}]")
        if not names:
            raise JobError(
                f"{where}: deploy_map[{app!r}] names nobody; {_SERVER!r}, sites or {ALL_SITES!r} belong there"
            )
        sites = tuple(name for name in names if name not in (_SERVER, ALL_SITES))
        if ALL_SITES in names:
            if common is not None:
                raise JobError(f"{where}: deploy_map gives two apps to {ALL_SITES}: {common!r} and {app!r}")
            common = app
        elif sites:
            named[app] = sites
        if _SERVER in names:
            if server is not None:
                raise JobError(f"{where}: deploy_map gives two apps to the server: {server!r} and {app!r}")
            server = app
    if server is None:
        server = common or next(iter(deploy))
    sites = None if common is not None else tuple(site for names in named.values() for site in names)
    if len(named) == 1 and common is None:  # one app for all of the sites: no need to tell them apart
        common, named = next(iter(named)), {}
    if meta.get("sites") is not None:
        sites = tuple(texts_of(meta["sites"], f"{where}: sites"))
    return Deployment(server, common, named, sites or None)


def _targets(value: object, where: str) -> list[str]:
    """Names, or as older folders have it ``{"sites": [...]}``; repeated ones once."""
    if isinstance(value, dict):
        value = cast("dict[str, Any]", value).get("sites")
    return list(dict.fromkeys(texts_of(value, where)))


def _client_app(folder: Path, name: str, sites: tuple[str, ...], environ: Mapping[str, str]) -> ClientApp:
    file = config_file(folder / name, CLIENT_CONFIGS)
    config = resolve_config(read_json(file), environ, str(file))
    extra = {key: value for key, value in config.items() if key not in _CLIENT_KEYS}
    for site, own in map_of(extra.get(SITE_CONFIG, {}), f"{file}: {SITE_CONFIG}").items():
        map_of(own, f"{file}: {SITE_CONFIG}[{site!r}]")
    with _named(file):
        return ClientApp(
            name,
            sites,
            tuple(_executors(config, file)),
            _components(config, "components", file),
            _filters(config, _FILTERS[0], file),
            _filters(config, _FILTERS[1], file),
            extra,
        )


def _executors(config: Mapping[str, Any], where: Path) -> Iterator[ExecutorSpec]:
    for number, item in enumerate(list_of(config.get("executors", []), f"{where}: executors")):
        at = f"{where}: executors[{number}]"
        entry = map_of(item, at)
        tasks, sites = _tasks(entry, at), _sites(entry, at)
        yield ExecutorSpec(tasks, Component.parse(entry.get("executor"), f"{at}: executor"), sites)


@contextmanager
def _named(file: Path) -> Generator[None]:
    """What is wrong with a value says in which file it stands."""
    try:
        yield
    except JobError as error:
        raise (error if str(file.parent) in str(error) else JobError(f"{file}: {error}")) from None


def _components(config: Mapping[str, Any], key: str, where: Path) -> tuple[Component, ...]:
    return tuple(
        Component.parse(item, f"{where}: {key}[{number}]")
        for number, item in enumerate(list_of(config.get(key, []), f"{where}: {key}"))
    )


def _filters(config: Mapping[str, Any], key: str, where: Path) -> tuple[FilterSpec, ...]:
    out: list[FilterSpec] = []
    for number, item in enumerate(list_of(config.get(key, []), f"{where}: {key}")):
        at = f"{where}: {key}[{number}]"
        entry = map_of(item, at)
        out.append(FilterSpec(_components(entry, "filters", Path(at)), _tasks(entry, at), _sites(entry, at)))
    return tuple(out)


def _tasks(entry: Mapping[str, Any], at: str) -> tuple[str, ...]:
    return tuple(texts_of(entry.get("tasks", ["*"]), f"{at}: tasks"))


def _sites(entry: Mapping[str, Any], at: str) -> tuple[str, ...]:
    return tuple(texts_of(entry.get("sites", []), f"{at}: sites"))


def check_files(spec: JobSpec, folder: Path) -> None:
    """Look for the files that the configs name by a relative path, see `JobSpec.check_files`.

    Raises:
        JobError: one is not there.
    """
    wanted = [
        (f"executor {e.component.path}", "task_script_path", e.component.args, folder / app.name / CUSTOM_DIR)
        for app in spec.apps
        for e in app.executors
    ]
    wanted += [(f"workflow {w.path}", "initial_model", w.args, spec.app_dir(folder)) for w in spec.workflows]
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


# ---------------------------------------------------------------- writing


def write_job(spec: JobSpec, folder: Path) -> None:
    """Write meta.json, and each app's config files and custom folder."""
    folder = Path(folder)
    meta: dict[str, Any] = {
        "format": FORMAT,
        "name": spec.name,
        "min_clients": spec.min_clients,
        "deploy_map": _deploy_map(spec),
        "seed": spec.seed,
        "num_rounds": spec.num_rounds,
        "threads_per_task": spec.threads_per_task,
    }
    if spec.sites is not None:
        meta["sites"] = list(spec.sites)
    if spec.mandatory_clients:
        meta["mandatory_clients"] = list(spec.mandatory_clients)
    if spec.resource_spec:
        meta["resource_spec"] = spec.resource_spec
    for custom in spec.custom_dirs(folder):
        (custom.parent / "config").mkdir(parents=True, exist_ok=True)
        custom.mkdir(exist_ok=True)
    write_json(folder / META_FILE, meta | spec.extra)
    server: dict[str, Any] = {
        "format_version": 2,
        "workflows": [item.to_json() for item in spec.workflows],
        "components": [item.to_json() for item in spec.components],
        _FILTERS[0]: _filters_json(spec.server_output),
        _FILTERS[1]: _filters_json(spec.server_input),
    }
    write_json(spec.app_dir(folder) / SERVER_CONFIG, server | spec.server_extra)
    for app in spec.apps:
        client: dict[str, Any] = {
            "format_version": 2,
            "executors": [
                {"tasks": list(e.tasks), **_sites_json(e.sites), "executor": e.component.to_json()}
                for e in app.executors
            ],
            "components": [item.to_json() for item in app.components],
            _FILTERS[0]: _filters_json(app.input_filters),
            _FILTERS[1]: _filters_json(app.output_filters),
        }
        write_json(folder / app.name / CLIENT_CONFIG, client | app.extra)


def _deploy_map(spec: JobSpec) -> dict[str, list[str]]:
    named = {app.name: list(app.sites) for app in spec.site_apps}
    deploy: dict[str, list[str]] = {}
    if spec.executors:
        taken = {site for sites in named.values() for site in sites}
        everyone = spec.sites is None or bool(named)
        left = [ALL_SITES] if everyone else [site for site in spec.sites or () if site not in taken]
        common = spec.client_app or spec.app
        if common == spec.app:
            deploy[common] = left if left == [ALL_SITES] and not named else [_SERVER, *left]
        else:
            deploy |= {spec.app: [_SERVER], common: left}
    else:
        deploy[spec.app] = [_SERVER]
    for name, sites in named.items():
        deploy[name] = [*deploy.get(name, []), *sites]
    return deploy


def _filters_json(specs: tuple[FilterSpec, ...]) -> list[dict[str, Any]]:
    return [
        {"tasks": list(item.tasks), **_sites_json(item.sites), "filters": [one.to_json() for one in item.filters]}
        for item in specs
    ]


def _sites_json(sites: tuple[str, ...]) -> dict[str, Any]:
    return {"sites": list(sites)} if sites else {}
