"""The sites that failed in a run: out of the rounds' records and a failed job's reason, and in words."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

#: `Gather` puts the first failed site at the end of its reason: where, site, code, traceback.
_REASON = re.compile(
    r"\A(?:round (?P<round>\d+))?[^\n]*\n(?P<site>[A-Za-z0-9][\w.-]{0,127}): (?P<code>[\w-]+)\n(?P<text>.*)\Z",
    re.DOTALL,
)
#: The kind of event, and the code of a failure, of a script that failed with no task in hand: behind its `send`.
SCRIPT_ERROR = "script_error"
_MAX_SHOWN = 5
_MAX_NAMED = 20


@dataclass(frozen=True, slots=True)
class SiteFailure:
    """A site whose task ended without a result, or whose script failed when it had sent one.

    Attributes:
        code: what happened in a word, such as "exception", "killed", "timeout", "refused", or "script_error" where
            the result was there already.
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


def script_errors(events: Iterable[dict[str, Any]]) -> Iterator[SiteFailure]:
    """The scripts that failed with no task in hand, out of a job's events; the round is that of their last result."""
    for event in events:
        if event.get("kind") == SCRIPT_ERROR:
            data = cast("dict[str, Any]", event.get("data") or {})
            text = sys.intern(str(data.get("text") or ""))  # the same mistake in every round is held once
            yield SiteFailure(str(event.get("site") or ""), SCRIPT_ERROR, text, int(data.get("round") or 0))


def describe(failures: Sequence[SiteFailure]) -> str:
    """A few sites with their tracebacks, the others by name; rounds counted from 1, as progress counts them."""
    by_site: dict[str, list[SiteFailure]] = {}
    for failure in failures:
        by_site.setdefault(failure.site, []).append(failure)
    sites = sorted(by_site)
    parts = [f"{_what(by_site[site])}:\n{_text(by_site[site][0])}" for site in sites[:_MAX_SHOWN]]
    if others := sites[_MAX_SHOWN:]:
        more = f" and {len(others) - _MAX_NAMED} more" if len(others) > _MAX_NAMED else ""
        parts.append(f"so did {', '.join(others[:_MAX_NAMED])}{more}")
    return "\n".join(parts)


def _what(failures: Sequence[SiteFailure]) -> str:
    site, rounds = failures[0].site, _rounds(failures)
    if all(failure.code == SCRIPT_ERROR for failure in failures):
        return f"the script of {site} failed after it had sent its result of {rounds}"
    return f"{site} failed in {rounds}; the job went on without it"


def _text(failure: SiteFailure) -> str:
    return failure.text.rstrip() or failure.code


def _rounds(failures: Sequence[SiteFailure]) -> str:
    numbers = sorted({failure.round + 1 for failure in failures})
    if len(numbers) == 1:
        return f"round {numbers[0]}"
    return f"{len(numbers)} rounds, first in round {numbers[0]}"
