"""A figure beside its reference and its target: what every benchmark hands over, and what is printed and kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Of = Literal["value", "ratio", "extra"]


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure is to be.

    Attributes:
        bound: the number that counts.
        best: "low": at most the bound; "high": at least; "below": less than it.
        of: what is compared: the value itself, value / reference, or value - reference.
    """

    bound: float
    best: Literal["low", "high", "below"] = "low"
    of: Of = "value"

    def met_by(self, number: float) -> bool:
        """Whether a number is good enough."""
        if self.best == "low":
            return number <= self.bound
        return number >= self.bound if self.best == "high" else number < self.bound

    def text(self, unit: str, against: str) -> str:
        """As a table says it."""
        sign = {"low": "at most", "high": "at least", "below": "less than"}[self.best]
        match self.of:
            case "value":
                return f"{sign} {number(self.bound)} {unit}".rstrip()
            case "ratio":
                return f"{sign} {number(self.bound)} x {against}"
            case "extra":
                return f"{sign} {number(self.bound)} {unit} more than {against}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number. ``value`` is None where nothing was measured, and ``note`` says why."""

    name: str
    value: float | None
    unit: str
    against: str = ""
    reference: float | None = None
    target: Target | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Value / reference."""
        if self.value is None or not self.reference:
            return None
        return self.value / self.reference

    @property
    def compared(self) -> float | None:
        """The number that the target is about; None where a part of it is missing."""
        match self.target.of if self.target else "value":
            case "value":
                return self.value
            case "ratio":
                return self.ratio
            case "extra":
                return None if self.value is None or self.reference is None else self.value - self.reference

    @property
    def verdict(self) -> str:
        """reached, missed, not measured, or "" without a target."""
        if self.target is None:
            return "" if self.value is not None else "not measured"
        compared = self.compared
        if compared is None:
            return "not measured"
        return "reached" if self.target.met_by(compared) else "MISSED"

    def cells(self) -> list[str]:
        """Name, value, reference, ratio, target and verdict, as text."""
        against = f"{number(self.reference)} ({self.against})" if self.reference is not None else self.against
        target = self.target.text(self.unit, self.against) if self.target else ""
        shown = "not run" if self.value is None else f"{number(self.value)} {self.unit}".rstrip()
        return [self.name, shown, against, number(self.ratio), target, self.verdict, self.note]

    def to_json(self) -> dict[str, Any]:
        """For `of`."""
        return asdict(self)

    @staticmethod
    def of(data: dict[str, Any]) -> Figure:
        """Out of what `to_json` gave."""
        target = data.get("target")
        return Figure(**(data | {"target": Target(**target) if target else None}))


HEAD = ["", "measured", "reference", "ratio", "target", "", "note"]


def number(value: float | None) -> str:
    """Three digits that count; "" for None."""
    if value is None:
        return ""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def lines(figures: Iterable[Figure]) -> list[str]:
    """For a terminal, a line a figure."""
    out: list[str] = []
    for figure in figures:
        name, shown, against, ratio, target, verdict, note = figure.cells()
        parts = [f"  {name:58} {shown:>14}"]
        parts += [f"reference {against}, ratio {ratio or '?'}"] if against else []
        parts += [f"target {target}: {verdict}"] if target else ([verdict] if verdict else [])
        parts += [note] if note else []
        out.append("; ".join(parts))
    return out
