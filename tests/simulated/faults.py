"""What goes wrong in a schedule: faults drawn from the seed, any of which can be left out again to shrink it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

#: Every kind, with how often it is drawn beside the others.
KINDS: dict[str, int] = {
    "drop": 3,
    "duplicate": 2,
    "reorder": 2,
    "delay": 2,
    "flip": 3,
    "cut": 4,
    "cut_all": 1,
    "partition": 4,
    "freeze": 5,
    "crash": 6,
    "crash_step": 8,
    "point": 6,
    "host": 3,
    "host_step": 3,
    "clock": 1,
    "full": 1,
    "sync": 1,
}
#: Whom a crash may hit. The broker's host takes both of its processes.
VICTIMS = ("control", "data", "controller-1", "controller-2", "job", "executor", "pool")
POINTS = (
    "control.before_commit",
    "control.after_commit_before_send",
    "control.after_file_before_row",
    "journal.before_commit",
    "journal.after_commit",
    "data.mid_upload",
    "data.after_file_before_row",
    "link.before_chunk",
    "job.after_fold",
    "job.before_checkpoint",
    "job.before_end",
)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    kind: str
    at: float = 0.0  # when, or from when on
    lasts: float = 0.0
    whom: str = ""
    step: int = 0
    share: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind}@{self.at:.4f}+{self.lasts:.3f}/{self.whom}/{self.step}/{self.share:g}"

    @staticmethod
    def parse(text: str) -> Fault:
        """The inverse."""
        kind, _, rest = text.partition("@")
        times, whom, step, share = rest.split("/")
        at, _, lasts = times.partition("+")
        return Fault(kind, float(at), float(lasts), whom, int(step), float(share))


@dataclass(frozen=True)
class Plan:
    """A schedule."""

    seed: int
    variant: int
    faults: tuple[Fault, ...] = field(default=())

    def __str__(self) -> str:
        """A line that says all of it, whatever a seed may mean one day."""
        return f"{self.seed} {self.variant} {' '.join(map(str, self.faults)) or '-'}"


def draw(seed: int, busy_s: Sequence[float], weights: Sequence[int]) -> Plan:
    """The schedule of a seed: which job, and one to six faults while it is at work.

    Args:
        busy_s: about how long each of the jobs takes undisturbed.
        weights: how often each of them is drawn, beside the others.
    """
    chance = Random(seed * 2 + 1)
    variant = chance.choices(range(len(busy_s)), weights)[0]
    kinds, odds = list(KINDS), list(KINDS.values())
    faults: list[Fault] = []
    for _ in range(chance.choice((1, 1, 2, 2, 3, 4, 6))):
        kind = chance.choices(kinds, odds)[0]
        at = chance.uniform(0.0, busy_s[variant])
        share = chance.choice((0.01, 0.03, 0.1))
        lasts = chance.uniform(0.2, 3.0)
        whom = chance.choice(VICTIMS)
        step = chance.randrange(1, 60)
        match kind:
            case "crash" | "crash_step":
                pass
            case "point":
                whom, step = chance.choice(POINTS), chance.choice((1, 1, 2, 3, 5, 8))
            case "partition" | "freeze":
                lasts = chance.choice((0.5, 2.0, 4.0))
            case "full" | "sync":
                lasts = chance.uniform(0.1, 1.0)
        faults.append(Fault(kind, round(at, 4), round(lasts, 3), whom, step, share))
    return Plan(seed, variant, tuple(faults))


def favour(plan: Plan, variants: Sequence[int], faults: Sequence[str]) -> Plan:
    """The same seed with one of these jobs, and with faults that go for one thing: ``kind/whom`` each.

    Where a safeguard is switched off, what it guards against must be there.
    """
    chance = Random(plan.seed * 11 + 5)
    wanted: list[Fault] = []
    for text in faults:
        kind, _, whom = text.partition("/")
        lasts = chance.choice((2.0, 2.8, 3.2, 4.0)) if kind in ("freeze", "partition") else chance.uniform(0.5, 3.0)
        step = chance.choice((1, 2, 3, 5)) if kind == "point" else chance.randrange(1, 60)
        at = round(chance.uniform(0.02, 1.2), 4)
        wanted.append(Fault(kind, at, round(lasts, 3), whom, step, chance.choice((0.03, 0.1))))
    return Plan(plan.seed, chance.choice(variants or (plan.variant,)), tuple(wanted) or plan.faults)


def parse(line: str) -> Plan:
    """A plan from its line: seed, variant, faults."""
    seed, variant, *rest = line.partition("#")[0].split()
    return Plan(int(seed), int(variant), tuple(Fault.parse(text) for text in rest if text != "-"))
