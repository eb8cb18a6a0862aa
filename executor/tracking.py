"""Writers in the manner of TensorBoard, MLflow and Weights & Biases: what a script logs goes to the job.

The names are those that scripts know; nothing of those packages is needed at a site. Where it ends up is the recipe's
affair, see `fedloom.recipe.add_experiment_tracking` and docs/guides/tracking.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from .client_api import current
from .client_context import ClientError


class _Writer:
    """What the writers share: a job may have several, and each needs nothing but `fedloom.client.init()` before it."""

    @staticmethod
    def _write(key: str, value: Any, data_type: str, step: int | None = None, extra: Mapping[str, Any] | None = None):
        given = dict(extra or {})
        if step is not None:
            given["global_step"] = step
        current().log(key, value, data_type, given)

    def flush(self) -> None:
        """Send what waits; it would leave within a fifth of a second by itself."""
        current().flush()

    def close(self) -> None:
        """The same as `flush`: a writer holds nothing."""
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()


class SummaryWriter(_Writer):
    """TensorBoard's way of logging.

    >>> writer = SummaryWriter()
    >>> writer.add_scalar("loss", 0.25, global_step=epoch)
    """

    def add_scalar(self, tag: str, scalar: Any, global_step: int | None = None, **kwargs: Any) -> None:
        """Log a number (of Python, numpy or torch).

        Args:
            global_step: its place on the curve; left out, the points of a tag count 0, 1, 2.
            kwargs: ``walltime``, in seconds since 1970; more is kept with the point.

        Raises:
            ClientError: no number.
        """
        self._write(tag, scalar, "SCALAR", global_step, kwargs)

    def add_scalars(self, tag: str, scalars: Mapping[str, Any], global_step: int | None = None, **kwargs: Any) -> None:
        """Log several numbers under one tag; TensorBoard shows them as ``tag/name``."""
        self._write(tag, _map(scalars, "add_scalars"), "SCALARS", global_step, kwargs)

    def add_text(self, tag: str, text_string: str, global_step: int | None = None, **kwargs: Any) -> None:
        """Log a text of up to 16 KiB."""
        self._write(tag, str(text_string), "TEXT", global_step, kwargs)


class MLflowWriter(_Writer):
    """MLflow's way of logging."""

    def log_param(self, key: str, value: Any) -> None:
        """Log one parameter."""
        self._write(key, _text(value), "PARAMETER")

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log parameters."""
        self._write("params", {key: _text(value) for key, value in _map(values, "log_params").items()}, "PARAMETERS")

    def log_metric(self, key: str, value: Any, step: int | None = None) -> None:
        """Log one number."""
        self._write(key, value, "METRIC", step)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log several numbers."""
        self._write("metrics", _map(metrics, "log_metrics"), "METRICS", step)

    def log_text(self, text: str, artifact_file_path: str) -> None:
        """Log a text of up to 16 KiB, which becomes an artifact of that name."""
        self._write(artifact_file_path, str(text), "TEXT", extra={"artifact": True})

    def set_tag(self, key: str, tag: Any) -> None:
        """Set one tag."""
        self._write(key, str(tag), "TAG")

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags."""
        self._write("tags", {key: str(tag) for key, tag in _map(tags, "set_tags").items()}, "TAGS")


class WandBWriter(_Writer):
    """Weights & Biases' way of logging."""

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log several numbers."""
        self._write("metrics", _map(metrics, "log"), "METRICS", step)


def _map(values: Any, call: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ClientError(f"{call}({type(values).__name__}): a dict of names and values belongs here")
    return {str(name): value for name, value in cast("Mapping[Any, Any]", values).items()}


def _text(value: Any) -> Any:
    """A parameter as MLflow keeps it: numbers as they are, all else as its text."""
    if isinstance(value, Path) or not (isinstance(value, (bool, int, float, str)) or hasattr(value, "item")):
        return str(value)
    return value
