"""A class by its import path and its arguments, as a job's config files name what is to be built."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass, field
from typing import Any, cast

from .errors import JobError
from .jobjson import map_of, text_of

_KEYS = frozenset({"id", "path", "name", "args", "config_type"})
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")

#: What a config may call by its class's short name alone.
KNOWN_NAMES = {
    path.rpartition(".")[2]: path
    for path in (
        "fedloom.controller.workflows.fedavg.FedAvg",
        "fedloom.controller.workflows.crosssite.CrossSiteEval",
        "fedloom.controller.workflows.crosssite.GlobalModelEval",
        "fedloom.controller.aggregators.mean.WeightedMean",
        "fedloom.executor.script.ScriptExecutor",
        "fedloom.executor.script.FunctionExecutor",
        "fedloom.serialization.filters.ExcludeVars",
    )
}


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
        """Out of a config file's map: by ``path``, or by ``name`` where that is one of `KNOWN_NAMES`.

        Raises:
            JobError: no map, a key unknown or missing, or a value of the wrong type.
        """
        entry = map_of(data, where)
        if unknown := sorted(entry.keys() - _KEYS):
            raise JobError(f"{where}: unknown key {unknown[0]!r}; allowed are {', '.join(sorted(_KEYS))}")
        if "name" in entry and "path" not in entry:
            path = _known(text_of(entry["name"], f"{where}: name"), where)
        else:
            path = text_of(entry.get("path"), f"{where}: path")
        if not _PATH.fullmatch(path):
            raise JobError(f"{where}: path {path!r}; it must be 'module.Class'")
        return Component(
            path, map_of(entry.get("args", {}), f"{where}: args"), text_of(entry.get("id", ""), f"{where}: id")
        )


def _known(name: str, where: str) -> str:
    if (path := KNOWN_NAMES.get(name)) is None:
        known = ", ".join(sorted(KNOWN_NAMES))
        raise JobError(f"{where}: name {name!r} is not known; known are {known}. Others are given by 'path'")
    return path


def _build_nested(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_build_nested(item, where) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    entry = cast("dict[str, Any]", value)
    if entry.get("config_type") == "dict":
        return {key: item for key, item in entry.items() if key != "config_type"}
    if entry.keys() <= _KEYS:
        by_name = isinstance(entry.get("name"), str) and entry["name"] in KNOWN_NAMES and "args" in entry
        if by_name or (isinstance(entry.get("path"), str) and "." in entry["path"]):
            return Component.parse(entry, where).build()
    return {key: _build_nested(item, where) for key, item in entry.items()}
