"""Variables in a job's config files: ``{name}`` in a text stands for a value that is given once.

A config's own top-level numbers, texts and bools are its variables. The environment variable ``FEDLOOM_<NAME>`` of the
machine that reads the file goes before the value there, so that a site can say where its data lies. `SITE_NAME`,
`JOB_ID` and `WORKSPACE` are put in where a component is built. Braces around any other word stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from .errors import JobError
from .jobjson import MAX_CONFIG_BYTES

#: What every job has without saying so, once it runs.
RUN_VARIABLES = ("SITE_NAME", "JOB_ID", "WORKSPACE")
ENV_PREFIX = "FEDLOOM_"

_REFERENCE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_MAX_DEPTH = 8


def resolve_config(config: Mapping[str, Any], environ: Mapping[str, str], where: str) -> dict[str, Any]:
    """A config file's map with its variables in place.

    Raises:
        JobError: a variable that stands for itself, or an environment variable that is not of the variable's type.
    """
    variables = {
        name: _from_environ(name, value, environ, where)
        for name, value in config.items()
        if isinstance(value, str | int | float) and _REFERENCE.fullmatch(f"{{{name}}}")
    }
    filler = _Filler(variables, where)
    return {key: filler.fill(value) for key, value in (dict(config) | variables).items()}


def substitute(value: Any, variables: Mapping[str, Any], where: str) -> Any:
    """The value with each ``{name}`` of a variable replaced; a text that is nothing else becomes the variable's value.

    Raises:
        JobError: a variable that stands for itself, or texts that grow out of bounds.
    """
    return _Filler(variables, where).fill(value)


class _Filler:
    """Replaces references until none is left, so that what was filled once stays as it is."""

    def __init__(self, variables: Mapping[str, Any], where: str) -> None:
        self._variables = variables
        self._where = where
        self._left = MAX_CONFIG_BYTES

    def fill(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._text(value, 0) if "{" in value else value
        if isinstance(value, list):
            return [self.fill(item) for item in cast("list[Any]", value)]
        if isinstance(value, dict):
            return {key: self.fill(item) for key, item in cast("dict[str, Any]", value).items()}
        return value

    def _text(self, text: str, depth: int) -> Any:
        known = [name for name in _REFERENCE.findall(text) if name in self._variables]
        if not known:
            return text
        if depth == _MAX_DEPTH:
            raise JobError(
                f"{self._where}: variable {known[0]!r} stands for itself, or for others more than {_MAX_DEPTH} deep"
            )
        self._left -= len(text) + sum(len(str(self._variables[name])) for name in known)
        if self._left < 0:
            raise JobError(f"{self._where}: with its variables in place it is over {MAX_CONFIG_BYTES} bytes")
        if text == f"{{{known[0]}}}":
            value = self._variables[known[0]]
            return self._text(value, depth + 1) if isinstance(value, str) else value
        return self._text(_REFERENCE.sub(lambda found: str(self._variables.get(found[1], found[0])), text), depth + 1)


def _from_environ(name: str, value: Any, environ: Mapping[str, str], where: str) -> Any:
    key = ENV_PREFIX + name.upper()
    told = environ.get(key)
    if told is None or isinstance(value, str):
        return value if told is None else told
    try:
        if isinstance(value, bool):
            return {"true": True, "1": True, "false": False, "0": False}[told.lower()]
        return int(told) if isinstance(value, int) else float(told)
    except (KeyError, ValueError):
        raise JobError(f"{where}: {key}={told!r} in the environment; a {type(value).__name__} belongs there") from None
