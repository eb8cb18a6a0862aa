"""What the sites said of one model, as a round's record: the matrix is put together from these."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from ...serialization.codec import pack
from ...serialization.errors import JobError
from ..gather import Result
from ..records import MAX_RECORD_BYTES
from .evalplan import EvalPlan, Step

#: Characters of a failure's text, as many as fit with all others.
_TEXTS = (2000, 500, 100, 0)


@dataclass(frozen=True, slots=True)
class Failed:
    """A site that gave no result: what happened in a word, and its traceback or a sentence."""

    code: str
    text: str

    def line(self, site: str, round: int, task: str) -> str:
        """As a gather's error names a failed site, which is how a run finds it in a job's reason."""
        return f"round {round}, {task}: no site has scored any model\n{site}: {self.code}\n{self.text[-_TEXTS[0] :]}"


Answer = Result | Failed


def scores_of(answer: Answer, site: str, model: str) -> dict[str, Any] | Failed:
    """The metrics of a site's answer; numbers that are not finite are the text "nan", "inf" or "-inf"."""
    if isinstance(answer, Failed):
        return answer
    said = answer.meta.get("metrics")
    if not isinstance(said, dict) or not said:
        return Failed("no_metrics", f"{site} answered the validation of {model} without metrics")
    return cast("dict[str, Any]", said)


def column_record(
    plan: EvalPlan,
    step: Step,
    answers: Mapping[str, Answer],
    *,
    number: int,
    task: str,
    started_at: float,
    submitted: Failed | None = None,
) -> dict[str, Any]:
    """The record of a step.

    ``scores`` has an entry for each of its sites: the metrics, or ``{"failed": {"code"}}`` with the text among the
    ``failures``. ``metrics`` are the means over the sites, each of which counts once.

    Args:
        number: the step's number among the job's rounds.
        submitted: why the owner has not given its model, in which case nobody was asked to score it.

    Raises:
        JobError: scores that do not fit into a record. They are not cut: a matrix has every entry or none.
    """
    entries = {site: scores_of(answers[site], site, step.model) for site in step.sites if site in answers}
    failures = [(site, task, entry) for site, entry in entries.items() if isinstance(entry, Failed)]
    evaluation: dict[str, Any] = {"model": step.model, "owner": step.owner, "step": step.round, "of": plan.rounds - 1}
    if submitted is not None:
        evaluation["failed"] = {"code": submitted.code}
        failures += [(step.owner, "submit_model", submitted)] if step.part == 0 else []
    scores = {site: {"failed": {"code": e.code}} if isinstance(e, Failed) else e for site, e in entries.items()}
    results = [answer for answer in answers.values() if isinstance(answer, Result)]
    record: dict[str, Any] = {
        "round": number,
        "metrics": _means([entry for entry in entries.values() if not isinstance(entry, Failed)]),
        "results": len(entries) - sum(isinstance(entry, Failed) for entry in entries.values()),
        "tasks": len(answers),
        "bytes": sum(result.size for result in results),
        "seconds": round(time.monotonic() - started_at, 6),
        "state_lost": sorted(r.site for r in results if r.items[0].restarted),
        "evaluation": evaluation,
        "scores": scores,
        "failures": [],
    }
    size = 0
    for most in _TEXTS:
        record["failures"] = [
            {"site": site, "code": failed.code, "text": f"{what} {step.model}: {_tail(failed.text, most)}"}
            for site, what, failed in failures
        ]
        size = len(pack(record))
        if size <= MAX_RECORD_BYTES:
            return record
    raise JobError(
        f"the scores of {step.model} at {len(step.sites)} sites take {size} bytes; at most {MAX_RECORD_BYTES} make a"
        " record: answer validate with fewer metrics, or give the evaluation a smaller sites_at_once"
        f" ({plan.at_once} now)"
    )


def _tail(text: str, most: int) -> str:
    """A text's end, where a traceback says what happened."""
    return text if len(text) <= most else f"...{text[len(text) - most :]}"


def _means(entries: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of each metric over the entries that have it as a finite number."""
    values: dict[str, list[float]] = {}
    for entry in entries:
        for name, value in entry.items():
            if isinstance(value, int | float) and math.isfinite(value):
                values.setdefault(name, []).append(float(value))
    return {name: math.fsum(numbers) / len(numbers) for name, numbers in values.items()}
