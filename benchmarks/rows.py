"""The five rows of the side-by-side table, and what fedloom is to reach in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from figures import Target

Kind = Literal["np", "big", "digits"]
#: A measure of a run that a target is about: seconds of the whole command, or of a round at the median.
Measure = Literal["wall_s", "round_s"]


@dataclass(frozen=True, slots=True)
class Goal:
    """A target of fedloom's in a row: a measure of a mode against the same measure of another system."""

    mode: Literal["exact", "float32"]
    measure: Measure
    against: str
    target: Target


@dataclass(frozen=True, slots=True)
class Row:
    """The work of a row.

    Attributes:
        at_once: clients that run at the same time, in the systems that can bound it.
        functions: fedloom's clients are function tasks, on a worker a core at most; else a script each, all at once.
        without: systems that are not started, with the reason.
        repeat: runs of a full benchmark; figures are medians over them.
    """

    key: str
    title: str
    kind: Kind
    clients: int
    rounds: int
    at_once: int
    mib: int = 0
    tensors: int = 50
    functions: bool = False
    without: tuple[tuple[str, str], ...] = ()
    goals: tuple[Goal, ...] = ()
    repeat: int = 3

    def args(self) -> list[str]:
        """The command line of every system's script."""
        words = ["--kind", self.kind, "--clients", self.clients, "--rounds", self.rounds, "--at-once", self.at_once]
        return [str(word) for word in words + (["--mib", self.mib, "--tensors", self.tensors] if self.mib else [])]

    def why_not(self, system: str) -> str:
        """Why a system is not started; "" where it is."""
        return dict(self.without).get(system, "")


def _both(measure: Measure, against: str, target: Target) -> tuple[Goal, ...]:
    return tuple(Goal(mode, measure, against, target) for mode in ("exact", "float32"))


def _rounds(float32: float, exact: float) -> tuple[Goal, ...]:
    return (
        Goal("float32", "round_s", "bare", Target(float32, of="ratio")),
        Goal("exact", "round_s", "bare", Target(exact, of="ratio")),
    )


ROWS = (
    Row(
        "np",
        "8 clients, 1,000 parameters, 10 rounds",
        "np",
        clients=8,
        rounds=10,
        at_once=8,
        goals=_both("wall_s", "bare", Target(1.2, of="extra")),
    ),
    Row(
        "fleet",
        "100 clients, 3 rounds, 2 at a time",
        "np",
        clients=100,
        rounds=3,
        at_once=2,
        functions=True,
        goals=_both("wall_s", "pfl", Target(1, "below", "ratio")),
    ),
    Row(
        "big",
        "100 MiB model, 4 clients, 3 rounds",
        "big",
        clients=4,
        rounds=3,
        at_once=4,
        mib=100,
        functions=True,
        goals=_rounds(1.5, 2.0),
    ),
    Row(
        "huge",
        "1 GiB model, 4 clients, 2 rounds",
        "big",
        clients=4,
        rounds=2,
        at_once=4,
        mib=1024,
        functions=True,
        without=(("nvflare", "it takes more memory than this class of machine has (out of memory at 23 GB)"),),
        goals=_rounds(1.3, 1.9),
        repeat=2,
    ),
    Row(
        "digits",
        "digits, 4 clients, 10 rounds, torch",
        "digits",
        clients=4,
        rounds=10,
        at_once=4,
        goals=_both("wall_s", "bare", Target(1.15, of="ratio")),
    ),
)
