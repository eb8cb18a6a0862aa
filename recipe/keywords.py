"""Keyword arguments of recipes, mapped to groups of options: frozen dataclasses, each checked in one place.

A recipe with forty options names its groups once. What a user writes stays plain keyword arguments: the groups' fields
are the names, their defaults the defaults, and `signature_of` shows both to whoever asks for help.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from typing import Any, TypeVar

_T = TypeVar("_T")


def option_fields(groups: Iterable[type]) -> dict[str, Field[Any]]:
    """The options of these groups by name, in the groups' order."""
    return {field.name: field for group in groups for field in fields(group) if field.init}


def check_names(who: str, groups: Iterable[type], given: Iterable[str]) -> None:
    """Refuse an option that none of the groups has, and ask for those without a default.

    Raises:
        TypeError: as Python says it of any call; an unknown option comes with the nearest one's name.
    """
    known = option_fields(groups)
    names = set(given)
    for name in sorted(names - known.keys()):
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; its options are {', '.join(sorted(known))}"
        raise TypeError(f"{who}() got an unexpected keyword argument {name!r}{hint}")
    missing = [name for name, field in known.items() if required(field) and name not in names]
    if missing:
        listed = ", ".join(repr(name) for name in missing)
        raise TypeError(f"{who}() missing {len(missing)} required keyword-only argument(s): {listed}")


def fill(group: type[_T], given: Mapping[str, Any]) -> _T:
    """A group out of those keyword arguments that are its fields.

    Raises:
        JobError: a value that the group does not allow.
    """
    names = {field.name for field in fields(group) if field.init}  # pyright: ignore[reportArgumentType]
    return group(**{name: value for name, value in given.items() if name in names})


def signature_of(groups: Iterable[type]) -> inspect.Signature:
    """The keyword-only signature that groups make together."""
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if required(field) else field.default,
                annotation=field.type,
            )
            for name, field in option_fields(groups).items()
        ]
    )


def required(field: Field[Any]) -> bool:
    """Whether an option has no default."""
    return field.default is MISSING and field.default_factory is MISSING
