"""A job process over the broker's own control core, in one thread: a link, executors and a clock, all in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.broker.link import fault_error
from fedloom.controller.federation import Federation
from fedloom.controller.inbox import Inbox
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.errors import FedloomError, LinkError
from fedloom.serialization.fold import Fold
from fedloom.serialization.foldplan import FoldPlan
from fedloom.serialization.jobspec import Component, ExecutorSpec, JobSpec
from fedloom.serialization.messages import (
    Claimed,
    ClaimJob,
    Done,
    DoneItem,
    Fail,
    Fault,
    Get,
    Message,
    PayloadId,
    PayloadRef,
    Put,
    Stored,
)
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import decode_model, encode_model
from siblings import load

broker_tools = load(__file__, "../broker/conftest")

STEPS = "NUM_STEPS_CURRENT_ROUND"
BASE = np.linspace(-1, 1, 64, dtype=np.float32)
#: (site, round, the received model) -> what the site sends, or an error that its code raises.
Train = Callable[[str, int, FLModel], FLModel | Exception]


@dataclass(frozen=True)
class Asked:
    """A request that was answered at once."""

    ref: int
    outcome: tuple[Message, bytes] | FedloomError


class CoreLink:
    """What a `Link` does for its users, with the control core at its other end and no thread."""

    def __init__(self, peer: Any, deliver: Callable[[Message, bytes], None]) -> None:
        self.peer = peer
        self.deliver = deliver
        self.state = "up"
        self.fatal: Exception | None = None
        self.local = None
        self.endpoint = "inproc://core"
        self.puts: list[PayloadRef] = []
        self.closed = ""

    def next_ref(self) -> int:
        return self.peer.ref()

    def pump(self) -> None:
        """What has come goes to the owner."""
        got, self.peer.got = self.peer.got, []
        for message, tail in got:
            self.deliver(message, tail)

    def send(self, message: Message, tail: bytes = b"") -> None:
        if self.state == "up":
            self.peer.send(message, bytes(tail))
            self.pump()

    def request(self, message: Any, tail: bytes = b"", timeout_s: float = 60.0) -> tuple[Message, bytes]:
        if self.state != "up":
            raise LinkError("down")
        self.pump()
        self.peer.send(message, bytes(tail))
        answers = [(m, t) for m, t in self.peer.got if getattr(m, "ref", 0) == message.ref]
        self.peer.got = [(m, t) for m, t in self.peer.got if getattr(m, "ref", 0) != message.ref]
        self.pump()
        assert len(answers) == 1, f"{len(answers)} answers to {message}"
        if isinstance(answers[0][0], Fault):
            raise fault_error(answers[0][0].code, answers[0][0].text)
        return answers[0]

    def ask(self, message: Any, tail: bytes = b"", *, more: bool = False) -> Asked:
        """Asked and answered at once; the answer is kept."""
        if isinstance(message, Put):
            self.puts.append(message.payload)
        try:
            return Asked(message.ref, self.request(message, tail))
        except FedloomError as error:
            return Asked(message.ref, error)

    def answer(self, asked: Asked, timeout_s: float = 60.0) -> tuple[Message, bytes]:
        if isinstance(asked.outcome, FedloomError):
            raise asked.outcome
        return asked.outcome

    def put(self, ref: PayloadRef, buffers: Any, **owner: Any) -> PayloadRef:
        self.puts.append(ref)
        answer, _ = self.request(Put(payload=ref, ref=self.next_ref(), **owner), b"".join(buffers))
        assert isinstance(answer, Stored)
        return answer.payload or ref

    def fetch(self, ref: PayloadRef, timeout_s: float = 0, dest: Path | None = None) -> bytes:
        return self.request(Get("0" * 32, ref.id, 0, 0, ref=self.next_ref()))[1]

    def stream(self, ref: PayloadRef, sink: Callable[[int, memoryview], None]) -> None:
        data = memoryview(self.fetch(ref))
        for start in range(0, len(data), 100):
            sink(start, data[start : start + 100])

    def close(self, reason: str = "") -> None:
        self.closed = reason
        self.state = "closed"


class DrivenInbox(Inbox):
    """Where a workflow would wait, the rest of the world takes a turn instead."""

    def __init__(self, farm: Farm, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self.farm = farm

    def get(self, timeout_s: float) -> Any:
        for _ in range(400):
            got = super().get(0.0005)
            if got is not None or self.missed_some():
                return got
            self.farm.step()
        raise AssertionError("the workflow waits for what never comes")

    def missed_some(self) -> bool:
        return self._dropped


class Farm:
    """A job, its process and its sites."""

    def __init__(self, store: Path, *, sites: int = 3, pool: bool = False, inbox_bytes: int = 1 << 26) -> None:
        self.world = broker_tools.World(store)
        self.names = [f"site-{n}" for n in range(sites)]
        self.inbox_bytes = inbox_bytes
        if pool:
            self.executors = [self.world.executor(*self.names, node="pool/p", capacity=sites)]
        else:
            self.executors = [self.world.executor(name) for name in self.names]
        self.train: Train = steady
        self.assign: Any = None  # that of the task in hand
        self.singly = False  # results as payloads of their own, not in the message
        self.partial: FoldPlan | None = None  # the pool folds by this plan
        self.order = 1  # -1: the last site answers first
        self.calls: list[tuple[str, int]] = []
        self.events: list[Callable[[], None]] = []  # done one by one, where the workflow would wait
        self.controller = self.world.peer("controller", "controller/c")
        self.world.submit(num_rounds=3)
        self.fed = self.process()

    def process(self) -> Federation:
        """A process for the job: another one than before, if there was one."""
        self.controller.send(ClaimJob(self.controller.ref()))
        self.world.pass_time(1)
        self.claimed: Claimed = self.controller.one(Claimed)
        self.peer = self.world.process(self.claimed)
        self.inbox = DrivenInbox(self, self.inbox_bytes)
        self.link: Any = CoreLink(self.peer, self.inbox.put)
        spec = JobSpec("demo", (Component("x.Y"),), (ExecutorSpec(("*",), Component("x.Z")),), sites=tuple(self.names))
        self.fed = Federation(self.link, self.inbox, self.claimed, spec, self.world.store)
        return self.fed

    def die(self, reason: str = "killed") -> None:
        """The job process is gone, and its controller says so."""
        self.world.disconnect(self.peer)
        self.controller.send(ClaimJob(0, self.claimed.job, self.claimed.claim, reason))

    def cut(self) -> None:
        """The process's connection breaks, with what was on it, and comes back."""
        self.peer.got.clear()
        self.peer.connect()
        self.link.pump()

    def step(self) -> None:
        """One event, or else what the executors can do."""
        if self.events:
            self.events.pop(0)()
        else:
            for executor in self.executors[:: self.order]:
                self.work(executor)
        self.world.now += 0.05
        self.world.turn()
        self.link.pump()

    def work(self, executor: Any) -> None:
        """Train and send everything that this executor was given."""
        items: list[tuple[DoneItem, bytes]] = []
        tasks = broker_tools.work(executor)
        for assign, ref, site in tasks[:: self.order]:
            self.assign = assign
            received = FLModel()
            if assign.payload is not None:
                received = decode_model(self.world.core.state.spool.read(assign.payload.id, 1 << 20), framework="numpy")
            self.calls.append((site, assign.round))
            result = self.train(site, assign.round, received)
            if isinstance(result, Exception):
                executor.send(Fail(ref.task, ref.attempt, "user_error", str(result)))
                continue
            encoded = encode_model(result)
            item = DoneItem(ref.task, ref.attempt, site, meta=encoded.meta, run_s=0.5)
            if self.partial is not None and assign.partials:
                items.append((item, encoded.tobytes()))
            elif self.singly:
                data = encoded.tobytes()
                put = PayloadRef(PayloadId(f"r-{ref.task}.{ref.attempt}"), len(data), digest_buffers([data]))
                executor.send(Put(put, job=assign.job, task=ref.task, attempt=ref.attempt, ref=executor.ref()), data)
                executor.send(Done(assign.job, assign.gather, (replace(item, payload=put),)))
            else:
                data = encoded.tobytes()
                executor.send(Done(assign.job, assign.gather, (replace(item, inline_bytes=len(data)),)), data)
        if items and self.partial is not None:
            fold = Fold(self.partial)
            for item, data in items:
                fold.add(data, site=item.site, meta=item.meta)
            data = b"".join(fold.to_partial()[0])
            ref = PayloadRef(PayloadId("p-" + f"{len(self.calls):032x}"), len(data), digest_buffers([data]))
            done = Done(
                tasks[0][0].job,
                tasks[0][0].gather,
                tuple(item for item, _ in items),
                partial=ref,
                partial_inline_bytes=len(data),
            )
            executor.send(done, data)

    def close(self) -> None:
        self.world.journal.close()


def steady(site: str, round: int, received: FLModel) -> FLModel:
    """A result that depends on the site, the round and the model alone."""
    rng = np.random.default_rng([int(site.rpartition("-")[2]), round])
    params = {"w": received.params["w"] + rng.standard_normal(64).astype(np.float32) * np.float32(0.1)}
    return FLModel(params=params, metrics={"accuracy": float(round)}, meta={STEPS: 1 + int(site.rpartition("-")[2])})


def model_of(value: Any = BASE) -> FLModel:
    return FLModel(params={"w": np.array(value, np.float32)})


class Tools:
    """For test files."""

    Farm = Farm
    CoreLink = CoreLink
    BASE = BASE
    STEPS = STEPS
    steady = staticmethod(steady)
    model_of = staticmethod(model_of)
    World = broker_tools.World
    broker = broker_tools


@pytest.fixture(name="tools")
def tools_fixture() -> type[Tools]:
    return Tools


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Callable[..., Farm]]:
    made: list[Farm] = []

    def make(**options: Any) -> Farm:
        made.append(Farm(tmp_path / f"store{len(made)}", **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
