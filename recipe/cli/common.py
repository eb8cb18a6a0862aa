"""What all commands share: exit codes, one clear line for an error, JSON for machines, options with one meaning."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, ParamSpec, TextIO, TypeVar

import typer

from ...serialization.errors import (
    FaultError,
    FedloomError,
    JobError,
    LinkError,
    LinkTimeout,
)

DONE, FAILED, WRONG_USE, UNREACHABLE, TIMED_OUT, INTERRUPTED = 0, 1, 2, 3, 4, 130
#: Faults that say that the question was wrong, not that the broker would not.
_WRONG_USE_FAULTS = frozenset({"unknown_job", "unknown_payload"})

P = ParamSpec("P")
R = TypeVar("R")

Broker = Annotated[
    str | None, typer.Option("--broker", envvar="FEDLOOM_BROKER", help="The broker's endpoint.", metavar="ENDPOINT")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
LogLevel = Annotated[
    str | None, typer.Option("-l", "--log-level", metavar="LEVEL", help="debug, info, warning, error or critical.")
]
LogFormat = Annotated[str | None, typer.Option("--log-format", metavar="FORMAT", help="text, or json for a line each.")]
Compat = Annotated[
    str | None,
    typer.Option(
        "--compat",
        envvar="FEDLOOM_COMPAT",
        metavar="NAME",
        help="nvflare: scripts that import nvflare get fedloom, unchanged.",
    ),
]
ConnectTimeout = Annotated[
    float, typer.Option("--connect-timeout", metavar="SECONDS", min=0.0, help="How long to wait for the broker.")
]


def exit_code(error: BaseException) -> int:
    """The exit code that stands for an error."""
    match error:
        case KeyboardInterrupt():
            return INTERRUPTED
        case LinkTimeout():
            return TIMED_OUT
        case FaultError() if error.code in _WRONG_USE_FAULTS:
            return WRONG_USE
        case LinkError() | FaultError():
            return UNREACHABLE
        case JobError():
            return WRONG_USE
        case _:
            return FAILED


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Turn errors raised on purpose into one line on standard error and an exit code; others are bugs and are shown."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except FedloomError as error:
            fail(error)
        except KeyboardInterrupt as stop:
            typer.echo("interrupted", err=True)
            for note in getattr(stop, "__notes__", ()):
                typer.echo(f"  {note}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # whoever read our output has stopped: `fedloom job list | head`
            sys.stderr.close()
            raise typer.Exit(DONE) from None

    return guarded


def fail(error: FedloomError) -> NoReturn:
    """Say what is wrong, and exit."""
    show_error(error)
    raise typer.Exit(exit_code(error)) from None


def show_error(error: FedloomError) -> None:
    """An error and its notes on standard error, without a traceback of ours."""
    typer.echo(f"error: {error}", err=True)
    for note in getattr(error, "__notes__", ()):
        typer.echo(f"  {note}", err=True)


def enable_compat(name: str | None) -> None:
    """Let user code import fedloom by another library's names, if it is asked for; say what that hides.

    Raises:
        JobError: no such library is known.
    """
    if not name:
        return
    from ...executor.compat import enable

    if note := enable(name):
        typer.echo(f"note: {note}", err=True)


def print_json(value: Any, out: TextIO | None = None) -> None:
    """One JSON object on standard output."""
    typer.echo(json.dumps(value), file=out)


def print_table(columns: list[str], rows: list[list[str]], empty: str) -> None:
    """A table for people, or a line where there is nothing to show."""
    if not rows:
        typer.echo(empty)
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False).print(table)
