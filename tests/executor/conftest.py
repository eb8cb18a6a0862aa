"""A broker in the test's own process: it speaks real messages to the agent through a link that is no socket."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.executor import client_api
from fedloom.executor.agent import Agent, AgentConfig
from fedloom.executor.channel import Channel, ChannelServer
from fedloom.executor.client_context import ClientContext
from fedloom.executor.taskio import TaskSpec
from fedloom.serialization.archive import pack_folder
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.errors import FaultError, LinkError
from fedloom.serialization.jobspec import Component, ExecutorSpec, JobSpec
from fedloom.serialization.messages import (
    Answer,
    Ask,
    Assign,
    AssignItem,
    Done,
    DoneItem,
    Fail,
    PayloadRef,
    Stored,
    TaskRef,
    Welcome,
    decode,
    encode,
)
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import decode_model, encode_model

WAIT_S = 60.0


class FakeLink:
    """What `broker.link.Link` is to the agent."""

    def __init__(self, broker: FakeBroker, endpoint: str, hello: Any, **options: Any) -> None:
        self.broker = broker
        self.hello = hello
        self.options = options
        self.local = broker.local
        self.closed = threading.Event()
        self.state = "up"

    def next_ref(self) -> int:
        return 1

    def request(self, message: Any, tail: Any = b"", timeout_s: float = 60.0) -> tuple[Any, bytes]:
        assert isinstance(message, Ask) and message.what == "job"
        self.broker.asked.append(message.job)
        status = self.broker.statuses.get(message.job, "RUNNING")
        if status == "unknown":
            raise FaultError("unknown_job", f"no job {message.job}")
        return Answer(message.ref, {"status": status}), b""

    def start(self, timeout_s: float = 30.0) -> Welcome:
        if self.broker.refuse is not None:
            raise self.broker.refuse
        self.broker.link = self
        self.broker.hellos.append([(t.task, t.attempt) for t in self.options["held"]()])
        self.options["on_message"](Welcome("s", "e"), b"")
        return Welcome("s", "e")

    def send(self, message: Any, tail: Any = b"") -> None:
        if self.state != "up":
            return
        packet = decode(encode(message, tail, 1))  # what does not encode would not have left a real link either
        self.broker.heard(packet.message, bytes(packet.tail))

    def put(self, ref: PayloadRef, source: Sequence[Any] | Path, **owner: Any) -> PayloadRef:
        if self.broker.put_errors:
            raise self.broker.put_errors.pop(0)
        data = source.read_bytes() if isinstance(source, Path) else b"".join(source)
        assert len(data) == ref.size
        assert not ref.digest or digest_buffers([data]) == ref.digest
        self.broker.payloads[ref.id] = data
        self.broker.puts.append((ref.id, owner))
        return ref

    def put_local(self, ref: PayloadRef, name: str, **owner: Any) -> PayloadRef:
        return self.put(ref, self.local.incoming_path(name), **owner)

    def fetch(self, ref: PayloadRef, timeout_s: float = 0, dest: Path | None = None) -> Path | bytes:
        self.broker.fetches.append(ref.id)
        if ref.id not in self.broker.payloads:
            raise FaultError("unknown", f"no payload {ref.id}")
        data = self.broker.payloads[ref.id]
        if dest is None:
            return data
        dest.write_bytes(data)
        return dest

    def close(self, reason: str = "") -> None:
        self.closed.set()


@dataclass
class FakeBroker:
    payloads: dict[str, bytes] = field(default_factory=dict)
    messages: list[tuple[Any, bytes]] = field(default_factory=list)
    hellos: list[Any] = field(default_factory=list)
    puts: list[Any] = field(default_factory=list)
    fetches: list[str] = field(default_factory=list)
    put_errors: list[Exception] = field(default_factory=list)
    refuse: Exception | None = None
    local: Any = None
    statuses: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    store: bool = True  # answer each Done with Stored
    link: FakeLink | None = None

    def __post_init__(self) -> None:
        self.changed = threading.Condition()
        self.versions: dict[str, str] = {}

    def factory(self, endpoint: str, hello: Any, **options: Any) -> FakeLink:
        return FakeLink(self, endpoint, hello, **options)

    def heard(self, message: Any, tail: bytes) -> None:
        with self.changed:
            self.messages.append((message, tail))
            self.changed.notify_all()
        if isinstance(message, Done) and self.store:
            for item in message.items:
                if item.state:
                    self.versions[item.site] = item.state
            self.say(Stored(tasks=tuple(TaskRef(i.task, i.attempt) for i in message.items)))

    def say(self, message: Any, tail: bytes = b"") -> None:
        assert self.link is not None
        self.link.options["on_message"](message, tail)

    def wait(self, wanted: Callable[[Any, bytes], Any], timeout_s: float = WAIT_S) -> tuple[Any, bytes]:
        deadline = time.monotonic() + timeout_s
        with self.changed:
            while True:
                for message, tail in self.messages:
                    if wanted(message, tail):
                        return message, tail
                assert self.changed.wait(deadline - time.monotonic()), f"not heard; heard: {self.messages}"

    def done(self, task: str, attempt: int = 1, timeout_s: float = WAIT_S) -> DoneItem:
        """The Done item of this attempt; a Fail of it fails the test with its text."""

        def wanted(message: Any, tail: bytes) -> bool:
            if isinstance(message, Fail) and (message.task, message.attempt) == (task, attempt):
                raise AssertionError(f"failed ({message.code}): {message.text}")
            return isinstance(message, Done) and any((i.task, i.attempt) == (task, attempt) for i in message.items)

        message, tail = self.wait(wanted, timeout_s)
        at = message.partial_inline_bytes
        for item in message.items:
            if (item.task, item.attempt) == (task, attempt):
                if item.inline_bytes:
                    self.payloads[f"inline-{task}"] = tail[at : at + item.inline_bytes]
                return item
            at += item.inline_bytes
        raise AssertionError

    def failed(self, task: str, attempt: int = 1) -> Fail:
        return self.wait(lambda m, _: isinstance(m, Fail) and (m.task, m.attempt) == (task, attempt))[0]

    def result(self, item: DoneItem, framework: Any = "numpy") -> FLModel:
        data = self.payloads[item.payload.id if item.payload else f"inline-{item.task}"]
        return decode_model(bytearray(data), framework=framework)

    def add(self, data: bytes, type: Any = "tensors") -> PayloadRef:
        digest = digest_buffers([data])
        self.payloads[f"b3-{digest}"] = data
        return PayloadRef(f"b3-{digest}", len(data), digest, type)  # type: ignore[arg-type]

    def assign(
        self,
        *tasks: tuple[str, str] | tuple[str, str, int],
        job: str = "job-1",
        round: int = 0,
        name: str = "train",
        model: FLModel | None = None,
        archive: PayloadRef | None = None,
        settled: int = 0,
        **fields: Any,
    ) -> Assign:
        """Give out (task, site[, attempt]) with this model, small ones inline."""
        items = tuple(
            AssignItem(t[0], t[2] if len(t) > 2 else 1, t[1], self.versions.get(t[1], ""), settled)  # type: ignore[arg-type]
            for t in tasks
        )
        payload, tail = None, b""
        if model is not None:
            data = encode_model(model).tobytes()
            payload = self.add(data)
            tail = data if len(data) <= 32 * 1024 else b""
        message = Assign(
            job,  # type: ignore[arg-type]
            f"{job}-g{round}",  # type: ignore[arg-type]
            round,
            0,
            name,
            items,
            archive=archive,
            payload=payload,
            **fields,
        )
        self.say(message, tail)
        return message


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
def link_error() -> type[LinkError]:
    return LinkError


@pytest.fixture
def make_agent(broker: FakeBroker, tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """Start an agent of the fake broker; it is stopped after the test."""
    agents: list[Agent] = []

    def make(functions: Any = None, **config: Any) -> Agent:
        defaults: dict[str, Any] = {"endpoint": "fake", "workspace": tmp_path / "work", "sites": ("site-1",)}
        agent = Agent(AgentConfig(**{**defaults, **config}), functions=functions, link_factory=broker.factory)
        agent.start()
        agents.append(agent)
        return agent

    yield make
    for agent in agents:
        agent.stop()
        assert agent.ended


@pytest.fixture
def make_job(broker: FakeBroker, tmp_path: Path) -> Callable[..., PayloadRef]:
    """A job's archive in the broker: its files by name, and its executor's settings."""
    made: list[Path] = []

    def make(files: dict[str, str], path: str = "fedloom.executor.script.ScriptExecutor", **args: Any) -> PayloadRef:
        folder = tmp_path / f"job-folder-{len(made)}"
        made.append(folder)
        args.setdefault("task_script_path", "client.py")
        args = {name: value for name, value in args.items() if value is not None}
        threads = args.pop("threads_per_task", 1)
        spec = JobSpec(
            "job",
            (Component("fedloom.controller.workflows.fedavg.FedAvg"),),
            (ExecutorSpec(("*",), Component(path, args)),),
            num_rounds=3,
            threads_per_task=threads,
        )
        spec.write(folder)
        for name, text in files.items():
            (spec.custom_dir(folder) / name).write_text(text)
        return broker.add(pack_folder(folder), "blob")

    return make


@pytest.fixture
def weights() -> Callable[[float], FLModel]:
    return lambda value: FLModel(params={"w": np.full((2, 3), value, np.float32), "n": np.array(7, np.int64)})


class ClientsAgent:
    """A few lines of an agent, for the Client API: hands out the tasks it is given, one a ``waiting``, then stops."""

    def __init__(self, tmp_path):
        self.tmp_path = tmp_path
        self.tasks: list[TaskSpec] = []
        self.heard: queue.Queue = queue.Queue()
        self.server = ChannelServer(self._hear)
        self.server.start()
        self.hold = False

    def _hear(self, connection, host, role, message):
        if message is None:
            return
        if message["op"] == "waiting":
            if self.tasks:
                self.server.send(connection, {"op": "task", "task": self.tasks.pop(0).to_map()})
            elif not self.hold:
                self.server.send(connection, {"op": "stop"})
        elif message["op"] != "hello":
            self.heard.put(message)
        self.connection = connection

    def context(self, **settings):
        channel = Channel.connect(self.server.environ("h"), "host")
        return ClientContext(channel, {"site": "site-1", "job": "job-1", **settings}, on_lost=lambda: None)

    def task(self, name="train", value=1.0, round=0, model=True, params=None, **fields):
        params = params or {"w": np.full(3, value, np.float32)}
        data = encode_model(FLModel(params=params, meta={"from": "server"})).tobytes()
        count = len(self.tasks) + round
        self.tasks.append(
            TaskSpec(
                task=f"t{count}",
                attempt=1,
                site="site-1",
                job="job-1",
                round=round,
                step=0,
                name=name,
                total_rounds=5,
                payload_bytes=data if model else None,
                result_path=str(self.tmp_path / f"t{count}.result"),
                state_out=str(self.tmp_path / f"t{count}.state"),
                **fields,
            )
        )


@pytest.fixture
def agent(tmp_path):
    agent = ClientsAgent(tmp_path)
    yield agent
    context, _ = client_api._context, client_api.install(None)
    agent.server.close()
    if context is not None:
        context._reader.join(10)  # which closes its end
        context.end()
