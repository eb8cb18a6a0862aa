"""The sites that failed in a run: out of the rounds' records and a failed job's reason, and in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

#: `Gather` puts the first failed site at the end of its reason: where, site, code, traceback.
_REASON = re.compile(
    r"\A(?:round (?P<round>\d+))?[^\n]*\n(?P<site>[A-Za-z0-9][\w.-]{0,127}): (?P<code>[\w-]+)\n(?P<text>.*)\Z",
    re.DOTALL,
)
_MAX_SHOWN = 5
_MAX_NAMED = 20


@dataclass(frozen=True, slots=True)
class SiteFailure:
    """A site whose task ended without a result.

    Attributes:
        code: what happened in a word, such as "exception", "killed", "timeout" or "refused".
        text: the site's own traceback where its code raised.
        round: the round in which it happened, from 0.
    """

    site: str
    code: str
    text: str
    round: int = 0


def failures_of(records: Iterable[dict[str, Any]], reason: str = "") -> list[SiteFailure]:
    """What failed in the committed rounds, and before them what ended the job, if a site did."""
    found: list[SiteFailure] = []
    if match := _REASON.match(reason):
        found.append(SiteFailure(match["site"], match["code"], match["text"], int(match["round"] or 0)))
    for record in records:
        for entry in cast("list[dict[str, Any]]", record.get("failures") or []):
            site, code, text = (str(entry.get(name) or "") for name in ("site", "code", "text"))
            found.append(SiteFailure(site, code, text, int(record.get("round") or 0)))
    return found


def describe(failures: Sequence[SiteFailure]) -> str:
    """A few sites with their tracebacks, the others by name; rounds counted from 1, as progress counts them."""
    by_site: dict[str, list[SiteFailure]] = {}
    for failure in failures:
        by_site.setdefault(failure.site, []).append(failure)
    sites = sorted(by_site)
    parts = [
        f"{site} failed in {_rounds(by_site[site])}; the job went on without it:\n{_text(by_site[site][0])}"
        for site in sites[:_MAX_SHOWN]
    ]
    if others := sites[_MAX_SHOWN:]:
        more = f" and {len(others) - _MAX_NAMED} more" if len(others) > _MAX_NAMED else ""
        parts.append(f"so did {', '.join(others[:_MAX_NAMED])}{more}")
    return "\n".join(parts)


def _text(failure: SiteFailure) -> str:
    return failure.text.rstrip() or failure.code


def _rounds(failures: Sequence[SiteFailure]) -> str:
    numbers = sorted({failure.round + 1 for failure in failures})
    if len(numbers) == 1:
        return f"round {numbers[0]}"
    return f"{len(numbers)} rounds, first in round {numbers[0]}"
