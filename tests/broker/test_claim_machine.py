"""Claims beside a model of them: controllers that want jobs, processes that come, die and come back from the dead."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from fedloom.broker.jobs import Jobs
from fedloom.serialization.errors import FaultError, FencedError
from fedloom.serialization.messages import Commit, JobId, PayloadId, PayloadRef, SubmitJob
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from lengths import AS_FOUND, long, short

START_S, CRASHES = 10.0, 5
SHORT, LONG = short(80, 50, phases=AS_FOUND), long(1000, 80, report_multiple_bugs=False)
NUMBER = st.integers(0, 63)


@dataclass
class Held:
    """A job, as the model has it."""

    status: str = "SUBMITTED"
    claim: int = 0
    live: bool = False  # its process has a session
    lapsed: bool = False  # nobody holds the claim any more
    until: float = 0.0  # not live: when the claim lapses
    free_at: float = 0.0
    crashes: int = 0
    rounds: list[int] = field(default_factory=list[int])
    node: str = ""


class ClaimMachine(RuleBasedStateMachine):
    """Three jobs and two controllers."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs = Jobs(START_S)
        self.held: dict[str, Held] = {}
        self.now = 100.0
        self.ref = 0
        self.answered: list[tuple[str, str, int, str]] = []  # requests that were given a job: node, boot, ref, job

    def chosen(self, n: int) -> tuple[str, Held] | None:
        names = list(self.held)
        return (names[n % len(names)], self.held[names[n % len(names)]]) if names else None

    @rule(n=st.integers(0, 2), taken=st.booleans())
    def submit(self, n: int, taken: bool) -> None:
        fresh = f"job-{n}" not in self.held
        if taken and not fresh:
            with pytest.raises(FaultError, match="submitted before"):
                self.jobs.submit(
                    SubmitJob(1, "another", "demo", PayloadRef(PayloadId("a"), 1), JobId(f"job-{n}")), self.now
                )
            return
        message = SubmitJob(1, f"token-{n}", "demo", PayloadRef(PayloadId("a"), 1), JobId(f"job-{n}"))
        assert self.jobs.submit(message, self.now)[1] == fresh, "a token submits once"
        self.held.setdefault(f"job-{n}", Held())

    # ------------------------------------------------------------ controllers

    @rule(node=st.sampled_from(["controller/1", "controller/2"]), again=st.booleans(), n=NUMBER)
    def claim(self, node: str, again: bool, n: int) -> None:
        self.jobs.tick(self.now)
        self.lapse()
        if again and self.answered:
            *request, name = self.answered[n % len(self.answered)]
            held, given = self.held[name], self.jobs.given(*request)
            newest = [r for r in self.answered if r[3] == name][-1] == (*request, name)
            same = newest and held.status == "RUNNING" and not held.lapsed
            assert (given.id if given else "") == (name if same else ""), "a repeated request is answered alike"
            return
        able = [name for name, held in self.held.items() if self.claimable(held)]
        self.ref += 1
        job = self.jobs.claim(node, "boot", self.ref, self.now)
        assert (job.id if job else "") == (able[0] if able else ""), "the oldest job that nobody holds"
        if job is not None:
            held = self.held[job.id]
            assert job.claim == held.claim + 1, "claims only rise"
            held.claim, held.status, held.node = job.claim, "RUNNING", node
            held.live, held.lapsed, held.until = False, False, self.now + START_S
            self.answered.append((node, "boot", self.ref, job.id))

    def claimable(self, held: Held) -> bool:
        free = held.lapsed and self.now >= held.free_at
        return held.status == "SUBMITTED" or (held.status == "RUNNING" and free)

    def lapse(self) -> None:
        for held in self.held.values():
            if held.status == "RUNNING" and not held.live and self.now >= held.until:
                held.lapsed = True

    @rule(node=st.sampled_from(["controller/1", "controller/2"]))
    def controller_gone(self, node: str) -> None:
        self.jobs.controller_gone(node, self.now)
        for held in self.held.values():
            if held.node == node and not held.live and not held.status.startswith("FINISHED"):
                held.until = min(held.until, self.now)

    @precondition(lambda self: self.held)
    @rule(n=NUMBER, behind=st.integers(0, 3), stopped=st.booleans())
    def process_died(self, n: int, behind: int, stopped: bool) -> None:
        """A controller's word, which may be late: only that on the current claim counts, and once."""
        name, held = self.some(n)
        claim = held.claim - behind
        self.jobs.lost(name, claim, "killed", self.now, stopped=stopped)
        if held.status.startswith("FINISHED") or behind or held.lapsed:
            return
        held.crashes += not stopped
        held.lapsed, held.live = True, False
        if stopped:
            held.free_at = self.now + 1.0
        elif held.crashes >= CRASHES:
            held.status = "FINISHED:FAILED"
        else:
            held.free_at = self.now + 0.25 * 2 ** (held.crashes - 1)

    def some(self, n: int) -> tuple[str, Held]:
        found = self.chosen(n)
        assert found is not None
        return found

    # ------------------------------------------------------------ job processes

    def speaks(self, held: Held, claim: int, act: Any) -> Any:
        """What a process under this claim asks for: refused unless the claim is the current one."""
        if claim < held.claim or (claim == held.claim and held.status.startswith("FINISHED")):
            with pytest.raises(FencedError):
                act()
            return None
        if claim > held.claim:
            with pytest.raises(FaultError, match="never given"):
                act()
            return None
        return act()

    @precondition(lambda self: self.held)
    @rule(n=NUMBER, behind=st.integers(-1, 2))
    def session_up(self, n: int, behind: int) -> None:
        name, held = self.some(n)
        claim = max(0, held.claim - behind)
        if held.status != "SUBMITTED" and self.speaks(held, claim, lambda: self.jobs.session_up(name, claim)):
            held.live, held.lapsed = True, False

    @precondition(lambda self: self.held)
    @rule(n=NUMBER, behind=st.integers(0, 2))
    def session_down(self, n: int, behind: int) -> None:
        name, held = self.some(n)
        self.jobs.session_down(name, held.claim - behind, self.now)
        if not behind and held.live:
            held.live, held.until = False, self.now

    @precondition(lambda self: self.held)
    @rule(n=NUMBER, behind=st.integers(-1, 2), back=st.integers(-1, 2))
    def commit(self, n: int, behind: int, back: int) -> None:
        """The next round, the last one once more, or one before; also by a process that lost its claim."""
        name, held = self.some(n)
        if held.status == "SUBMITTED":
            return
        claim, last = max(0, held.claim - behind), held.rounds[-1] if held.rounds else -1
        round_ = max(0, last - back)
        message = Commit(1, JobId(name), claim, round_, record={"round": round_})

        def act() -> Any:
            try:
                done = self.jobs.commit(message)
            except FaultError as error:
                if error.code != "committed":
                    raise  # a claim that may not speak is refused for that first
                assert round_ < last, "committed already"
                return None
            assert round_ >= last, "no round is committed behind a later one"
            return done

        done = self.speaks(held, claim, act)
        if done is not None:
            assert done[2] == (round_ > last), "a repeated commit is not a new one"
            if done[2]:
                held.rounds.append(round_)
                held.crashes = 0

    @precondition(lambda self: self.held)
    @rule(n=NUMBER, chance=st.integers(0, 7))
    def finish(self, n: int, chance: int) -> None:
        name, held = self.some(n)
        if chance == 0 and not held.status.startswith("FINISHED"):
            self.jobs.finish(self.jobs.get(name), "FINISHED:ABORTED", "", self.now)
            held.status = "FINISHED:ABORTED"

    @rule(seconds=st.sampled_from([0.1, 0.3, 1.0, 5.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        waiting = self.jobs.tick(self.now)
        self.lapse()
        assert waiting == any(self.claimable(held) for held in self.held.values())

    # ------------------------------------------------------------ what is true

    @invariant()
    def jobs_and_model_agree(self) -> None:
        assert list(self.jobs.jobs) == list(self.held)
        for name, held in self.held.items():
            job = self.jobs.jobs[JobId(name)]
            ended = held.status.startswith("FINISHED")
            assert (job.status, job.claim, job.crashes) == (held.status, held.claim, held.crashes)
            assert ended or (job.live, job.lapsed) == (held.live, held.lapsed)
            assert (job.commit.round if job.commit else -1) == (held.rounds[-1] if held.rounds else -1)
            assert job.commits == len(held.rounds)
        assert {j.id for j in self.jobs.active()} == {n for n, h in self.held.items() if not h.status.startswith("FIN")}

    @invariant()
    def no_job_is_forgotten(self) -> None:
        for name, held in self.held.items():
            job = self.jobs.jobs[JobId(name)]
            if held.status == "RUNNING" and not held.live:
                due = job.available_at if job.lapsed else job.claim_until
                assert due <= self.now + max(START_S, 10.0), "a job without a process can be claimed before long"


def test_claims_only_rise_and_a_lower_one_is_refused() -> None:
    run_state_machine_as_test(ClaimMachine, settings=SHORT)


@pytest.mark.proof
@pytest.mark.timeout(1500)
def test_claims_only_rise_and_a_lower_one_is_refused_for_long() -> None:
    run_state_machine_as_test(ClaimMachine, settings=LONG)
