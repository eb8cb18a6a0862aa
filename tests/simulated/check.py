"""What must be true of a run: watched while it goes on, and looked at when everybody has come to rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster import Cluster
from fedloom.broker import rows
from fedloom.serialization.envelope import KIND_AT
from fedloom.serialization.messages import Answer, Checkpoint, Claimed, Commit, Done, EndJob, Stored, decode
from machine import Machine, Party
from network import Network, Socket
from scenario import Reference

_COMMANDS = (Checkpoint.KIND, Commit.KIND, EndJob.KIND)
#: Log lines that speak of a bug, or of something lost that was promised.
ALARMS = frozenset(
    {
        "control_loop_error", "data_loop_error", "agent_crashed", "agent_call_failed", "link_crashed", "fold_failed",
        "payload_lost", "results_lost", "message_too_large", "message_unsent",
    }
)  # fmt: skip


class Checker:
    """The promises, for one run."""

    def __init__(self, machine: Machine, network: Network, disk: Any, reference: Reference) -> None:
        self.machine = machine
        self.disk = disk
        self.reference = reference
        self.broken: list[str] = []
        #: task -> attempt whose result is committed
        self.results: dict[str, int] = {}
        self.acknowledged: dict[str, int] = {}
        self.claim = 0  # the highest that was given
        self.commands: dict[tuple[int, int], int] = {}  # of job processes, by process and ref: under which claim
        self.offered: set[tuple[str, int]] = set()  # attempts whose results somebody has sent; a Fail is answered too
        self.refusals = 0
        self.most: dict[str, int] = {}
        network.watch = self._watch

    def say(self, what: str) -> None:
        """A promise is broken."""
        if not self.broken:
            self.machine.say(f"BROKEN: {what}")
        self.broken.append(what)

    # ------------------------------------------------------------ while it runs

    def heard(self, method: str, event: dict[str, Any]) -> None:
        """A log line."""
        if event["event"] in ALARMS:
            detail = {k: v for k, v in event.items() if k not in ("event", "exc_info")}
            self.say(f"log says {event['event']} {detail}{_error(event)}")

    def _watch(self, socket: Socket, to: Socket, frames: list[bytes]) -> None:
        kind = frames[0][KIND_AT]
        self._fencing(kind, socket.party, to.party, frames)
        if kind == Done.KIND and socket.party.name != "control":
            done = decode(frames).message
            assert isinstance(done, Done)
            self.offered |= {(item.task, item.attempt) for item in done.items}
        elif kind == Stored.KIND and socket.party.name == "control":
            self._take_rows()
            stored = decode(frames).message
            assert isinstance(stored, Stored)
            for ref in stored.tasks:
                if (ref.task, ref.attempt) not in self.offered:
                    continue
                if self.results.get(ref.task) != ref.attempt:
                    has = self.results.get(ref.task)
                    self.say(f"attempt {ref.attempt} of {ref.task} acknowledged; committed is {has}")
                self.acknowledged[ref.task] = ref.attempt
            for refusal in stored.refused:
                self.refusals += 1
                if not refusal.code or not refusal.reason:
                    self.say(f"refused without a reason: {refusal}")

    def _fencing(self, kind: int, sender: Party, to: Party, frames: list[bytes]) -> None:
        """Whoever commands under a claim that was given on is refused."""
        if sender.name == "job" and kind in _COMMANDS:
            command = decode(frames).message
            self.commands[sender.pid, getattr(command, "ref", 0)] = getattr(command, "claim", 0)
        elif sender.name == "control" and kind == Claimed.KIND:
            claimed = decode(frames).message
            assert isinstance(claimed, Claimed)
            self.claim = max(self.claim, claimed.claim)
        elif sender.name == "control" and to.name == "job" and kind == Answer.KIND:
            claim = self.commands.get((to.pid, getattr(decode(frames).message, "ref", 0)))
            if claim is not None and claim < self.claim:
                self.say(f"a command under claim {claim} was carried out; claim {self.claim} has the job")

    def _take_rows(self) -> None:
        for table, row in self.disk.rows:
            if table == "results":
                item = rows.item(row[2])
                known = self.results.setdefault(item.task, item.attempt)
                if known != item.attempt:
                    self.say(f"a second result of {item.task}: attempt {item.attempt} beside {known}")
        self.disk.rows.clear()

    def look(self, cluster: Cluster) -> None:
        """Now and then: what is bounded is within its bounds."""
        loop, data = cluster.loop, cluster.data_loop
        if loop is None or not cluster.living["control"].alive:
            return
        state = loop.core.state
        for session in state.sessions.by_id.values():
            self._bound("outbox", len(session.outbox), session.timing.outbox_messages)
        quota = state.quota
        if quota.total:
            self._bound("spool", quota.used, quota.total)
        if data is not None and cluster.living["data"].alive:
            self._bound("data outboxes", max(map(len, data._outboxes.values()), default=0), 1024)

    def _bound(self, name: str, seen: int, allowed: int) -> None:
        self.most[name] = max(self.most.get(name, 0), seen)
        if seen > allowed:
            self.say(f"{name}: {seen}, bound {allowed}")

    # ------------------------------------------------------------ when it is over

    def rest(self, cluster: Cluster) -> str:
        """What is still under way after the job's end; "" once everybody has come to rest."""
        loop = cluster.loop
        if loop is None or not cluster.living["control"].alive or not cluster.living["data"].alive:
            return "the broker is down"
        state = loop.core.state
        job = state.jobs.jobs.get(cluster.job)  # type: ignore[call-overload]
        if job is None or not job.ended:
            return "the job has not ended"
        if "job" in cluster.living and cluster.living["job"].alive:
            return "the job's process lives"
        for site in cluster.scenario.sites:
            session = state.sessions.by_site.get(site)  # type: ignore[call-overload]
            if session is None or session.lost_at is not None:
                return f"{site} is not connected"
        for name, agent in cluster.agents.items():
            desk = agent._desk
            if desk is None or agent.ended or desk.link.state != "up":
                if cluster.scenario.twins:
                    continue  # the other one is
                return f"{name} is not connected"
            if desk.runs or len(desk.outbox) or desk.held_refs():
                return f"{name} holds {len(desk.runs)} runs, {len(desk.outbox)} results, {desk.held_refs()}"
            if agent._collector is not None and len(agent._collector.delivery):
                return f"{name} delivers"
            if desk.jobs.on_disk():
                return f"{name} keeps the job's files"
        live = [gather.id for gather in state.ledger.gathers.values()]
        if live:
            return f"gathers {live} are kept"
        uploads = cluster.data_loop.transfers.uploads if cluster.data_loop is not None else None
        if uploads is not None and uploads.names_in_use():
            return "uploads are open"
        return ""

    def end(self, cluster: Cluster) -> None:
        """Everything that must be true once all is over."""
        self._take_rows()
        scenario, loop = cluster.scenario, cluster.loop
        assert loop is not None
        state = loop.core.state
        job = state.jobs.jobs[cluster.job]  # type: ignore[index]
        records = state.journal.records(job.id, 0, 1000)
        if cluster.status != "FINISHED:COMPLETED":
            self._failed(cluster, records)
        rounds = [round for _, round, _ in records]
        if rounds != list(range(len(rounds))):
            self.say(f"rounds committed: {rounds}")
        trained = [record for _, _, record in records if "evaluation" not in record]
        closed = [[site["name"] for site in record["sites"]] for record in trained]
        least = len(scenario.sites) - scenario.spared
        for round, sites in enumerate(closed):
            if len(set(sites)) != len(sites) or not set(sites) <= set(scenario.sites) or len(sites) < least:
                self.say(f"round {round} was closed with {sites}")
        if not self.broken and closed:
            self._models(cluster, closed, job)
        if scenario.scores and not self.broken:
            self._matrix(cluster, [record for _, _, record in records], closed)
        if scenario.fails:
            self._letters(cluster, trained, state.journal.events(job.id, 0, 10_000))
        self._acknowledged(closed)
        self._payloads(cluster, state)
        for name, party in cluster.living.items():
            if name == "job" and party.alive:
                self.say("a job process outlives its job")

    def _failed(self, cluster: Cluster, records: Sequence[Any]) -> None:
        """Whether a job may have ended otherwise: a gather with a deadline may miss its quorum."""
        if cluster.scenario.deadline_s is not None and "deadline" in cluster.reason:
            cluster.hits["quorum missed"] += 1
        else:
            self.say(f"the job ended as {cluster.status}: {cluster.reason[:500]}")

    def _models(self, cluster: Cluster, closed: list[list[str]], job: Any) -> None:
        wanted = self.reference.models(cluster.scenario, closed)
        got = job.commit.model.id if job.commit is not None and job.commit.model is not None else ""
        if got != wanted[-1]:
            self.say(f"the model after {len(closed)} rounds is {got}; undisturbed it is {wanted[-1]}")

    def _matrix(self, cluster: Cluster, records: Sequence[dict[str, Any]], closed: list[list[str]]) -> None:
        best = max(record["round"] for record in records if record.get("best"))
        got: dict[str, dict[str, Any]] = {}
        for record in records:
            for site, scores in record.get("scores", {}).items():
                if record["evaluation"]["model"] in got.setdefault(site, {}):
                    self.say(f"{site} scored {record['evaluation']['model']} twice")
                got[site][record["evaluation"]["model"]] = scores
        wanted = self.reference.matrix(cluster.scenario, closed, best)
        if got != wanted:
            self.say(f"the matrix is {got}; undisturbed it is {wanted}")

    def _letters(self, cluster: Cluster, records: Sequence[dict[str, Any]], events: Sequence[Any]) -> None:
        """Each order that was acknowledged was carried out once; what was retried and came is no failure."""
        seen_to = [event for event in events if event.kind in ("task_retried", "letter_dropped")]
        done = {event.data["letter"]: "retry" if event.kind == "task_retried" else "drop" for event in seen_to}
        if len(done) < len(seen_to):
            self.say(f"a dead letter was seen to twice: {[(e.kind, e.data) for e in seen_to]}")
        cluster.hits.update(f"letters: {what}" for what in done.values())
        for letter, what in cluster.orders.items():
            if done.get(letter) != what:
                self.say(f"{what} of dead letter {letter} was acknowledged; done is {done.get(letter)}")
        for record in records:
            both = {f["site"] for f in record["failures"]} & {site["name"] for site in record["sites"]}
            if both:
                self.say(f"round {record['round']} has results of {both}, which are among its failures")
            cluster.hits["retried and folded"] += cluster.scenario.sites[-1] in {s["name"] for s in record["sites"]}

    def _acknowledged(self, closed: list[list[str]]) -> None:
        """What was acknowledged is what counts: the round's record names its site."""
        for task, attempt in self.acknowledged.items():
            if self.results.get(task) != attempt:
                self.say(f"{task}: attempt {attempt} was acknowledged, {self.results.get(task)} is there")
        folded = sum(map(len, closed))
        if len(self.results) < folded:
            self.say(f"{folded} results were folded, {len(self.results)} ever accepted")

    def _payloads(self, cluster: Cluster, state: Any) -> None:
        table = state.payloads
        for payload in table.rows:
            if not table.holds.get(payload):
                self.say(f"payload {payload} is held by nobody")
        files = {path.name for folder in state.spool.payloads.iterdir() for path in folder.iterdir()}
        if files != set(table.rows):
            self.say(f"files without rows {files - set(table.rows)}, rows without files {set(table.rows) - files}")
        kept = {h.partition(":")[0] for holders in table.holds.values() for h in holders}
        if kept - {"commit", "best", "archive", "submit", "job"}:
            self.say(f"after the job's end payloads are held for {sorted(kept)}")
        if state.quota.admitted:
            self.say(f"admitted and never come: {list(state.quota.admitted)}")
        # what a dead co-located peer had not handed over goes by its age (`Spool.sweep_incoming`), as do parts of which
        # a broker that ended, killed or by a failing disk, was the only one to know that nobody comes back for them
        if cluster.broker_ended:
            return
        left = [path.name for path in state.spool.incoming.iterdir() if path.suffix in (".part", ".blocks")]
        if left:
            self.say(f"left in incoming: {left}")


def _error(event: dict[str, Any]) -> str:
    if not event.get("exc_info"):
        return ""
    import traceback

    return "\n" + traceback.format_exc()
