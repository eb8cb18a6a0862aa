"""The `fedloom` command: its subcommands, and nothing that takes time to import."""

from __future__ import annotations

from typing import Annotated

import typer

from . import jobs, letters, services, sim, status

app = typer.Typer(
    name="fedloom",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich alone takes longer to import than all of this
    pretty_exceptions_enable=False,
    help="Federated learning as a message-queue, event-driven pipeline.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from ... import __version__

        typer.echo(f"fedloom {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Federated learning as a message-queue, event-driven pipeline."""


app.command("broker")(services.broker)
app.command("controller")(services.controller)
app.command("executor")(services.executor)
app.command("sim")(sim.sim)
letters.join(jobs.app)
app.add_typer(jobs.app, name="job")
app.command("status")(status.status)
