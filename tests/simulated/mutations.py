"""Safeguards, each of which can be switched off, to see that the room notices: a check that cannot fail proves nothing.

A mutation exchanges a function of the product, in this process alone. What catches it is the schedule and the promise
that broke; both stand in the table that ``make proof`` prints.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fedloom.broker import (
    core,
    jobs,
    leases,
    letters,
    linksession,
    payloads,
    quota,
    recovery,
    sessions,
    settle,
    spool,
    streams,
    uploads,
)
from fedloom.broker import journal as journals
from fedloom.controller import folding, gather
from fedloom.executor import deliver
from fedloom.serialization import envelope, messages, stream


@dataclass(frozen=True)
class Mutation:
    """A safeguard's switch, and the jobs and faults that need the safeguard; none: any."""

    what: str
    switch: Callable[[], None]
    variants: tuple[int, ...] = ()
    faults: tuple[str, ...] = ()
    #: a stateful machine that notices, where the peers of the room would have to be liars
    machine: str = ""


MUTATIONS: dict[str, Mutation] = {}


def mutation(what: str, **favour: Any) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a safeguard's switch under the function's name."""

    def register(switch: Callable[[], None]) -> Callable[[], None]:
        MUTATIONS[switch.__name__] = Mutation(what, switch, **favour)
        return switch

    return register


@mutation(
    "a task that has a result takes another",
    machine="tests/broker/test_ledger_machine.py",
)
def no_duplicate_check() -> None:
    real = settle._problem

    def problem(known: Any, task: Any, node: str, item: Any) -> Any:
        found = real(known, task, node, item)
        return None if found is not None and found.code == "late" and task.status == "done" else found

    settle._problem = problem


@mutation("a repeated result is taken as another one")
def no_repeat_check() -> None:
    real = settle._settle_one

    def one(ledger: Any, known: Any, node: str, item: Any, *rest: Any) -> None:
        task = ledger.tasks.get(item.task)
        if task is not None and task.status == "done" and task.attempt == item.attempt:
            settle._accept(
                ledger, known, task, item, settle.Result(task.id, item.attempt, task.site, item.payload), rest[0]
            )
            rest[-1].stored.append(settle.TaskRef(item.task, item.attempt))
            return
        real(ledger, known, node, item, *rest)

    settle._settle_one = one


@mutation("answers leave before the transaction")
def acknowledge_before_commit() -> None:
    real = core.ControlCore.commit

    def commit(self: Any) -> None:
        import schedule

        state, held = self.state, self.state.replies
        loop = schedule.CLUSTER.loop
        if loop is not None and loop.core is self:
            for to, message, tail in held:
                if not isinstance(to, bytes) and to.lost_at is None and isinstance(message, messages.Stored):
                    to.push(message, tail)
            state.replies = [r for r in held if isinstance(r[0], bytes) or not isinstance(r[1], messages.Stored)]
            loop._send_all()
        real(self)

    core.ControlCore.commit = commit


@mutation("a claim that was given on still commands", variants=(9,), faults=("freeze/job",))
def ignore_the_claim() -> None:
    def check(self: Any, job_id: str, claim: int) -> Any:
        job = self.get(job_id)
        if job.ended:
            raise jobs.FencedError("fenced", "over")
        return job

    jobs.Jobs.check = check


@mutation(
    "a partial is taken though one of its tasks has a result",
    machine="tests/broker/test_ledger_machine.py",
)
def accept_an_overlapping_partial() -> None:
    real, problem = settle._settle_partial, settle._problem

    def lenient(known: Any, task: Any, node: str, item: Any) -> Any:
        found = problem(known, task, node, item)
        return None if task is not None and known.live else found

    def partial(*args: Any) -> None:
        settle._problem = lenient
        try:
            real(*args)
        finally:
            settle._problem = problem

    settle._settle_partial = partial


@mutation(
    "results leave the spool when they are announced, not when a commit or checkpoint covers them",
    variants=(2, 9),
    faults=("crash/job",),
)
def release_before_checkpoint() -> None:
    real = payloads.PayloadTable.hold

    def hold(self: Any, payload: Any, holder: str, now: float) -> None:
        if holder.startswith("gather:") and payload.startswith(("r-", "p-")):
            return
        real(self, payload, holder, now)

    payloads.PayloadTable.hold = hold


@mutation("the folder of a payload is not synced", variants=(2, 3, 9), faults=("host/", "host_step/"))
def skip_the_folder_sync() -> None:
    spool.Spool._sync_folders = lambda self, folders: None


@mutation("a payload's bytes are not synced", variants=(2, 3, 9), faults=("host/", "host_step/"))
def skip_the_file_sync() -> None:
    real = spool.Spool._sync_file

    def sync(self: Any, landing: Any) -> Any:
        before, self.durability = self.durability, "process"
        try:
            return real(self, landing)
        finally:
            self.durability = before

    spool.Spool._sync_file = sync


@mutation(
    "an attempt that was given on may settle its task",
    machine="tests/broker/test_ledger_machine.py",
)
def accept_a_stale_attempt() -> None:
    real = settle._problem

    def problem(known: Any, task: Any, node: str, item: Any) -> Any:
        found = real(known, task, node, item)
        return None if found is not None and found.code == "stale" else found

    settle._problem = problem


@mutation("the committed model is not held")
def forget_a_reference() -> None:
    real = payloads.PayloadTable.hold

    def hold(self: Any, payload: Any, holder: str, now: float) -> None:
        if not holder.startswith("commit:"):
            real(self, payload, holder, now)

    payloads.PayloadTable.hold = hold


@mutation("references are never given back")
def keep_a_reference() -> None:
    real = payloads.PayloadTable.release_all

    def release_all(self: Any, holder: str, keep: Any = ()) -> None:
        if not holder.startswith("gather:"):
            real(self, holder, keep)

    payloads.PayloadTable.release_all = release_all


@mutation("nobody looks at sequence numbers", faults=("drop/", "drop/"))
def no_sequence_check() -> None:
    sessions.Session.in_order = lambda self, sequence: 0
    linksession.Session._in_order = lambda self, packet: True


@mutation("nobody looks at the checksum of a message", faults=("flip/", "flip/"))
def no_message_checksum() -> None:
    real = envelope.unpack_envelope

    def unpack(frame: Any, body: Any, tail: Any = b"") -> Any:
        head = bytes(frame[:12])
        good = head + envelope._CRC.pack(zlib.crc32(head, zlib.crc32(tail, zlib.crc32(body))))
        return real(good if len(frame) == len(good) else frame, body, tail)

    messages.unpack_envelope = unpack


@mutation(
    "nobody looks at the checksum of a chunk, nor at the digest of a payload",
    variants=(2, 3, 9),
    faults=("flip/", "flip/"),
)
def no_chunk_check() -> None:
    real = stream.Receiver.on_chunk

    def on_chunk(self: Any, index: int, data: Any, crc32: int, now: float) -> Any:
        return real(self, index, data, zlib.crc32(data), now)

    stream.Receiver.on_chunk = on_chunk
    uploads._named_digest = lambda payload: ""
    from fedloom.broker import link, linkstreams

    linkstreams.Download._end = lambda self: self.done.set()
    real_ref = link.Link.put

    def put(self: Any, ref: Any, source: Any, **more: Any) -> Any:
        return real_ref(self, replace(ref, digest="") if not ref.id.startswith("b3-") else ref, source, **more)

    link.Link.put = put
    linkstreams.Upload.__init__ = _without_digest(linkstreams.Upload.__init__)


def _without_digest(init: Any) -> Any:
    def without(self: Any, put: Any, source: Any, digest: str = "") -> None:
        init(self, put, source, "")
        self._digest = ""

    return without


@mutation(
    "a job process folds what it is told, again if it is told again", variants=(1, 8, 12), faults=("cut_all/", "drop/")
)
def fold_what_is_repeated() -> None:
    real = gather.Gather.on_done

    def on_done(self: Any, done: Any, tail: Any) -> None:
        if done.items and done.partial is None and done.items[0].index < self._have:
            self._have = done.items[0].index
        real(self, done, tail)

    gather.Gather.on_done = on_done


@mutation("a task that was retried stays among the failures though its result came", variants=(16,))
def keep_the_failure() -> None:
    real = gather.Gather._take

    def take(self: Any, result: Any) -> None:
        failures = dict(self.seen.failures)
        real(self, result)
        self.seen.failures |= failures

    gather.Gather._take = take


@mutation("an operator's order that comes twice is carried out twice", variants=(16,))
def carry_out_every_order() -> None:
    real = letters._marks
    letters._marks = lambda state, job, after: list(real(state, job, after))[:1]


@mutation("a checkpoint claims one result more than it holds", variants=(5, 3), faults=("crash/job", "crash_step/job"))
def checkpoint_covers_too_much() -> None:
    real = folding.Federation.checkpoint

    def checkpoint(self: Any, known: Any, payload: Any, covered: int) -> None:
        real(self, known, payload, min(covered + 1, known._have))

    folding.Federation.checkpoint = checkpoint


@mutation(
    "after a takeover results that the checkpoint holds are sent singly too",
    variants=(3, 5),
    faults=("crash/job", "crash_step/job"),
)
def replay_ignores_the_checkpoint() -> None:
    real = streams.Streams._tell_results

    def tell(self: Any, session: Any, known: Any, sub: Any) -> bool:
        covered, known.covered = known.covered, 0 if sub.cursor else known.covered
        try:
            if sub.cursor == covered and covered:
                sub.cursor = covered - 1
                done, tail = self._singles(known, covered - 1)
                sub.cursor = covered - 1 + len(done.items)
                session.push(done, tail)
                return True
            return real(self, session, known, sub)
        finally:
            known.covered = covered

    streams.Streams._tell_results = tell


@mutation(
    "what a site remembers goes with a result that is not wanted, though it may be the one that was stored",
    variants=(0, 1, 8),
    faults=("drop/", "cut_all/"),
)
def discard_site_state() -> None:
    real = deliver.Delivery.drop
    leases.Leases._settled = lambda self, owner, ref: False

    def drop(self: Any, key: Any) -> None:
        collected = self._settled.__self__
        known = collected._states.get(key)
        real(self, key)
        if known is not None:
            site, job, version, _ = known
            collected._desk.states.discard(site, job, version)

    deliver.Delivery.drop = drop


@mutation("what a dead executor had is not given on", machine="tests/broker/test_ledger_machine.py")
def keep_the_dead_ones_leases() -> None:
    leases.Leases.owner_gone = lambda self, node, now, *, polite: None


@mutation(
    "the row of a payload is written before its file is whole", variants=(2, 3, 9), faults=("host/", "crash/data")
)
def row_before_file() -> None:
    real = recovery.recover

    def recover(known: Any, now: float) -> Any:
        found = real(known, now)
        known.spool.finish_all = lambda landings: []
        return found

    core.recover = recover
    spool.Spool.exists = lambda self, payload, size=None: True


@mutation("files whose rows are gone stay")
def files_are_not_deleted() -> None:
    spool.Spool.delete = lambda self, payload: 0
    spool.Spool.sweep = lambda self, known: []


@mutation("an admitted upload that never came keeps its room")
def admissions_are_not_given_back() -> None:
    quota.Quota.landed = lambda self, payload: None


@mutation("after an error the broker goes on with what it has in memory")
def save_half_a_turn() -> None:
    real = journals.Journal._save_ledger

    def save(self: Any, ledger: Any) -> Any:
        fresh, ledger.fresh = ledger.fresh, ledger.fresh[:-1]
        try:
            return real(self, ledger)
        finally:
            ledger.fresh = fresh

    journals.Journal._save_ledger = save
