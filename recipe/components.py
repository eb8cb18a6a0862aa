"""Objects that a job script makes and a site or the server makes again: an aggregator, a filter, a workflow.

What travels is the class's import path, its source file where it lies beside the job script, and its arguments, which
are read off the object: an ``__init__`` parameter's value is the attribute of that name (or with ``_`` before it).
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from ..serialization.errors import JobError
from ..serialization.jobspec import Component
from .code import is_installed

_NONE = inspect.Parameter.empty
_STARS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def component_of(thing: object, what: str) -> tuple[Component, list[Path]]:
    """The component that stands for an object, and the source files that it needs at the other end.

    Args:
        thing: an object, or ``{"class_path": "module.Class", "args": {...}}`` (``path`` for ``class_path`` too).
        what: the option's name, for errors.

    Raises:
        JobError: a class instead of an object, a class of the job script itself, an argument that the object does not
            keep or that JSON cannot hold.
    """
    if isinstance(thing, Mapping):
        return _of_entry(cast("Mapping[str, Any]", thing), what)
    if inspect.isclass(thing):
        raise JobError(f"{what}={thing.__name__} is a class; give an object of it: {thing.__name__}()")
    cls = type(thing)
    if cls.__module__ == "builtins":
        raise JobError(f"{what} is a {cls.__name__}; an object of a class belongs here")
    if cls.__module__ == "__main__":
        raise JobError(
            f"{what}: class {cls.__name__} stands in the job script, which nothing imports: move it to a module beside"
            f" the script, such as {cls.__name__.lower()}.py, and import it from there"
        )
    if "<locals>" in cls.__qualname__ or "." in cls.__qualname__:
        raise JobError(f"{what}: class {cls.__qualname__} is not at the top of its module: move it there")
    path = f"{cls.__module__}.{cls.__name__}"
    args = {name: _json(value, f"{what}: {path}({name}=...)") for name, value in _arguments(thing, path, what)}
    return Component(path, args), sources({cls.__module__})


def sources(modules: Iterable[str]) -> list[Path]:
    """The sources of loaded modules that are not installed, which must travel: a file each, or a package's folder."""
    out: list[Path] = []
    for name in sorted(set(modules) - {"__main__"}):
        file = getattr(sys.modules.get(name.partition(".")[0]), "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py"):
            continue
        path = Path(file).resolve()
        path = path.parent if path.name == "__init__.py" else path
        if not is_installed(path.parent) and name.partition(".")[0] != "fedloom":
            out.append(path)
    return sorted(set(out))


def _of_entry(entry: Mapping[str, Any], what: str) -> tuple[Component, list[Path]]:
    if unknown := entry.keys() - {"class_path", "path", "args"}:
        raise JobError(f"{what}: unknown key {min(unknown)!r}; allowed are 'class_path' and 'args'")
    path = entry.get("class_path", entry.get("path"))
    if not isinstance(path, str):
        raise JobError(f"{what}: class_path={path!r}; 'module.Class' belongs here")
    component = Component(path, dict(entry.get("args") or {}))
    component.load()  # what cannot be imported here is said here
    return component, sources({path.rpartition(".")[0]})


def _arguments(thing: object, path: str, what: str) -> Iterable[tuple[str, Any]]:
    try:
        parameters = inspect.signature(type(thing)).parameters.values()
    except (TypeError, ValueError):
        return
    for parameter in parameters:
        if parameter.kind in _STARS:
            continue
        value = getattr(thing, parameter.name, getattr(thing, f"_{parameter.name}", _NONE))
        if value is _NONE:  # one with a default too: whoever made the object may have given another
            raise JobError(
                f"{what}: {path} keeps no attribute {parameter.name!r}, so its argument cannot be known: set"
                f" self.{parameter.name} in __init__, or give"
                f' {{"class_path": "{path}", "args": {{"{parameter.name}": ...}}}}'
            )
        if not _same(value, parameter.default):
            yield parameter.name, value


def _same(value: Any, default: Any) -> bool:
    try:
        return bool(value is default or (type(value) is type(default) and value == default))
    except (TypeError, ValueError):  # arrays have no one truth
        return False


def _json(value: Any, where: str) -> Any:
    if type(value).__module__ not in ("builtins", "enum") and hasattr(value, "tolist"):
        value = value.tolist()
    value = getattr(value, "value", value) if isinstance(value, str | int) else value  # an enum of texts or numbers
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        raise JobError(
            f"{where} is a {type(value).__name__}, which a job's configuration cannot hold; allowed are JSON's types"
        ) from None
