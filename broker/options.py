"""The bounds and times of the broker that an operator may set by name: ``fedloom broker --set NAME=VALUE``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar, cast

from ..serialization.errors import JobError
from .ledger import Limits as LedgerLimits
from .sessions import Timing
from .state import Settings
from .transferlimits import Limits as TransferLimits

__all__ = ["OPTIONS", "apply", "parse"]


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=_Dataclass)
Number = int | float

_UNITS = {"": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}
#: Bounds whose 0 means none.
_NONE_AT_0 = frozenset({"quota_bytes", "site_bytes"})


def _options() -> dict[str, Number]:
    found: dict[str, Number] = {}
    for cls in (Timing, LedgerLimits, Settings, TransferLimits):
        for field in dataclasses.fields(cls):
            if type(field.default) in (int, float):  # a bool is a choice, not a bound
                found.setdefault(field.name, cast("Number", field.default))
    return found


#: Every name, and its default.
OPTIONS: Mapping[str, Number] = _options()


def parse(assignments: Iterable[str]) -> dict[str, Number]:
    """``NAME=VALUE`` each; a size may end in KiB, MiB, GiB or TiB.

    Raises:
        JobError: no such name, or no such value; says what is allowed.
    """
    out: dict[str, Number] = {}
    for assignment in assignments:
        name, sep, text = assignment.partition("=")
        if not sep or name not in OPTIONS:
            allowed = ", ".join(f"{known} ({default})" for known, default in sorted(OPTIONS.items()))
            raise JobError(f"--set {assignment!r}; it is NAME=VALUE, of these (with their defaults): {allowed}")
        out[name] = _value(name, text)
    return out


def _value(name: str, text: str) -> Number:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(|[KMGT]iB)", text.strip())
    value = float(found[1]) * _UNITS[found[2]] if found else -1.0
    whole = isinstance(OPTIONS[name], int)
    if (whole and not value.is_integer()) or value < 0 or (value == 0 and name not in _NONE_AT_0):
        kind = "a whole number" if whole else "a number"
        raise JobError(f"--set {name}={text}; {name} is {kind} over 0, such as {OPTIONS[name]}")
    return int(value) if whole else value


def apply(settings: T, bounds: Mapping[str, Number]) -> T:
    """The settings (a dataclass) with those of the bounds that are fields of it."""
    names = {field.name for field in dataclasses.fields(settings)}
    changes: Any = {name: value for name, value in bounds.items() if name in names}
    return dataclasses.replace(settings, **changes)
