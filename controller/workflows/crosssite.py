"""Evaluation without training: the server's models, and the sites' own, scored on every site's data."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from ...serialization.errors import GatherError, JobError
from ...serialization.jobspec import CUSTOM_DIR, check_site_name
from ...serialization.messages import CloseRule, PayloadRef
from ...serialization.model import FLModel, flatten
from ..checkpoints import check_travelling, fit, read_checkpoint
from ..federation import Federation
from ..gather import Gather, Result
from ..workflow import Workflow
from .evalplan import SERVER, EvalMemory, EvalPlan, Step, in_order
from .scores import Answer, Failed, column_record

log = structlog.get_logger(__name__)

#: Sites' models that are in the spool at once, where its quota allows it.
MOST_HELD = 16
#: Where a model of the server's comes from; anything else is a file in the job's app folder.
_LAST, _BEST = "@last", "@best"


class _Asked(NamedTuple):
    """A gather, and what came of it for every site that was asked."""

    gather: Gather
    answers: dict[str, Answer]


class GlobalModelEval(Workflow):
    """Have the server's models scored at every site, one model after another.

    The models are the job's last global model (``SRV_model`` in the matrix), the best one (``SRV_best_model``) where
    there is one, and those of ``models``. A site that fails has its traceback in the matrix, and the others their
    scores; a job in which no site has scored anything fails.

    Args:
        validation_timeout: seconds for all sites together to score a model; 0: no limit.
        participating_clients: the sites; None: those that the job names, or all that are connected or took part.
        models: further models of the server's: name to a checkpoint's file in the job (`read_checkpoint` has the
            formats), or by an absolute path where the controller runs.
        initial_model: file name of a model in the job's app folder, which becomes the job's global model if no workflow
            before has made one.
        initial_ckpt: a checkpoint, as in ``models``, that is the model instead; it has to fit ``initial_model``.
        min_clients: wait until so many sites are connected, where none are named.
        sites_s: for so long, as for a site that is away to return.
        sites_at_once: sites that score a model at once; their scores have to fit into one record.
        validate_task: the task's name.

    Raises:
        JobError: an option out of its range.
    """

    def __init__(
        self,
        *,
        validation_timeout: float = 6000.0,
        participating_clients: Sequence[str] | None = None,
        models: Mapping[str, str] | None = None,
        initial_model: str | None = None,
        initial_ckpt: str | None = None,
        min_clients: int = 1,
        sites_s: float = 60.0,
        sites_at_once: int = 100,
        validate_task: str = "validate",
    ) -> None:
        self.validation_timeout = _seconds(validation_timeout, "validation_timeout")
        self.participating_clients = tuple(check_site_name(site) for site in participating_clients or ())
        if participating_clients is not None and len(set(self.participating_clients)) != len(participating_clients):
            raise JobError(f"participating_clients={list(participating_clients)} names a site twice")
        if participating_clients is not None and not participating_clients:
            raise JobError("participating_clients=[]: nobody would evaluate; name sites, or None for all")
        if min_clients < 1 or sites_at_once < 1:
            raise JobError(f"min_clients={min_clients}, sites_at_once={sites_at_once}: both are at least 1")
        self.models = dict(models or {})
        self.initial_model = initial_model
        self.initial_ckpt = initial_ckpt
        self.min_clients = min_clients
        self.sites_s = sites_s
        self.sites_at_once = sites_at_once
        self.validate_task = validate_task

    def run(self, fed: Federation) -> None:
        """All steps that are not committed yet."""
        state = fed.state()
        memory = self._begin(fed) if state is None else EvalMemory.of(state)
        submitted: _Asked | None = None
        for step in islice(memory.plan.steps(), fed.next_round - 1, None):
            if step.owner and (submitted is None or step.owner not in submitted.answers):
                submitted = self._submissions(fed, step, memory.plan)
            self._score(fed, step, memory, submitted if step.owner else None)
        if not memory.good:
            raise GatherError(memory.first or "there is no model that a site could score")

    # ------------------------------------------------------------ the plan

    def _begin(self, fed: Federation) -> EvalMemory:
        """Fix who scores what, in a commit of its own: sites come and go, the spool fills."""
        sites = self.participating_clients or in_order(fed.sites(self.min_clients, self.sites_s))
        models: list[tuple[str, str]] = []
        last = fed.commit_ref
        model = (last.model if last is not None else None) or self._initial(fed)
        if model is not None:
            models.append(("model", _LAST))
        if last is not None and last.best is not None:
            models.append(("best_model", _BEST))
        models += sorted(self.models.items())
        plan = EvalPlan(sites, tuple(models), self._owners(sites), self._batch(fed), self.sites_at_once)
        if plan.rounds == 1:
            raise JobError(
                f"{type(self).__name__}: there is no model to evaluate: run it behind a training workflow, or give it"
                " initial_model or models"
            )
        memory = EvalMemory(plan)
        record: dict[str, Any] = {
            "round": fed.first_round,
            "metrics": {},
            "results": 0,
            "tasks": 0,
            "bytes": 0,
            "seconds": 0.0,
            "failures": [],
            "evaluation": {"sites": len(sites), "models": len(models), "of": plan.rounds - 1},
        }
        if model is not None:
            fed.commit(model, round=0, record=record, state=memory.encode())
        else:
            fed.commit_state(round=0, record=record, state=memory.encode())
        log.info("evaluation_planned", job=fed.job, sites=len(sites), server_models=len(models), steps=plan.rounds - 1)
        return memory

    def _owners(self, sites: Sequence[str]) -> tuple[str, ...]:
        """The sites whose own models are scored too."""
        del sites
        return ()

    def _batch(self, fed: Federation) -> int:
        """How many sites' models may be in the spool at once: half of its room, at the size of the global model."""
        spool = fed.spool()
        if not spool.quota_bytes:
            return MOST_HELD
        size = fed.commit_ref.model.size if fed.commit_ref is not None and fed.commit_ref.model is not None else 0
        return max(1, min(MOST_HELD, spool.room_bytes // (2 * size))) if size else 1

    # ------------------------------------------------------------ a step

    def _score(self, fed: Federation, step: Step, memory: EvalMemory, submitted: _Asked | None) -> None:
        started_at = time.monotonic()
        number = fed.first_round + step.round
        own = submitted.answers[step.owner] if submitted is not None else None
        answers: dict[str, Answer] = {}
        if isinstance(own, Failed):
            memory.first = memory.first or own.line(step.owner, number, "submit_model")
        else:
            if own is not None and submitted is not None:
                # a small model that came within its message is put for this step alone: each commit lets go of it
                payload = fed.hand_on(fed.filters.incoming(submitted.gather, own))
            else:
                payload = self._server_model(fed, step, memory.plan)
            timeout_s = self.validation_timeout
            asked = self._ask(fed, self.validate_task, payload, step.sites, step.round, timeout_s, memory.plan)
            for site, answer in asked.answers.items():
                answers[site] = answer if isinstance(answer, Failed) else fed.filters.incoming(asked.gather, answer)
        record = column_record(
            memory.plan,
            step,
            answers,
            number=number,
            task=self.validate_task,
            started_at=started_at,
            submitted=own if isinstance(own, Failed) else None,
        )
        memory.good += record["results"]
        for site, answer in answers.items():
            if isinstance(answer, Failed):
                memory.first = memory.first or answer.line(site, number, self.validate_task)
        fed.commit_state(round=step.round, record=record, state=memory.encode())

    def _server_model(self, fed: Federation, step: Step, plan: EvalPlan) -> PayloadRef:
        source = next(source for name, source in plan.models if step.model == SERVER + name)
        commit = fed.commit_ref
        if source in (_LAST, _BEST):
            ref = None if commit is None else commit.model if source == _LAST else commit.best
            assert ref is not None, "the plan's commit has it"
            return ref
        params = self._read(fed, source, f"models[{step.model.removeprefix(SERVER)!r}]")
        return fed.put_model(FLModel(params=params))

    def _initial(self, fed: Federation) -> FLModel | None:
        """The job's model before any workflow has made one."""
        model = fed.model(self.initial_model) if self.initial_model is not None else None
        if self.initial_ckpt is None:
            return model
        params = self._read(fed, self.initial_ckpt, "initial_ckpt")
        return FLModel(params=params if model is None else fit(params, flatten(model.params)[0], "initial_ckpt"))

    @staticmethod
    def _read(fed: Federation, name: str, what: str) -> dict[str, Any]:
        """A checkpoint that the job names: with its code, beside its configuration, or by its absolute path."""
        path = Path(name)
        if not path.is_absolute():
            check_travelling(path, what)
            beside = fed.app_dir / path
            path = beside if beside.is_file() else fed.app_dir / CUSTOM_DIR / path
        return read_checkpoint(path, what)

    def _submissions(self, fed: Federation, step: Step, plan: EvalPlan) -> _Asked | None:
        """The models of the sites of a step's batch."""
        del fed, step, plan
        return None

    def _ask(
        self,
        fed: Federation,
        task: str,
        model: PayloadRef | None,
        sites: Sequence[str],
        round: int,
        timeout_s: float,
        plan: EvalPlan,
    ) -> _Asked:
        """One task for each of the sites; every one of them has an answer or a reason, in their order."""
        rule = CloseRule(min_clients=1, deadline_s=timeout_s or None, sites_s=self.sites_s)
        config = {"answer": "params" if model is None else "metrics", "total_rounds": plan.rounds}
        gather = fed.gather(task, model, round=round, sites=sites, rule=rule, config=config)
        results: dict[str, Result] = {}
        try:
            for result in gather:
                results[result.site] = result
        except GatherError as error:  # nobody has answered, which is theirs and not the job's end
            log.warning("evaluation_unanswered", job=fed.job, task=task, reason=str(error).partition("\n")[0])
        failures = {str(failure.site): Failed(failure.code, failure.text) for failure in gather.failures}
        late = Failed("timeout", f"no answer within {timeout_s:g} s")
        return _Asked(gather, {site: results.get(site) or failures.get(site) or late for site in sites})


class CrossSiteEval(GlobalModelEval):
    """Have every site's own model, and the server's, scored at every site.

    A site's model is asked for by the task ``submit_model``, which comes without params, and goes on to the other
    sites as it lies in the spool. At most `MOST_HELD` models are there at once, fewer where the quota is small.

    Args:
        submit_model_timeout: seconds for the sites of a batch to give their models; 0: no limit.
        submit_task: that task's name.
        options: those of `GlobalModelEval`.

    Raises:
        JobError: an option out of its range.
    """

    def __init__(
        self,
        *,
        submit_model_timeout: float = 600.0,
        submit_task: str = "submit_model",
        validation_timeout: float = 6000.0,
        participating_clients: Sequence[str] | None = None,
        models: Mapping[str, str] | None = None,
        initial_model: str | None = None,
        initial_ckpt: str | None = None,
        min_clients: int = 1,
        sites_s: float = 60.0,
        sites_at_once: int = 100,
        validate_task: str = "validate",
    ) -> None:
        super().__init__(
            validation_timeout=validation_timeout,
            participating_clients=participating_clients,
            models=models,
            initial_model=initial_model,
            initial_ckpt=initial_ckpt,
            min_clients=min_clients,
            sites_s=sites_s,
            sites_at_once=sites_at_once,
            validate_task=validate_task,
        )
        self.submit_model_timeout = _seconds(submit_model_timeout, "submit_model_timeout")
        self.submit_task = submit_task

    def _owners(self, sites: Sequence[str]) -> tuple[str, ...]:
        return tuple(sites)

    def _submissions(self, fed: Federation, step: Step, plan: EvalPlan) -> _Asked | None:
        """The models of a step's batch. Asked for again after a crash, they are those that are in the spool."""
        timeout_s = self.submit_model_timeout
        asked = self._ask(fed, self.submit_task, None, step.batch, step.held, timeout_s, plan)
        return _Asked(asked.gather, {site: _whole(site, answer) for site, answer in asked.answers.items()})


def _whole(site: str, answer: Answer) -> Answer:
    """A site's answer to submit_model, if there is a model in it."""
    if isinstance(answer, Failed):
        return answer
    kind = answer.meta.get("params_type")
    if kind == "FULL":
        return answer
    seen = "no params" if kind is None else f"params of type {kind}"
    return Failed("no_model", f"{site} submitted {seen}; its own model belongs there, as whole values")


def _seconds(value: float, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise JobError(f"{what}={value!r}; seconds of at least 0 belong here, 0 for no limit")
    return float(value)
