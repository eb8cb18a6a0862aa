"""What a job's server and its sites do not share: files, settings, and the filters between them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..serialization.component import Component
from ..serialization.errors import JobError
from ..serialization.jobspec import (
    DEFAULT_APP,
    SITE_CONFIG,
    ClientApp,
    ExecutorSpec,
    FilterSpec,
    JobSpec,
    Point,
    check_site_name,
)
from . import code

SERVER_APP = "app_server"
#: Keys of the config files that a job fills in by itself.
_TAKEN = frozenset(
    {
        "format_version",
        "workflows",
        "executors",
        "components",
        "task_data_filters",
        "task_result_filters",
        SITE_CONFIG,
    }
)


class JobSides:
    """Kept by a `Job`. As long as only shared files are added, server and sites have one app folder.

    Files for one side give the server an app folder of its own, and files for some sites each of them.
    """

    def __init__(self) -> None:
        self.server_files: dict[str, Path] = {}
        self.client_files: dict[str, Path] = {}
        self.site_files: dict[str, dict[str, Path]] = {}
        self.server_config: dict[str, Any] = {}
        self.client_config: dict[str, Any] = {}
        self.site_config: dict[str, dict[str, Any]] = {}
        self.filters: dict[Point, list[FilterSpec]] = {}

    @property
    def app(self) -> str:
        """The name of the server's app folder."""
        return SERVER_APP if self.server_files or self.client_files or self.site_files else DEFAULT_APP

    @property
    def client_app(self) -> str:
        """The name of the sites' app folder, "" where it is the server's too."""
        return "" if self.app == DEFAULT_APP else DEFAULT_APP

    def add_files(self, found: Mapping[str, Path], side: str, sites: Sequence[str] | None) -> None:
        """Take files along for the server (``side="server"``), for all sites, or for these.

        Raises:
            JobError: another file has the place of one, or a site's name is not allowed.
        """
        if side == "server":
            places = [self.server_files]
        else:
            places = (
                [self.client_files] if sites is None else [self.site_files.setdefault(s, {}) for s in _names(sites)]
            )
        for place in places:
            for name, file in found.items():
                code.add_file(place, name, file)

    def add_config(self, config: Mapping[str, Any], side: str, sites: Sequence[str] | None) -> None:
        """Add top-level keys to a config file.

        Raises:
            JobError: a key that the job fills in by itself, or a value that JSON cannot hold.
        """
        for key, value in config.items():
            if key in _TAKEN:
                raise JobError(f"{side} config: key {key!r} is the job's own; add components, executors and filters so")
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise JobError(f"{side} config: {key!r} cannot be written: {error}; allowed are JSON's types") from None
        if side == "server":
            self.server_config |= config
        elif sites is None:
            self.client_config |= config
        else:
            for site in _names(sites):
                self.site_config[site] = self.site_config.get(site, {}) | dict(config)

    def add_filter(
        self, point: Point, component: Component, tasks: Sequence[str] | None, sites: Sequence[str] | None
    ) -> None:
        """Add a filter behind those that the point has.

        Raises:
            JobError: tasks that are no list of names, or a site's name that is not allowed.
        """
        if isinstance(tasks, str):
            raise JobError(f"tasks={tasks!r}; a list of task names belongs here: [{tasks!r}]")
        spec = FilterSpec((component,), tuple(tasks) if tasks else ("*",), () if sites is None else _names(sites))
        self.filters.setdefault(point, []).append(spec)

    def of(self, point: Point) -> tuple[FilterSpec, ...]:
        """The filters of a point."""
        return tuple(self.filters.get(point, ()))

    @property
    def client_extra(self) -> dict[str, Any]:
        """What the clients' config holds beside the job itself."""
        return self.client_config | ({SITE_CONFIG: self.site_config} if self.site_config else {})

    def site_apps(self, executors: Sequence[ExecutorSpec]) -> tuple[ClientApp, ...]:
        """The apps of sites that have files of their own."""
        return tuple(
            ClientApp(
                f"{DEFAULT_APP}_{site}",
                (site,),
                tuple(item for item in executors if not item.sites or site in item.sites),
                (),
                self.of("client_input"),
                self.of("client_output"),
                self.client_extra,
            )
            for site in sorted(self.site_files)
        )

    def files(self, spec: JobSpec, shared: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
        """What lies in each app's custom folder, by the app's name.

        Raises:
            JobError: two files with one place.
        """
        if spec.app == DEFAULT_APP:
            return {DEFAULT_APP: dict(shared)}
        found = {spec.app: _merged(shared, self.server_files), DEFAULT_APP: _merged(shared, self.client_files)}
        for site, own in self.site_files.items():
            found[f"{DEFAULT_APP}_{site}"] = _merged(shared, self.client_files, own)
        return found


def _merged(*groups: Mapping[str, Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for group in groups:
        for name, file in group.items():
            code.add_file(found, name, file)
    return found


def _names(sites: Sequence[str]) -> tuple[str, ...]:
    if isinstance(sites, str) or not sites:
        raise JobError(f"clients={sites!r}; a list of client names belongs here, or None for all")
    return tuple(check_site_name(site) for site in sites)
