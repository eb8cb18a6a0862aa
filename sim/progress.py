"""What a simulation shows: live on a terminal, a line a round elsewhere, and at the end a table and the files."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["Reporter", "View", "make_reporter", "metrics_text", "print_summary", "round_line"]

#: Metrics shown of a round; all of them are in metrics.jsonl.
MAX_METRICS = 3
#: Rounds in the table at the end; of more, the first and the last ones.
MAX_TABLE_ROUNDS = 40

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class View:
    """How far the run is. ``round`` counts committed rounds; ``done`` of ``tasks`` are those of the one under way."""

    status: str = ""
    round: int = 0
    rounds: int = 0
    done: int = 0
    tasks: int = 0
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    bytes_s: float = 0.0


class Reporter(Protocol):
    """Where progress goes. `close` leaves the terminal as it was, and may be called twice."""

    def show(self, view: View) -> None:
        """The state now; called a few times a second."""
        ...

    def round_done(self, record: Record, rounds: int) -> None:
        """A round was committed."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line of its own."""
        ...

    def close(self) -> None:
        """Nothing more is shown."""
        ...


def make_reporter(stream: IO[str], *, key_metric: str = "accuracy", live: bool | None = None) -> Reporter:
    """Live bars where ``stream`` is a terminal (or ``live`` says so), else a line a round."""
    if live is None:
        live = stream.isatty()
    if live:
        return LiveReporter(stream, key_metric)
    return LineReporter(stream, key_metric)


class SilentReporter:
    """Shows nothing."""

    def show(self, view: View) -> None:
        """Nothing."""

    def round_done(self, record: Record, rounds: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class LineReporter:
    """A line a round, for logs and pipes."""

    def __init__(self, stream: IO[str], key_metric: str) -> None:
        self._stream = stream
        self._key_metric = key_metric

    def show(self, view: View) -> None:
        """Nothing: the rounds' lines say enough."""

    def round_done(self, record: Record, rounds: int) -> None:
        """One line."""
        self.note(round_line(record, rounds, self._key_metric))

    def note(self, text: str) -> None:
        """One line."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing to restore."""


class LiveReporter:
    """One moving line below the rounds' lines. The cursor is given back in `close`."""

    def __init__(self, stream: IO[str], key_metric: str) -> None:
        from rich.console import Console
        from rich.live import Live

        self._key_metric = key_metric
        self._console = Console(file=stream, highlight=False)
        self._view = View()
        self._started = time.monotonic()
        # its own refresh thread keeps the clock moving; stdout and stderr of the user's program stay the user's
        self._live = Live(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=8,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()
        self._open = True

    def show(self, view: View) -> None:
        """Move the line."""
        self._view = view

    def round_done(self, record: Record, rounds: int) -> None:
        """A line that stays."""
        self.note(round_line(record, rounds, self._key_metric))

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the moving line away and show the cursor again."""
        if self._open:
            self._open = False
            self._live.stop()

    def _render(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        view = self._view
        row = Table.grid(padding=(0, 1))
        total = max(1, view.rounds * max(1, view.tasks))
        done = min(total, view.round * max(1, view.tasks) + (view.done if view.round < view.rounds else 0))
        cells: list[RenderableType] = [progress_text(view), ProgressBar(total=total, completed=done, width=24)]
        cells += [text for text in (metrics_text(view.metrics, self._key_metric), rate_text(view.bytes_s)) if text]
        cells.append(clock_text(time.monotonic() - self._started))
        row.add_row(*cells)
        return row


def progress_text(view: View) -> str:
    """``round 3/10  5/8 sites``, or what the run waits for."""
    if not view.rounds:
        return view.status.lower() or "starting"
    current = min(view.round + 1, view.rounds)
    sites = f"  {view.done}/{view.tasks} sites" if view.tasks else ""
    return f"round {current}/{view.rounds}{sites}"


def round_line(record: Record, rounds: int, key_metric: str = "accuracy") -> str:
    """``round 3/10: 8 sites, accuracy 0.9120, 3.2 MB/s, 1.20 s``, and what went wrong in it."""
    seconds = float(record.get("seconds") or 0.0)
    if evaluation := cast("dict[str, Any] | None", record.get("evaluation")):
        return evaluation_line(record, evaluation, key_metric)
    parts = [f"{record.get('results', 0)} sites"]
    parts += [
        text for text in (metrics_text(record.get("metrics") or {}, key_metric), rate_text(rate_of(record))) if text
    ]
    parts.append(f"{seconds:.2f} s")
    if failures := cast("list[Any]", record.get("failures") or []):
        parts.append(f"{len(failures)} failed")
    return f"round {int(record.get('round', 0)) + 1}/{rounds}: {', '.join(part for part in parts if part)}"


def evaluation_line(record: Record, evaluation: dict[str, Any], key_metric: str) -> str:
    """``evaluation 2/5: site-1 at 3 sites, accuracy 0.9120, 0.20 s``, the mean over the sites; first, what will be."""
    if "model" not in evaluation:
        return f"evaluation: {evaluation.get('of')} steps at {evaluation.get('sites')} sites"
    parts = [
        f"{evaluation['model']} at {record.get('results', 0)} sites",
        metrics_text(record.get("metrics") or {}, key_metric),
        f"{float(record.get('seconds') or 0.0):.2f} s",
    ]
    if failures := cast("list[Any]", record.get("failures") or []):
        parts.append(f"{len(failures)} failed")
    return f"evaluation {evaluation.get('step')}/{evaluation.get('of')}: {', '.join(part for part in parts if part)}"


def metrics_of(record: Record) -> dict[str, Any]:
    """The record's aggregated metrics."""
    return cast("dict[str, Any]", record.get("metrics") or {})


def rate_of(record: Record) -> float:
    """Bytes a second of a round's results."""
    seconds = float(record.get("seconds") or 0.0)
    return float(record.get("bytes") or 0) / seconds if seconds > 0 else 0.0


def rate_text(bytes_s: float) -> str:
    """``12.3 MB/s``; nothing where nothing moved."""
    return f"{bytes_s / 1e6:.1f} MB/s" if bytes_s > 0 else ""


def metrics_text(metrics: dict[str, Any], key_metric: str) -> str:
    """``accuracy 0.9120, loss 0.3120``: the key metric first, then the others by name."""
    return ", ".join(f"{name} {number_text(metrics[name])}" for name in _by_weight(metrics, key_metric))


def _by_weight(names: Iterable[str], key_metric: str) -> list[str]:
    return sorted(names, key=lambda name: (name != key_metric, name))[:MAX_METRICS]


def number_text(value: Any) -> str:
    """Four decimals where those say something, else four significant digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or not value else f"{value:.4g}"


def clock_text(seconds: float) -> str:
    """``1:02``, ``1:00:05``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def print_summary(
    stream: IO[str], records: Sequence[Record], rounds: int, files: Sequence[Path], key_metric: str = "accuracy"
) -> None:
    """The table of rounds, and where the results are."""
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    if trained := [record for record in records if "evaluation" not in record]:
        _print_table(console, trained, rounds, key_metric)
    for path in files:
        console.print(str(path), markup=False, soft_wrap=True)


def _print_table(console: Console, records: Sequence[Record], rounds: int, key_metric: str) -> None:
    from rich import box
    from rich.table import Table

    names = _by_weight({name for record in records for name in metrics_of(record)}, key_metric)
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("round", "sites", *names, "MB/s", "seconds"):
        table.add_column(title, justify="right")
    for record in _some(records):
        if record is None:
            table.add_row("...")
            continue
        metrics = metrics_of(record)
        table.add_row(
            f"{int(record.get('round', 0)) + 1}/{rounds}",
            str(record.get("results", "")),
            *(number_text(metrics[name]) if name in metrics else "" for name in names),
            f"{rate_of(record) / 1e6:.1f}",
            f"{float(record.get('seconds') or 0.0):.2f}",
        )
    console.print(table)


def _some(records: Sequence[Record]) -> list[Record | None]:
    if len(records) <= MAX_TABLE_ROUNDS:
        return list(records)
    half = MAX_TABLE_ROUNDS // 2
    return [*records[:half], None, *records[-half:]]
