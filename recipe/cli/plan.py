"""What `fedloom sim --plan` prints, and how it ends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer

from .common import DONE, WRONG_USE, print_json

if TYPE_CHECKING:
    from ...sim.planning.figures import Plan
    from ..overrides import Overrides


def plan_folder(folder: Path, overrides: Overrides) -> Plan:
    """The plan of a job folder's simulation."""
    from ..planning import plan_job
    from ..simulate import SimOptions

    return plan_job(SimOptions().overridden(overrides), folder=folder)


def show_plan(plan: Plan, as_json: bool, out: TextIO | None = None) -> int:
    """Print it; the exit code: 2 where it does not fit, with the reasons on standard error."""
    from ...sim.planning.report import advice, plan_text

    if as_json:
        print_json(plan.to_json(), out)
    else:
        typer.echo(plan_text(plan), file=out)
    for reason in plan.reasons:
        typer.echo(f"error: {plan.job} does not fit: {reason}", err=True)
    if advised := advice(plan):
        typer.echo(f"  {advised}", err=True)
    return DONE if plan.fits else WRONG_USE
