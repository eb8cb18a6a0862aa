"""What a workflow works with: the committed model, gathers, commits. It keeps nothing that the broker does not have."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..broker.link import Link
from ..serialization import spans
from ..serialization.errors import GatherError, JobError
from ..serialization.jobspec import JobSpec
from ..serialization.messages import (
    Checkpoint,
    Claimed,
    CloseGather,
    CloseRule,
    Commit,
    CommitRef,
    Event,
    JobId,
    Message,
    OpenGather,
    PayloadRef,
    Receipt,
    Site,
)
from ..serialization.model import FLModel
from ..serialization.payload import decode_model
from .commits import Commits
from .filters import ServerFilters
from .gather import Gather, Result
from .inbox import Inbox
from .mailbox import QUIET_S, Mailbox
from .payloads import Payloads
from .questions import Questions, Spool

#: Without a broker for so long the job process gives up: whatever waits is told so. Its claim is lost by then and
#: another controller goes on.
GIVE_UP_S = 120.0


class Federation:
    """The sites of a job, as its workflow sees them.

    A job's workflows run one after another, and its rounds count through all of them. A workflow sees its own: they
    start at 0, and so do those that its sites are told.
    """

    def __init__(self, link: Link, inbox: Inbox, claimed: Claimed, spec: JobSpec, app_dir: Path) -> None:
        self.job: JobId = claimed.job
        self.claim = claimed.claim
        self.spec = spec
        self.seed = int(claimed.meta.get("seed", spec.seed))
        self.commit_ref: CommitRef | None = claimed.commit
        self.app_dir = app_dir
        self.link = link
        self.mail = Mailbox(link, inbox, self.job)
        self.filters = ServerFilters(self, spec)
        self._questions = Questions(link, self.job, GIVE_UP_S)
        sites = claimed.meta.get("sites") or spec.sites or ()
        self._sites: tuple[str, ...] = tuple(sites)
        #: which of the job's workflows runs, and the number in the job of its first round
        self.workflow = 0
        self.first_round = 0
        self._last_opened = -1
        self.payloads = Payloads(link, claimed, GIVE_UP_S)
        self._commits = Commits(link, self.payloads, GIVE_UP_S)

    def enter(self, workflow: int) -> bool:
        """Go on with the job's workflow of this number; False where a later one has committed: this one is over."""
        last = self.commit_ref
        if last is not None and workflow < last.workflow:
            return False
        self.workflow = workflow
        if last is not None and workflow == last.workflow:
            self.first_round = last.first
        else:  # behind all that was committed, and that a workflow without commits has opened
            self.first_round = max(self._last_opened, -1 if last is None else last.round) + 1
        return True

    @property
    def config(self) -> dict[str, Any]:
        """What else the server's config file holds: settings for the job's own code."""
        return dict(self.spec.server_extra)

    @property
    def site_count(self) -> int:
        """How many sites the job names; 0 if it takes whoever is connected."""
        return len(self._sites)

    def spool(self) -> Spool:
        """How full the broker's spool is."""
        return self._questions.spool()

    # ------------------------------------------------------------ models and rounds

    @property
    def next_round(self) -> int:
        """The number of this workflow's first round that is not committed."""
        own = self._own_commit
        return 0 if own is None else own.round + 1 - self.first_round

    def rounds(self, num_rounds: int) -> Iterator[int]:
        """The numbers of the rounds still to do: it starts at the first one that is not committed."""
        yield from range(self.next_round, num_rounds)

    @property
    def _own_commit(self) -> CommitRef | None:
        """The last commit, if this workflow has made it."""
        last = self.commit_ref
        return last if last is not None and last.workflow == self.workflow else None

    def model(self, initial: str | None = None) -> FLModel:
        """The last committed global model, or before the first commit the job's initial one.

        Args:
            initial: file name of the initial model in the job's app folder.

        Raises:
            JobError: there is no such file.
        """
        if self.commit_ref and self.commit_ref.model:
            return decode_model(self.link.fetch(self.commit_ref.model), framework="numpy")
        if not initial:
            raise JobError("the job has no initial model: give the recipe one (initial_model=...)")
        path = self.app_dir / initial
        if not path.is_file():
            raise JobError(f"the job's initial model {initial} is not in its app folder")
        return decode_model(path, framework="numpy")

    def mapped(self, ref: PayloadRef) -> FLModel | None:
        """A stored model as a mapping of its file, which is no memory of this process's own; None if it is remote."""
        path = self.payloads.local_path(ref)
        return None if path is None else decode_model(path, framework="numpy")

    def put_model(self, model: FLModel) -> PayloadRef:
        """Store a model at the broker, addressed by its content; what is there already is hashed, not sent."""
        ref = self.payloads.model(model)
        self.payloads.settle()
        return ref

    def put_blob(self, data: bytes) -> PayloadRef:
        """Store bytes at the broker, addressed by their content."""
        ref = self.payloads.blob(data)
        self.payloads.settle()
        return ref

    def fetch(self, ref: PayloadRef) -> Path | bytes:
        """A payload: a path that can be mapped, or its bytes."""
        began = spans.start()
        got = self.link.fetch(ref)
        spans.end("fetch", began)
        return got

    def state(self) -> FLModel | None:
        """What the ``state`` of this workflow's last commit was; None before the first."""
        own = self._own_commit
        if own is None or own.state is None:
            return None
        return decode_model(self.link.fetch(own.state), framework="numpy")

    def hand_on(self, result: Result) -> PayloadRef:
        """A site's result as what other sites get: its payload as it lies in the spool, until this round's commit."""
        if result.payload is not None:
            return result.payload
        return self.payloads.put([result.inline])

    # ------------------------------------------------------------ sites

    def sites(self, at_least: int = 1, wait_s: float = 60.0) -> tuple[str, ...]:
        """The sites that take part: those that the job names, else all that are connected or had tasks of it.

        Another process may see others: commit what has to stay the same.

        Args:
            at_least: wait until so many are connected.
            wait_s: but no longer than this.

        Raises:
            GatherError: too few are.
        """
        if self._sites:
            return self._sites
        deadline = time.monotonic() + wait_s
        pause_s = QUIET_S[0]
        while True:
            live = self._questions.live_sites()
            if len(live) >= at_least:
                return tuple(dict.fromkeys([*live, *self._questions.job_sites()]))
            left = deadline - time.monotonic()
            if left <= 0:
                raise GatherError(f"{len(live)} of {at_least} sites connected within {wait_s:g} s")
            self.mail.take(min(pause_s, left))
            pause_s = min(QUIET_S[1], 2 * pause_s)

    # ------------------------------------------------------------ gathers

    def gather(
        self,
        name: str,
        model: FLModel | PayloadRef | None,
        *,
        round: int,
        step: int = 0,
        sites: Sequence[str] = (),
        sample: int = 0,
        rule: CloseRule | None = None,
        fold: bytes | PayloadRef | None = None,
        partials: bool = False,
        config: dict[str, Any] | None = None,
    ) -> Gather:
        """Ask sites for one task each, and iterate over the answers as they come.

        Args:
            name: the task's name: "train", "evaluate", or one of your own.
            model: what the sites get, or what `put_model` gave for it; None for a task without a model.
            round, step: the key under which the gather is journaled, with ``name``. Opened again after a crash it
                returns what was recorded.
            sites: who takes part; empty: the job's sites, or every connected one.
            sample: draw so many of them, from (job seed, round, step); 0: all.
            rule: when it closes.
            fold: the fold plan's bytes or payload, with which pools may fold before they send (``partials``).
            config: plain data for the task.

        Raises:
            NondeterministicError: this key was opened before with another specification.
        """
        number = self.first_round + round
        self._last_opened = max(self._last_opened, number)
        began = spans.start()
        sent = self.filters.outgoing(model, task=name, round=round, step=step)
        opening = OpenGather(
            ref=0,
            job=self.job,
            claim=self.claim,
            round=number,
            step=step,
            name=name,
            rule=rule or CloseRule(),
            payload=self.payloads.model(sent) if isinstance(sent, FLModel) else sent,
            fold=self.payloads.blob(fold) if isinstance(fold, bytes) else fold,
            config=(config or {}) | ({"first_round": self.first_round} if self.first_round else {}),
            partials=partials and not self.filters.on_results(name),
            sample=sample,
            seed=self.seed,
        )
        gather = self.open(opening, tuple(sites) or self._sites)
        spans.end("open", began, round=number)
        self.settle()
        return gather

    def open(self, opening: OpenGather, sites: tuple[str, ...]) -> Gather:
        """Send an opening, behind a commit that is not answered yet; the broker's Receipt comes through the inbox."""
        opening = replace(opening, ref=self.link.next_ref(), behind=self._commits.under_way)
        gather = Gather(self, opening, sites)
        self.mail.expect(gather)
        self.link.send(*gather.message())
        return gather

    def close_gather(self, gather: Gather) -> None:
        """Ask for the end of a gather; its Receipt comes through the inbox."""
        while not gather.id:
            self.mail.pump(gather)
        answer = self._request(CloseGather(self.link.next_ref(), self.job, self.claim, gather.id))
        if isinstance(answer, Receipt):
            gather.on_receipt(answer)

    def checkpoint(self, gather: Gather, payload: PayloadRef, covered: int) -> None:
        """Make an aggregate durable; the payloads of the results it covers are freed in the same transaction."""
        self._request(Checkpoint(self.link.next_ref(), self.job, self.claim, gather.id, payload, covered))

    def commit(
        self,
        model: FLModel | PayloadRef,
        *,
        round: int,
        record: dict[str, Any] | None = None,
        state: FLModel | None = None,
        best: FLModel | PayloadRef | None = None,
        wait: bool = True,
    ) -> PayloadRef:
        """Make a round durable: model, state, record and round number become visible together.

        Args:
            model: the global model, or what `put_model` gave for it.
            best: the model that is the best so far, if that changed with this round.
            wait: False: it is durable when the next gather is opened, or at the workflow's end; they raise what this
                would have.

        Raises:
            FencedError: another controller has the job.
        """
        put = self.payloads.model
        best_ref = put(best) if isinstance(best, FLModel) else best
        state_ref = None if state is None else put(state)
        model_ref = put(model) if isinstance(model, FLModel) else model
        self._commit(round, model_ref, state_ref, best_ref, record or {})
        if wait:
            self.settle()
        return model_ref

    def commit_state(self, *, round: int, record: dict[str, Any], state: FLModel | None = None) -> None:
        """Make a round durable that leaves the global model, if there is one, as it is.

        Raises:
            FencedError: another controller has the job.
        """
        model_ref = self.commit_ref.model if self.commit_ref else None
        self._commit(round, model_ref, None if state is None else self.payloads.model(state), None, record)
        self.settle()

    def _commit(
        self,
        round: int,
        model: PayloadRef | None,
        state: PayloadRef | None,
        best: PayloadRef | None,
        record: dict[str, Any],
    ) -> None:
        number = self.first_round + round
        if self.workflow:  # the record's line stands among those of the whole job
            record = {**record, "round": number, "workflow": self.workflow}
        commit = Commit(
            ref=self.link.next_ref(),
            job=self.job,
            claim=self.claim,
            round=number,
            model=model,
            state=state,
            best=best is not None,
            best_model=best,
            record=record,
            workflow=self.workflow,
            first=self.first_round,
        )
        self._commits.begin(commit)
        kept_best = best or (self.commit_ref.best if self.commit_ref else None)
        self.commit_ref = CommitRef(number, model, state, kept_best, record, self.workflow, self.first_round)
        self.payloads.keep(self.commit_ref)

    def settle(self) -> None:
        """Wait until the last commit is durable. Raises as `commit`."""
        self._commits.settle()

    def event(self, kind: str, text: str = "", *, site: str = "", **data: Any) -> None:
        """Keep something about the job, for whoever asks for its events."""
        self.link.send(Event(self.job, kind, Site(site), data, text[: 16 * 1024]))

    def _request(self, message: Any) -> Message:
        """A request that outlives a broker's absence as a gather does."""
        return self.link.request(message, timeout_s=GIVE_UP_S)[0]
