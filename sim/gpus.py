"""GPU slots: which GPUs each of the T workers sees, and how much of their memory. Pure: nothing here asks a driver.

Two spellings, as users know them: ``0,1`` gives every worker one GPU, ``[0,1],[2,3]`` gives every worker a group. Both
are dealt round-robin over the workers' slots, so 4 workers on ``0,1`` are two on each GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..executor.gpushare import ENV_FRACTION
from ..serialization.errors import JobError

__all__ = ["ALLOWED", "EQUAL", "Groups", "Slot", "check_share", "parse_gpus", "slots", "unmet", "users", "worker_count"]

#: A share that says: as much as there is for each of those that share a GPU.
EQUAL = "equal"

ALLOWED = (
    'allowed are GPU ids, one for each worker ("0,1"), and groups of them ("[0,1],[2,3]");'
    " an id is a number or a GPU-... or MIG-... name"
)

_ID = re.compile(r"\d{1,4}|(?:GPU|MIG)-[0-9A-Za-z/-]{1,80}")
_GROUP = re.compile(r"\[([^\[\]]*)\]|([^\[\],]+)")

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """One of the T places where a site's task runs, and the GPUs it sees (none: it sees what the launcher saw).

    ``share`` is the part of each GPU's memory that a process in this slot may take; 0: as much as it gets.
    """

    index: int
    gpus: tuple[str, ...] = ()
    share: float = 0.0

    @property
    def env(self) -> dict[str, str]:
        """What the slot's worker gets on top of the environment, before any user code runs."""
        env = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}
        return env | ({ENV_FRACTION: f"{self.share:.6g}"} if self.share else {})


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


def check_share(share: float | str | None) -> float | str | None:
    """A memory share as users say it: ``"equal"``, or a number (or its text) over 0 and up to 1; None: no bound.

    Raises:
        JobError: anything else.
    """
    if share is None or share == EQUAL:
        return share
    try:
        number = -1.0 if isinstance(share, bool) else float(share)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 < number <= 1:  # NaN is neither
        raise JobError(
            f"GPU memory share {share!r}; allowed are a number over 0 and up to 1, such as 0.5 for half of a GPU for"
            f" each worker on it, and {EQUAL!r}: as much for each as for the others on its GPU"
        )
    return number


def slots(groups: Sequence[tuple[str, ...]], workers: int, share: float | str | None = None) -> tuple[Slot, ...]:
    """``workers`` slots with the groups dealt round-robin; without groups no slot says anything of GPUs.

    Raises:
        JobError: a share without GPUs, or of which there is not enough for all workers on a GPU.
    """
    wanted = check_share(share)
    dealt = tuple(Slot(index, groups[index % len(groups)] if groups else ()) for index in range(workers))
    if wanted is None:
        return dealt
    if not groups:
        raise JobError(f"GPU memory share {share!r} without GPUs: say which GPUs the workers have (-gpu 0,1)")
    shared = users(dealt)
    most, count = max(shared.items(), key=lambda item: item[1])
    if isinstance(wanted, float) and wanted * count > 1 + 1e-6:  # three thirds, written as 0.333334
        raise JobError(
            f"{count} workers share GPU {most} with {wanted:g} of its memory each, {wanted * count:g} times what there"
            f" is: give at most {1 / count:.3g} each ({EQUAL!r} does), or have at most {int(1 / wanted + 1e-6)} workers"
            " on a GPU"
        )
    return tuple(
        Slot(slot.index, slot.gpus, wanted if isinstance(wanted, float) else 1 / max(shared[gpu] for gpu in slot.gpus))
        for slot in dealt
    )


def unmet(resource_spec: Mapping[str, Any], sites: Iterable[str], groups: Groups) -> str:
    """What a job's ``resource_spec`` asks for and the groups do not give, in words; "" where there is nothing.

    The GPUs of a simulation are dealt by its own options, never by the job: a job for sites with eight GPUs each may
    well be tried on one, or on none.
    """
    if not groups:
        return ""
    least = min(len(group) for group in groups)
    everyones = resource_spec.get("@ALL", {})
    asked = {site: int(resource_spec.get(site, everyones).get("num_of_gpus", 0)) for site in sites}
    short = [site for site, count in asked.items() if count > least]
    if not short:
        return ""
    more = f" and {len(short) - 1} more" if len(short) > 1 else ""
    return (
        f"{short[0]}{more} asks for {asked[short[0]]} GPUs (resource_spec), and a worker sees {least}: a simulation"
        " deals GPUs by -gpu alone, in groups such as [0,1],[2,3]"
    )


def users(slots: Iterable[Slot]) -> Counter[str]:
    """How many of the slots see each GPU."""
    return Counter(gpu for slot in slots for gpu in slot.gpus)


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
