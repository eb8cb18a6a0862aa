"""GPU slots: which GPUs each of the T workers sees. Pure: nothing here asks a driver.

Two spellings, as users know them: ``0,1`` gives every worker one GPU, ``[0,1],[2,3]`` gives every worker a group. Both
are dealt round-robin over the workers' slots, so 4 workers on ``0,1`` are two on each GPU.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..serialization.errors import JobError

__all__ = ["ALLOWED", "Slot", "parse_gpus", "slots", "worker_count"]

ALLOWED = (
    'allowed are GPU ids, one for each worker ("0,1"), and groups of them ("[0,1],[2,3]");'
    " an id is a number or a GPU-... or MIG-... name"
)

_ID = re.compile(r"\d{1,4}|(?:GPU|MIG)-[0-9A-Za-z/-]{1,80}")
_GROUP = re.compile(r"\[([^\[\]]*)\]|([^\[\],]+)")

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """One of the T places where a site's task runs, and the GPUs it sees (none: it sees what the launcher saw)."""

    index: int
    gpus: tuple[str, ...] = ()

    @property
    def env(self) -> dict[str, str]:
        """What the slot's worker gets on top of the environment, before any user code runs."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}


def parse_gpus(text: str | None) -> Groups:
    """GPU groups out of ``"0,1"`` or ``"[0,1],[2,3]"``; no text gives none. A GPU in two groups is shared by two slots.

    Raises:
        JobError: anything else, or the same id twice within a group.
    """
    rest = re.sub(r"\s+", "", text or "")
    whole = rest
    if not rest:
        return ()
    groups: list[tuple[str, ...]] = []
    while True:
        match = _GROUP.match(rest)
        if match is None:
            raise JobError(f"GPUs {whole!r}: cannot read {rest or 'what follows the last comma'!r}; {ALLOWED}")
        inside, single = match.groups()
        groups.append(_group(inside if inside is not None else single, whole))
        rest = rest[match.end() :]
        if not rest:
            return tuple(groups)
        if rest[0] != ",":
            raise JobError(f"GPUs {whole!r}: a comma belongs before {rest!r}; {ALLOWED}")
        rest = rest[1:]


def _group(text: str, whole: str) -> tuple[str, ...]:
    ids = tuple(text.split(","))
    for gpu in ids:
        if not _ID.fullmatch(gpu):
            raise JobError(f"GPUs {whole!r}: {gpu!r} is no GPU id; {ALLOWED}")
    if len(set(ids)) != len(ids):
        raise JobError(f"GPUs {whole!r}: the group [{text}] names a GPU twice; {ALLOWED}")
    return ids


def slots(groups: Sequence[tuple[str, ...]], workers: int) -> tuple[Slot, ...]:
    """``workers`` slots with the groups dealt round-robin; without groups no slot says anything of GPUs."""
    return tuple(Slot(index, groups[index % len(groups)] if groups else ()) for index in range(workers))


def worker_count(sites: int, threads: int | None, groups: Sequence[tuple[str, ...]]) -> int:
    """T: as asked, but never more than there are sites; unasked, every site at once, or one for each GPU group.

    Raises:
        JobError: fewer than one worker is asked for, or there are more GPU groups than sites.
    """
    if len(groups) > sites:
        raise JobError(
            f"{len(groups)} GPU groups but {sites} clients: {len(groups) - sites} of the groups could have none; give"
            f" at most {sites}, join GPUs to groups such as [0,1],[2,3], or have more clients"
        )
    if threads is not None and threads < 1:
        raise JobError(f"{threads} workers at once; at least 1 is needed, and at most the {sites} sites can be used")
    wanted = threads if threads is not None else (len(groups) or sites)
    return min(wanted, sites)
