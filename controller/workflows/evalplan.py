"""Which model is scored where, in which order: fixed when an evaluation begins, so that a later process goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...serialization.errors import JobError
from ...serialization.model import FLModel

#: What the matrix calls the server's models, as users know it; sites' models have their sites' names.
SERVER = "SRV_"
_PLAN = "plan"


@dataclass(frozen=True, slots=True)
class Step:
    """A round of an evaluation: one model at some of the sites.

    Attributes:
        model: its name in the matrix.
        owner: the site whose model it is; "" for one of the server's.
        part: how many other steps have scored this model at other sites before.
        batch: the sites whose models are asked for together with this one.
        held: the round under which they are asked for, the batch's last: its commit lets them go, and none before.
    """

    round: int
    model: str
    owner: str
    part: int
    sites: tuple[str, ...]
    batch: tuple[str, ...] = ()
    held: int = 0


@dataclass(frozen=True, slots=True)
class EvalPlan:
    """An evaluation: every model is scored at every site, one model after another.

    Attributes:
        sites: whose data is used, in the matrix's order.
        models: the server's models: their names without `SERVER`, and where each comes from.
        owners: the sites whose own models are scored too.
        batch: how many of these are in the spool at once.
        at_once: sites that score a model at once; their scores are one record.
    """

    sites: tuple[str, ...]
    models: tuple[tuple[str, str], ...] = ()
    owners: tuple[str, ...] = ()
    batch: int = 1
    at_once: int = 100

    def __post_init__(self) -> None:
        names = [SERVER + name for name, _ in self.models]
        if len(set(names)) != len(names):
            raise JobError(f"two of the server's models have one name among {names}: rename one of `models`")
        if clash := sorted(set(names) & set(self.owners)):
            raise JobError(f"site {clash[0]!r} has the name of a model of the server's: rename one of the two")

    @property
    def rounds(self) -> int:
        """How many there are: one for the plan itself, then the steps."""
        return 1 + (len(self.models) + len(self.owners)) * self._parts

    @property
    def _parts(self) -> int:
        return -(-len(self.sites) // self.at_once)

    def steps(self) -> Iterator[Step]:
        """All steps in their order: the server's models first."""
        round = 1
        for name, _ in self.models:
            for part, sites in enumerate(_cut(self.sites, self.at_once)):
                yield Step(round, SERVER + name, "", part, sites)
                round += 1
        for batch in _cut(self.owners, self.batch):
            held = round + len(batch) * self._parts - 1
            for owner in batch:
                for part, sites in enumerate(_cut(self.sites, self.at_once)):
                    yield Step(round, owner, owner, part, sites, batch, held)
                    round += 1


class EvalMemory:
    """What an evaluation carries from round to round, all of it through commits.

    Attributes:
        good: how many entries of the matrix hold scores.
        first: what failed first, as a gather's error says it; "" where nothing did.
    """

    def __init__(self, plan: EvalPlan, good: int = 0, first: str = "") -> None:
        self.plan = plan
        self.good = good
        self.first = first

    @staticmethod
    def of(state: FLModel) -> EvalMemory:
        """As `encode` left it."""
        values: dict[str, Any] = json.loads(np.asarray(state.params[_PLAN], np.uint8).tobytes())
        plan = EvalPlan(
            sites=tuple(values["sites"]),
            models=tuple((name, source) for name, source in values["models"]),
            owners=tuple(values["owners"]),
            batch=int(values["batch"]),
            at_once=int(values["at_once"]),
        )
        meta = state.meta or {}
        return EvalMemory(plan, int(meta.get("good", 0)), str(meta.get("first", "")))

    def encode(self) -> FLModel:
        """As a payload's model: a list of very many sites fits into no message."""
        data = json.dumps(asdict(self.plan), separators=(",", ":")).encode()
        return FLModel(params={_PLAN: np.frombuffer(data, np.uint8)}, meta={"good": self.good, "first": self.first})


def in_order(sites: Sequence[str]) -> tuple[str, ...]:
    """Sites by name, site-2 before site-10."""
    return tuple(sorted(set(sites), key=lambda site: [(len(n), n) if n.isdigit() else (0, n) for n in _pieces(site)]))


def _pieces(site: str) -> list[str]:
    return re.findall(r"[0-9]+|[^0-9]+", site)


def _cut(items: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    for start in range(0, len(items), size):
        yield tuple(items[start : start + size])
