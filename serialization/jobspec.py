"""A job, typed and checked: what runs where, with which arguments. `jobfolder` reads and writes it as a folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from .component import Component
from .errors import JobError
from .jobjson import map_of, whole

__all__ = [
    "ALL_SITES",
    "CLIENT_CONFIG",
    "CUSTOM_DIR",
    "DEFAULT_APP",
    "FORMAT",
    "META_FILE",
    "SERVER_CONFIG",
    "SITE_CONFIG",
    "ClientApp",
    "Component",
    "ExecutorSpec",
    "FilterSpec",
    "JobSpec",
    "check_job_name",
    "check_site_name",
]

FORMAT = "fedloom/1"
ALL_SITES = "@ALL"
META_FILE = "meta.json"
SERVER_CONFIG = "config/config_fed_server.json"
CLIENT_CONFIG = "config/config_fed_client.json"
CUSTOM_DIR = "custom"
DEFAULT_APP = "app"
#: In a client's config: more keys for a site of this name, ``{"site-1": {...}}``.
SITE_CONFIG = "site_config"
MAX_SITES = 1_000_000

_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

#: Where a filter works: on what the server sends, on what comes in at a site, on what a site sends, and on that at the
#: server.
Point = Literal["server_output", "client_input", "client_output", "server_input"]


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


def check_app_name(name: str) -> str:
    """The name, if an app's folder beside meta.json may be called so.

    Raises:
        JobError: it is no plain folder name.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise JobError(f"app name {name!r} in deploy_map; it must be the name of a folder beside {META_FILE}")
    return name


def _check_sites(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if check_site_name(name) in seen:
            raise JobError(f"{what} names site {name!r} twice")
        seen.add(name)


@dataclass(frozen=True, slots=True)
class ExecutorSpec:
    """Which task names (exact, or patterns such as ``*``) a component works on, and at which sites (none: at all)."""

    tasks: tuple[str, ...]
    component: Component
    sites: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_sites(self.sites, f"executor {self.component.path}")


@dataclass(frozen=True, slots=True)
class FilterSpec:
    """Filters, in their order, for tasks of these names (exact, or patterns), at these sites (none: at all)."""

    filters: tuple[Component, ...]
    tasks: tuple[str, ...] = ("*",)
    sites: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_sites(self.sites, "a filter")

    def applies(self, task: str, site: str) -> bool:
        """Whether these work on this task at this site (``""``: the server)."""
        return (not self.sites or site in self.sites) and any(fnmatchcase(task, pattern) for pattern in self.tasks)


@dataclass(frozen=True, slots=True)
class ClientApp:
    """What runs at sites: at those named, or (none) at all for which there is no other."""

    name: str
    sites: tuple[str, ...] = ()
    executors: tuple[ExecutorSpec, ...] = ()
    components: tuple[Component, ...] = ()
    input_filters: tuple[FilterSpec, ...] = ()
    output_filters: tuple[FilterSpec, ...] = ()
    #: What else the config file holds: settings for the job's own code.
    extra: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        check_app_name(self.name)
        if not self.executors:
            raise JobError(f"app {self.name!r} has no executor: no site could work on its tasks")

    def executor_for(self, task: str, site: str) -> Component | None:
        """An entry that names the site goes before one for all; within each, an exact name before the first pattern."""
        own = [spec for spec in self.executors if site and site in spec.sites]
        common = [spec for spec in self.executors if not spec.sites]
        for specs in (own, common):
            for spec in specs:
                if task in spec.tasks:
                    return spec.component
            for spec in specs:
                if any(fnmatchcase(task, pattern) for pattern in spec.tasks):
                    return spec.component
        return None

    def config_of(self, site: str) -> dict[str, Any]:
        """The settings of the job's own code at this site."""
        shared = {key: value for key, value in self.extra.items() if key != SITE_CONFIG}
        own: dict[str, Any] = self.extra.get(SITE_CONFIG, {}).get(site, {})
        return shared | own


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A job, typed and checked.

    Attributes:
        sites: None where every connected site takes part.
        mandatory_clients: sites without whose results no round is good.
        resource_spec: what a site's tasks need, by site: ``{"site-1": {"num_of_gpus": 1}}``. Kept and checked.
        executors, client_components, client_input, client_output, client_extra: the app of all sites that
            ``site_apps`` does not name.
        client_app: its folder's name, where it is not the server's app as well.
        server_output, client_input, client_output, server_input: filters on the four points.
        extra, server_extra, client_extra: what else the files hold, for those who know it.
    """

    name: str
    workflows: tuple[Component, ...]
    executors: tuple[ExecutorSpec, ...] = ()
    min_clients: int = 1
    num_rounds: int = 1
    seed: int = 0
    sites: tuple[str, ...] | None = None
    threads_per_task: int = 1
    components: tuple[Component, ...] = ()
    client_components: tuple[Component, ...] = ()
    app: str = DEFAULT_APP
    extra: dict[str, Any] = field(default_factory=dict[str, Any])
    server_extra: dict[str, Any] = field(default_factory=dict[str, Any])
    client_extra: dict[str, Any] = field(default_factory=dict[str, Any])
    mandatory_clients: tuple[str, ...] = ()
    resource_spec: dict[str, Any] = field(default_factory=dict[str, Any])
    server_output: tuple[FilterSpec, ...] = ()
    server_input: tuple[FilterSpec, ...] = ()
    client_input: tuple[FilterSpec, ...] = ()
    client_output: tuple[FilterSpec, ...] = ()
    client_app: str = ""
    site_apps: tuple[ClientApp, ...] = ()
    _apps: tuple[ClientApp, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "_apps", self._all_apps())  # asked for several times for each task
        check_job_name(self.name)
        check_app_name(self.app)
        whole(self.min_clients, "min_clients", 1, MAX_SITES)
        whole(self.num_rounds, "num_rounds", 1, 10**9)
        whole(self.seed, "seed", 0, 2**53)
        whole(self.threads_per_task, "threads_per_task", 1, 1024)
        if not self.workflows:
            raise JobError(f"job {self.name!r} has no workflow: nothing would run")
        if not self.executors and not self.site_apps:
            raise JobError(f"job {self.name!r} has no executor: no site could work on its tasks")
        self._check_sites()
        _check_resources(self.resource_spec)

    def _check_sites(self) -> None:
        _check_sites(self.mandatory_clients, "mandatory_clients")
        named = [site for app in self.site_apps for site in app.sites]
        _check_sites(named, "deploy_map")
        if self.site_apps and not all(app.sites for app in self.site_apps):
            raise JobError(f"job {self.name!r} has a site's app without a site")
        if self.sites is None:
            if not self.executors:
                raise JobError(f"job {self.name!r} has apps for some sites only: name the sites that take part")
            return
        _check_sites(self.sites, f"job {self.name!r}")
        if self.min_clients > len(self.sites):
            raise JobError(
                f"min_clients={self.min_clients} but the job names only {len(self.sites)} sites:"
                " lower min_clients, or name more sites"
            )
        if missing := [name for name in self.mandatory_clients if name not in set(self.sites)]:
            raise JobError(f"mandatory_clients: {missing[0]!r} is not one of the job's sites {list(self.sites)}")
        if not self.executors and (left := [site for site in self.sites if site not in set(named)]):
            raise JobError(f"site {left[0]!r} has no app: name it in deploy_map, or give one to {ALL_SITES}")

    # ------------------------------------------------------------ where things lie

    def app_dir(self, folder: Path) -> Path:
        """The server's app in a job folder."""
        return Path(folder) / self.app

    def custom_dir(self, folder: Path, site: str = "") -> Path:
        """The folder of the job's own code for this site (``""``: the server), whether it exists or not."""
        return Path(folder) / (self.client_app_of(site).name if site else self.app) / CUSTOM_DIR

    def custom_dirs(self, folder: Path) -> list[Path]:
        """All of those folders, the server's first."""
        return [Path(folder) / name / CUSTOM_DIR for name in dict.fromkeys([self.app, *(a.name for a in self.apps)])]

    # ------------------------------------------------------------ questions

    @property
    def apps(self) -> tuple[ClientApp, ...]:
        """What runs at the sites: the app for all, if there is one, and those for some."""
        return self._apps

    def _all_apps(self) -> tuple[ClientApp, ...]:
        if not self.executors:
            return self.site_apps
        common = ClientApp(
            self.client_app or self.app,
            (),
            self.executors,
            self.client_components,
            self.client_input,
            self.client_output,
            self.client_extra,
        )
        return (common, *self.site_apps)

    @property
    def all_executors(self) -> tuple[ExecutorSpec, ...]:
        """The executors of all apps."""
        return tuple(item for app in self.apps for item in app.executors)

    def client_app_of(self, site: str) -> ClientApp:
        """What runs at this site.

        Raises:
            JobError: the job has an app for other sites only.
        """
        common: ClientApp | None = None
        for app in self.apps:
            if site in app.sites:
                return app
            if common is None and not app.sites:
                common = app
        if common is None:
            raise JobError(f"job {self.name!r} has no app for site {site!r}: name it in deploy_map")
        return common

    def executor_for(self, task: str, site: str = "") -> Component:
        """The component that works on tasks of this name at this site (without one: at those not named anywhere).

        Entries that name the site go before those for all sites; within each, an exact task name goes before the first
        pattern that fits.

        Raises:
            JobError: none does.
        """
        app = self.client_app_of(site)
        if (found := app.executor_for(task, site)) is not None:
            return found
        for_it = [spec for spec in app.executors if not spec.sites or site in spec.sites]
        known = ", ".join(sorted({name for spec in for_it for name in spec.tasks})) or "none"
        at = f" at {site}" if site else ""
        raise JobError(f"job {self.name!r} has no executor for task {task!r}{at}; it has some for: {known}")

    def filters_for(self, point: Point, task: str, site: str = "") -> tuple[Component, ...]:
        """The filters of one of the four points for this task, in their order; sites' points need the site."""
        match point:
            case "server_output":
                specs = self.server_output
            case "server_input":
                specs = self.server_input
            case "client_input":
                specs = self.client_app_of(site).input_filters
            case "client_output":
                specs = self.client_app_of(site).output_filters
        return tuple(item for spec in specs if spec.applies(task, site) for item in spec.filters)

    def component(self, id: str) -> Component | None:
        """The server component with this id, or None."""
        return next((item for item in self.components if item.id == id), None)

    # ------------------------------------------------------------ to and from a folder

    def write(self, folder: Path) -> None:
        """Write meta.json and the config files; the code and the model are the caller's to add."""
        from .jobfolder import write_job

        write_job(self, folder)

    @staticmethod
    def load(folder: Path, environ: Mapping[str, str] | None = None) -> JobSpec:
        """A job out of its folder, with its variables in place and the files it names looked for.

        Args:
            environ: where ``FEDLOOM_<NAME>`` variables are looked for; None: this process's.

        Raises:
            JobError: a file is missing or malformed, or a value is not allowed; names the file, what was seen and what
                is allowed.
        """
        from .jobfolder import load_job

        return load_job(folder, environ)

    def check_files(self, folder: Path) -> None:
        """Look for the files that the config names by a relative path.

        Raises:
            JobError: a training script, or a workflow's initial model, is not in the folder.
        """
        from .jobfolder import check_files

        check_files(self, folder)


def _check_resources(spec: Mapping[str, Any]) -> None:
    for site, wanted in spec.items():
        check_site_name(site.removeprefix("@"))
        resources = map_of(wanted, f"resource_spec[{site!r}]")
        whole(resources.get("num_of_gpus", 0), f"resource_spec[{site!r}]: num_of_gpus", 0, 1024)
        memory: Any = resources.get("mem_per_gpu_in_GiB", 0)
        if isinstance(memory, bool) or not isinstance(memory, int | float) or memory < 0:
            raise JobError(f"resource_spec[{site!r}]: mem_per_gpu_in_GiB={memory!r}; a number, 0 or more, belongs here")
