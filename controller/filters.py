"""A job's filters at the server: on what a gather sends, and on each result before it is used.

They run in the job's process. A gather's filters run once, whatever the number of its sites, on a model of their own:
the global one is never changed. Results that are to be filtered come singly, as files or bytes, never as partials.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..serialization.component import Component
from ..serialization.errors import FedloomError, JobError
from ..serialization.filters import FilterContext, apply_filters, filter_traceback
from ..serialization.jobspec import FilterSpec, JobSpec, Point
from ..serialization.jobvars import substitute
from ..serialization.messages import PayloadRef
from ..serialization.model import FLModel
from ..serialization.payload import decode_model, encode_model
from .gather import Gather, Result

if TYPE_CHECKING:
    from .federation import Federation

_SERVER = "server"


def filled(spec: JobSpec, job: str, app_dir: Path) -> JobSpec:
    """The job with what ``{SITE_NAME}`` and its like stand for at the server in its components and settings."""
    variables = {"SITE_NAME": _SERVER, "JOB_ID": job, "WORKSPACE": str(app_dir)}

    def fill(component: Component) -> Component:
        return replace(component, args=substitute(component.args, variables, f"component {component.path}"))

    def fill_all(specs: tuple[FilterSpec, ...]) -> tuple[FilterSpec, ...]:
        return tuple(replace(one, filters=tuple(fill(item) for item in one.filters)) for one in specs)

    return replace(
        spec,
        workflows=tuple(fill(item) for item in spec.workflows),
        components=tuple(fill(item) for item in spec.components),
        server_output=fill_all(spec.server_output),
        server_input=fill_all(spec.server_input),
        server_extra=substitute(spec.server_extra, variables, "the server's config"),
    )


class ServerFilters:
    """The job's filters by task name.

    Raises (each of its methods that runs filters):
        JobError: a filter raised; the message is its traceback and names it.
    """

    def __init__(self, fed: Federation, spec: JobSpec) -> None:
        self._fed = fed
        self._spec = spec

    def on_results(self, task: str) -> bool:
        """Whether results of this task are filtered before they are used."""
        return bool(self._spec.filters_for("server_input", task))

    def outgoing(self, model: FLModel | PayloadRef | None, *, task: str, round: int, step: int) -> Any:
        """What the sites are sent in place of this model: itself where no filter works on it."""
        chain = self._spec.filters_for("server_output", task)
        if not chain or model is None:
            return model
        if isinstance(model, PayloadRef):
            source = self._fed.fetch(model)
            model = decode_model(source if isinstance(source, Path) else bytearray(source), framework="numpy")
        return self._apply(chain, model, "server_output", task, round, step, _SERVER)

    def incoming(self, gather: Gather, result: Result) -> Result:
        """A single result as its filters left it, with its bytes inline; itself where there are none."""
        opening = gather.opening
        chain = self._spec.filters_for("server_input", opening.name)
        if not chain or result.partial:
            return result
        source = self._fed.fetch(result.payload) if result.payload is not None else bytearray(result.inline)
        item = result.items[0]
        model = decode_model(
            source if isinstance(source, Path) else bytearray(source), framework="numpy", meta=item.meta
        )
        round = opening.round - self._fed.first_round
        passed = self._apply(chain, model, "server_input", opening.name, round, opening.step, item.site)
        encoded = encode_model(passed)
        return replace(
            result, items=(replace(item, meta=encoded.meta, payload=None),), payload=None, inline=encoded.tobytes()
        )

    def _apply(
        self, chain: Sequence[Component], model: FLModel, point: Point, task: str, round: int, step: int, site: str
    ) -> FLModel:
        text = f"{self._fed.seed}|{point}|{task}|{round}|{step}|{site}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"fedloom-filter").digest(), "big") >> 1
        context = FilterContext(point, str(self._fed.job), task, round, site, seed)
        try:
            return apply_filters(chain, model, context)
        except Exception as error:
            if isinstance(error, FedloomError) and not isinstance(error, JobError):
                raise
            where = f"{point} filters ({', '.join(one.path for one in chain)}) of task {task!r}, round {round}, {site}"
            raise JobError(f"{where}:\n{filter_traceback(error)}") from error
