"""What an operator sees of a fault: a line in the log of who noticed it, a count, an entry in the round's record."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TRACES = ("Traceback (most recent call last)", '"exception"')


@dataclass(frozen=True, slots=True)
class Sign:
    """How a kind of fault shows.

    Attributes:
        by: who notices it: ``"broker"``, ``"controller"`` (with its jobs' processes), ``"site"``, or ``"peer"`` for any
            of those but the broker, ``"all"`` for any.
        events: one line of one of these at each fault that hit.
        counter: of `fedloom status --json`, above 0 behind the faults; "": the broker itself dies and counts anew.
        entry: a key of the rounds' records that speaks of it; "": nothing of the round had to be done again.
    """

    by: str
    events: tuple[str, ...]
    counter: str = ""
    entry: str = ""


def lines(fleet: Any, sign: Sign) -> Counter[str]:
    """The party's lines that speak of the fault, and all its others that are no mere information."""
    names = {"site": fleet.sites, "peer": ("controller", *fleet.sites), "all": fleet.all}.get(sign.by, (sign.by,))
    told = [line for name in names for line in fleet.log_lines(name) if line.get("level") != "debug"]
    return Counter(line["event"] for line in told if line["level"] != "info" or line["event"] in sign.events)


def traces(fleet: Any) -> list[str]:
    """Whose logs hold a stack trace, with its beginning."""
    found: list[str] = []
    for party in fleet.all.values():
        for path in party.logs:
            text = path.read_text(errors="replace")
            found += [f"{party.name}: {text[at : at + 600]}" for trace in TRACES if (at := text.find(trace)) >= 0]
    return list(dict.fromkeys(found))  # a party that is started again and again says the same


def entries(records: Sequence[dict[str, Any]]) -> Counter[str]:
    """How often the rounds' records speak of something that had to be done again, by key."""
    return Counter(
        key
        for record in records
        for key, spoken in (
            ("claim", record["claim"] > 1),
            ("cuts", record["cuts"] > 0),
            ("attempt", any("attempt" in site for site in record["sites"])),
            ("failures", bool(record["failures"])),
        )
        if spoken
    )


def counters(status: str) -> dict[str, int]:
    """What the broker has counted since its start, from `fedloom status --json`."""
    return json.loads(status)["counters"]


def missing(sign: Sign, hits: int, told: Counter[str], spoken: Counter[str], counted: dict[str, int]) -> list[str]:
    """What an operator should have seen of so many faults and did not."""
    wrong: list[str] = []
    said = sum(told[event] for event in sign.events)
    if said < hits:
        wrong.append(f"{hits} faults, and {said} lines {' or '.join(sign.events)} by {sign.by}")
    if sign.counter and not counted.get(sign.counter):
        wrong.append(f"nothing was counted as {sign.counter}: {counted}")
    if sign.entry and not spoken[sign.entry]:
        wrong.append(f"no round's record has {sign.entry}")
    return wrong
