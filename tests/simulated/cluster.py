"""Everybody in the room: the broker's two processes, two controllers, job processes, executors, a pool, a client.

Who dies is started again, as a supervisor would. What is run is the product's own shells: `ControlLoop`, `DataLoop`,
`Controller`, `run_job`, `run_executor`, `Link`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import system
from faults import Fault, Plan
from fedloom.broker.control import ControlConfig, ControlLoop
from fedloom.broker.data import STORAGE_EXIT, DataLoop
from fedloom.broker.link import Link
from fedloom.broker.service import data_config
from fedloom.controller.job import JobRequest, run_job
from fedloom.controller.service import Controller, ControllerConfig
from fedloom.executor.agent import Agent
from fedloom.executor.config import AgentConfig
from fedloom.executor.service import run_executor
from fedloom.serialization import faultpoints
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.errors import FaultError, FedloomError, StorageError
from fedloom.serialization.messages import Answer, Ask, Hello, JobId, PayloadId, PayloadRef, SubmitJob
from fedloom.serialization.model import FLModel
from machine import Machine, Party
from network import Network, Weather
from scenario import Scenario, score, submit, work

ENDPOINT = "tcp://127.0.0.1:7600"
_AGAIN_S = (0.05, 0.8)


class _Process:
    """A job process as its controller sees it."""

    def __init__(self, party: Party) -> None:
        self._party = party
        self.pid = party.pid

    def poll(self) -> int | None:
        return None if self._party.alive else self._party.code

    def kill(self) -> None:
        self._party.machine.crash(self._party, "by its controller")


class Cluster:
    """The parties of one run, and what befalls them."""

    def __init__(
        self, machine: Machine, network: Network, disk: Any, scenario: Scenario, plan: Plan, archive: bytes
    ) -> None:
        self.machine = machine
        self.network = network
        self.disk = disk
        self.scenario = scenario
        self.plan = plan
        self.archive = archive
        self.chance = Random(plan.seed * 3 + 2)
        self.living: dict[str, Party] = {}
        self.loop: ControlLoop | None = None
        self.data_loop: DataLoop | None = None
        self.agents: dict[str, Agent] = {}
        self.calm = False
        self.status = ""
        self.reason = ""
        self.job = ""
        self.ended_at = 0.0
        self.broker_ended = False
        #: faults by kind that hit somebody while the job was at work
        self.hits: Counter[str] = Counter()
        self.orders: dict[int, str] = {}  # of the operator, by letter: those that were acknowledged
        self.executions: Counter[tuple[str, int]] = Counter()
        self._host_dies: set[int] = set()
        self._why: dict[int, str] = {}
        faultpoints.arm("")

    # ------------------------------------------------------------ who is there

    def start(self) -> None:
        """Everybody, at about the same time; and the faults at theirs."""
        self._supervise("control", self._control)
        for number in (1, 2):
            self._supervise(f"controller-{number}", self._controller)
        for twin in ("", "-twin") if self.scenario.twins else ("",):
            for number in range(self.scenario.singles):
                site = self.scenario.sites[number]
                self._supervise(
                    f"executor-{site}{twin}", lambda site=site, twin=twin: self._executor((site,), "", twin)
                )
            if self.scenario.pooled:
                sites = self.scenario.sites[self.scenario.singles :]
                self._supervise(f"pool{twin}", lambda sites=sites, twin=twin: self._executor(sites, f"p{twin}", twin))
        self._supervise("client", self._client)
        for fault in self.plan.faults:
            self._arrange(fault)

    def _supervise(self, name: str, main: Callable[[], Any]) -> None:
        def begin() -> None:
            party = self.living[name] = self.machine.start(name, main)
            party.ended.append(again)

        def again(party: Party) -> None:
            self._died(party)
            if name == "client" and party.code != -9:
                return  # it has its answer
            pause = self.chance.uniform(*_AGAIN_S)
            self.machine.call_at(self.machine.now + pause, begin)

        begin()

    def _died(self, party: Party) -> None:
        self.broker_ended = self.broker_ended or party.name in ("control", "data")
        why = self._why.pop(party.pid, "")
        if party.crash_at and party.steps == party.crash_at:
            why = why or "crash_step"
        if why and not self.calm:
            self.hits[why] += 1
        if party.code == -9 and not self.calm and not self.ended_at:
            self.hits[f"killed: {party.name.partition('-')[0]}"] += 1
        if party.pid in self._host_dies and self.scenario.power:
            changes = self.disk.power_cut()
            self.machine.say(f"the host forgot {changes} changes")
            if not self.calm:
                self.hits["unsynced"] += bool(changes)

    # ------------------------------------------------------------ the processes

    def _control(self) -> int:
        scenario = self.scenario
        model_bytes = 4 * scenario.floats + 300
        config = ControlConfig(
            store=self.disk.store,
            bind=ENDPOINT,
            internal="ipc:///room/internal",
            data_bind="tcp://127.0.0.1:7601",
            durability="power" if scenario.power else "process",
            integrity=scenario.integrity,  # type: ignore[arg-type]
            trust_local=scenario.trust_local,
            chunk_bytes=9000,
            window=3,
            ping_s=0.4,
            dead_s=2.5,
            lost_s=1.2,
            takeover_s=0.3,
            start_s=3.0,
            retry_s=0.1,
            quota_bytes=scenario.quota_models * model_bytes + 16384 if scenario.quota_models else 1 << 30,
        )
        me = system.party()
        child: list[Party] = []

        def watch() -> None:
            if child and child[-1].alive:
                return
            if child and child[-1].code == STORAGE_EXIT:
                raise StorageError("the disk failed the data process")
            party = self.machine.start("data", lambda: self._data(config), parent=me)
            party.ended.append(self._died)
            self.living["data"] = party
            child.append(party)

        try:
            loop = self.loop = ControlLoop(config)
            try:
                loop.run(system.Event(), watch)  # type: ignore[arg-type]
            finally:
                loop.close()
        except StorageError as error:
            self.machine.say(f"control: {error}")
            return STORAGE_EXIT
        return 0

    def _data(self, config: ControlConfig) -> int:
        try:
            loop = self.data_loop = DataLoop(data_config(config))
            try:
                loop.run(system.Event())  # type: ignore[arg-type]
            finally:
                loop.close()
        except StorageError as error:
            self.machine.say(f"data: {error}")
            return STORAGE_EXIT
        return 0

    def _controller(self) -> int:
        def start_job(request: JobRequest) -> _Process:
            folder = Path(system.disk.temporary("fedloom-job-"))
            party = self.machine.start("job", lambda: run_job(request, folder), parent=system.party())
            party.ended.append(self._died)
            self.living["job"] = party
            return _Process(party)

        try:
            Controller(ControllerConfig(ENDPOINT), start_job).run()
        except FedloomError as error:
            self.machine.say(f"controller: {error}")
            return 1
        return 0

    def _executor(self, sites: tuple[str, ...], pool: str, twin: str) -> int:
        scenario = self.scenario
        name = pool or f"{sites[0]}{twin}"
        config = AgentConfig(
            endpoint=ENDPOINT,
            workspace=self.disk.root / name,
            sites=sites,
            pool=pool,
            capacity=2 if pool else 1,
            max_parked=8,
            partial_max_tasks=3,
            partial_max_s=0.5,
            share_logs=False,
        )

        def train(model: Any, ctx: Any) -> Any:
            self.executions[ctx.site, ctx.round] += 1
            if ctx.site == scenario.sites[-1] and self.executions[ctx.site, ctx.round] <= scenario.fails:
                raise ValueError(f"{ctx.site} has no data for round {ctx.round}")
            system.time.sleep(self.machine.rng.uniform(0.1, 1.9) * scenario.task_s)
            return work(scenario, ctx.site, ctx.round, ctx.seed, model, ctx.state)

        def evaluate(model: Any, ctx: Any) -> Any:
            self.executions[ctx.site, scenario.rounds + ctx.round] += 1
            system.time.sleep(self.machine.rng.uniform(0.1, 1.9) * scenario.task_s)
            return FLModel(metrics=score(ctx.site, model.params))

        def give(model: Any, ctx: Any) -> Any:
            return submit(model, ctx.state)

        functions = {"train": train, **({"validate": evaluate, "submit_model": give} if scenario.scores else {})}

        def make(config: AgentConfig, spawner: Any) -> Agent:
            agent = self.agents[name] = Agent(config, spawner, functions)
            return agent

        try:
            run_executor(config, stop=system.Event(), make_agent=make)  # type: ignore[arg-type]
        except FaultError as error:
            if error.code not in ("malformed", "penalty", "name_taken"):
                raise
            # where much of what is said is altered a link is given up, and its process ends with that error
            self.machine.say(f"{name}: {error}")
            return 1
        return 0

    def _client(self) -> int:
        token = f"token-{self.plan.seed}"
        digest = digest_buffers([self.archive])
        archive = PayloadRef(PayloadId(f"b3-{digest}"), len(self.archive), digest, "blob")
        while not self.status.startswith("FINISHED"):
            boot = system.secrets.token_hex(16)
            link = Link(ENDPOINT, Hello(node=f"client/{boot[:8]}", role="client", boot=boot))
            try:
                link.start(20.0)
                link.put(archive, [self.archive], timeout_s=30.0)
                answer, _ = link.request(SubmitJob(link.next_ref(), token, "simulated", archive))
                assert isinstance(answer, Answer)
                self.job = answer.data["job_id"]
                while not self.status.startswith("FINISHED"):
                    system.time.sleep(0.25)
                    answer, _ = link.request(Ask(link.next_ref(), "job", JobId(self.job)), timeout_s=20.0)
                    assert isinstance(answer, Answer)
                    self.status, self.reason = answer.data["status"], answer.data.get("reason", "")
                    if self.scenario.fails:
                        self._see_to_letters(link)
            except FedloomError as error:
                self.machine.say(f"client: {error!r}")
                system.time.sleep(0.2)
            finally:
                link.close("done")
        self.ended_at = self.machine.now
        return 0

    def _see_to_letters(self, link: Link) -> None:
        """An operator at work: what may be retried is, now and then a letter is dropped; some orders are said twice."""
        job = JobId(self.job)
        answer, _ = link.request(Ask(link.next_ref(), "letters", job), timeout_s=20.0)
        assert isinstance(answer, Answer)
        for letter in answer.data["letters"]:
            what = "retry" if letter["open"] and self.chance.random() < 0.8 else "drop"
            for _ in range(self.chance.choice((1, 2))):
                try:
                    link.request(Ask(link.next_ref(), what, job, letter["letter"]), timeout_s=20.0)
                except FaultError as error:
                    if error.code in ("step_closed", "ended", "not_dead"):
                        self.machine.say(f"operator: {error}")
                        break  # meanwhile; or the answer to the same was lost with the link
                    raise
                self.orders[letter["letter"]] = what

    # ------------------------------------------------------------ what befalls them

    def _arrange(self, fault: Fault) -> None:
        machine = self.machine

        def begin() -> None:
            if not self.calm:
                self._befall(fault)

        def end() -> None:
            match fault.kind:
                case "full":
                    self.disk.full = False
                case "sync":
                    self.disk.failing = False
                case _:
                    pass

        machine.call_at(fault.at, begin)
        if fault.kind in ("full", "sync"):
            machine.call_at(fault.at + fault.lasts, end)

    def _befall(self, fault: Fault) -> None:
        match fault.kind:
            case "drop" | "duplicate" | "reorder" | "delay" | "flip":
                self.network.weather.append(Weather(fault.at, fault.at + fault.lasts, **{fault.kind: fault.share}))
            case "cut" | "cut_all":
                found = [c for c in self.network.connections if not c.dealer.endpoint.startswith("ipc://")]
                if fault.kind == "cut" and found:
                    found = [self.chance.choice(found)]
                self.hits[fault.kind] += bool(found)
                for connection in found:
                    self.network.cut(connection)
            case "partition" | "freeze":
                party = self._victim(fault.whom)
                if party is None:
                    return
                self.hits[fault.kind] += 1
                until = self.machine.now + fault.lasts
                if fault.kind == "freeze":
                    party.frozen_until = until
                    return
                self.network.partitions[party] = until
                for connection in [c for c in self.network.connections if party in (c.dealer.party, c.router.party)]:
                    self.network.cut(connection)
            case "crash" | "crash_step":
                party = self._victim(fault.whom)
                if party is None:
                    return
                self._why[party.pid] = fault.kind
                if fault.kind == "crash":
                    self.machine.crash(party, "fault")
                else:
                    party.crash_at = party.steps + fault.step
            case "host" | "host_step":
                party = self._victim("control")
                if party is None:
                    return
                self._why[party.pid] = fault.kind
                self._host_dies.add(party.pid)
                if fault.kind == "host":
                    self.machine.crash(party, "host")
                else:
                    party.crash_at = party.steps + fault.step
            case "point":
                armed = {**faultpoints._armed, fault.whom: fault.step}
                faultpoints.arm(",".join(f"{name}:{count}" for name, count in armed.items()))
            case "clock":
                party = self._victim(fault.whom)
                if party is not None:
                    party.wall_offset += self.chance.choice((-1, 1)) * self.chance.choice((1.0, 60.0, 86400.0))
                    self.hits["clock"] += 1
            case "full":
                self.disk.full = True
            case "sync":
                self.disk.failing = True
            case _:
                raise AssertionError(fault)

    def point_hit(self) -> None:
        """A named point has killed whoever passed it: it is not armed any more."""
        for name in [name for name, left in faultpoints._armed.items() if left == 1]:
            del faultpoints._armed[name]
        if not self.calm:
            self.hits["point"] += 1

    def _victim(self, whom: str) -> Party | None:
        names = sorted(
            name
            for name, party in self.living.items()
            if party.alive and (name == whom or name.startswith(f"{whom}-site"))
        )
        return self.living[self.chance.choice(names)] if names else None
