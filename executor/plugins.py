"""Executors that a site has installed: entry points of the group ``fedloom.executors``.

A package declares one in its pyproject.toml::

    [project.entry-points."fedloom.executors"]
    "acme.tabular" = "acme_fl:TabularExecutor"

and a job's executor component names it, by its name (``"path": "acme.tabular"``, with a dot as all paths of a job have)
or by what it stands for (``"path": "acme_fl.TabularExecutor"``). It is called with the component's ``args`` and gives a
`ScriptExecutor` or a `FunctionExecutor`, whose script may be an absolute path within the package. Nothing else that a
job names is imported into the executor's own process.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from ..serialization.errors import JobError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "fedloom.executors"


def find_plugin(path: str) -> Callable[..., Any] | None:
    """The installed executor of this name, or that stands for this import path; None where there is none.

    Raises:
        JobError: two packages have one of this name, or it cannot be loaded.
    """
    found = {_target(point): point for point in _installed() if path in (point.name, _target(point))}
    if not found:
        return None
    if len(found) > 1:
        raise JobError(f"executor {path!r} stands for {' and '.join(sorted(found))}: name one of these")
    (point,) = found.values()
    try:
        plugin = point.load()
    except Exception as error:
        raise JobError(f"executor {path!r} ({point.value}) cannot be loaded here: {error!r}") from error
    if not callable(plugin):
        raise JobError(
            f"executor {path!r} ({point.value}) is a {type(plugin).__name__}; a class or function belongs there"
        )
    return cast("Callable[..., Any]", plugin)


def plugin_names() -> list[str]:
    """The names of the installed ones."""
    return sorted({point.name for point in _installed()})


def call_plugin(plugin: Callable[..., Any], path: str, args: Mapping[str, Any]) -> Any:
    """What the plugin makes of a component's arguments.

    Raises:
        JobError: it takes others, or raised.
    """
    try:
        inspect.signature(plugin).bind(**args)
    except TypeError as error:
        raise JobError(f"executor {path!r}: {error}") from None
    except ValueError:  # some builtins have no signature: the call itself will tell
        pass
    try:
        return plugin(**args)
    except JobError:
        raise
    except Exception as error:
        raise JobError(f"executor {path!r} raised {error!r}") from error


def _installed() -> tuple[EntryPoint, ...]:
    return _installed_on(tuple(sys.path))


@lru_cache(maxsize=1)
def _installed_on(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Looked up once: it reads the metadata of every package on the path, and is asked for with each task."""
    from importlib.metadata import entry_points  # with email and all it needs: only where a job names a plugin

    del path
    return tuple(entry_points(group=GROUP))


def _target(point: EntryPoint) -> str:
    return point.value.partition("[")[0].strip().replace(":", ".")
