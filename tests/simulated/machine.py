"""One machine room in one thread: virtual time, simulated processes and threads, and whoever dies in the middle.

Every simulated thread is a greenlet; whatever would block switches to the scheduler, which goes on with whoever is due
first. Time passes only there. All chance comes from one seed, so that a seed is a schedule: the same one runs the same
steps, whatever machine it runs on.
"""

from __future__ import annotations

import contextlib
import heapq
import traceback
from collections.abc import Callable
from random import Random
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

EPOCH = 1_700_000_000.0
#: What a look at the world costs whoever looks: nothing in this room takes no time at all.
STEP_S = 0.0005
#: No wait is shorter: a loop that waits for less than a double can tell from now would never see the time pass.
_LEAST_S = 1e-5
_NOTHING = object()


class Hang(Exception):
    """The room did not come to rest in time."""


class Party:
    """A simulated process: its threads, and what the system takes back when it dies."""

    def __init__(self, machine: Machine, name: str, pid: int, parent: Party | None) -> None:
        self.machine = machine
        self.name = name
        self.pid = pid
        self.parent = parent
        self.children: list[Party] = []
        self.alive = True
        self.code: int | None = None
        self.steps = 0
        self.crash_at = 0  # dies at this step, if it gets there
        self.wall_offset = 0.0
        self.frozen_until = 0.0  # stopped, as by SIGSTOP: it does not know
        self.tasks: list[Task] = []
        #: called when it ends, however it ends: closes what the system would
        self.releases: list[Callable[[bool], None]] = []
        self.ended: list[Callable[[Party], None]] = []
        if parent is not None:
            parent.children.append(self)


class Task:
    """A simulated thread."""

    __slots__ = ("blocked_at", "done", "glet", "name", "party", "token", "waiters")

    def __init__(self, party: Party, name: str) -> None:
        self.party = party
        self.name = name
        self.token = 0  # of its present wait: a wake-up for an earlier one is nobody's
        self.done = False
        self.blocked_at = 0.0
        self.glet: greenlet | None = None
        self.waiters: list[tuple[Task, int]] = []


class Machine:
    """The room."""

    def __init__(self, seed: int, *, max_steps: int = 400_000) -> None:
        self.rng = Random(seed)
        self.now = 0.0
        self.steps = 0
        self.max_steps = max_steps
        self.closed = False
        self.parties: dict[int, Party] = {}
        self.current: Task | None = None
        #: simulated threads that ended with an error nobody caught
        self.crashes: list[tuple[str, str, BaseException]] = []
        #: what is told about the run, if anybody listens
        self.trace: Callable[[str], None] | None = None
        self._hub: greenlet = getcurrent()
        self._heap: list[tuple[float, float, Any, int, Any]] = []
        self._next_pid = 100
        self._graveyard: list[greenlet] = []

    # ------------------------------------------------------------ processes and threads

    def start(self, name: str, main: Callable[[], Any], parent: Party | None = None) -> Party:
        """A new process."""
        self._next_pid += 1
        party = Party(self, name, self._next_pid, parent)
        self.parties[party.pid] = party

        def run() -> None:
            code = main()
            self.exit(party, code if isinstance(code, int) else 0)

        self.spawn(party, "main", run)
        self.say(f"start {name} pid {party.pid}")
        return party

    def spawn(self, party: Party, name: str, target: Callable[[], Any]) -> Task:
        """A new thread of a process."""
        task = Task(party, name)

        def run(_: Any = None) -> None:
            try:
                target()
            except GreenletExit:
                pass
            except BaseException as error:  # noqa: BLE001 - the checker decides what may end a thread
                if not self.closed:
                    self.crashes.append((party.name, name, error))
                    self.say(f"{party.name}/{name} ended with {error!r}")
                    if task is party.tasks[0]:
                        self.exit(party, 1)
            task.done = True
            for waiter, token in task.waiters:
                self.wake(waiter, token)

        task.glet = greenlet(run, parent=self._hub)
        party.tasks.append(task)
        self._push(self.now, task, task.token, None)
        return task

    def exit(self, party: Party, code: int) -> None:
        """A process ends by itself: what it has sent still arrives."""
        if party.alive:
            party.code = code
            self._end(party, polite=True)
            self._leave()

    def crash(self, party: Party, why: str = "") -> None:
        """Kill -9. Does not return if it is the caller's own."""
        if party.alive:
            self.say(f"crash {party.name} {why}")
            party.code = -9
            self._end(party, polite=False)
            self._leave()

    def _end(self, party: Party, *, polite: bool) -> None:
        party.alive = False
        for child in party.children:
            if child.alive:
                self.say(f"crash {child.name} with its parent")
                child.code = -9
                self._end(child, polite=False)
        for release in party.releases:
            release(polite)
        for task in party.tasks:
            task.token += 1
            if task.glet is not None:
                self._graveyard.append(task.glet)
        for tell in party.ended:
            tell(party)

    def _leave(self) -> None:
        me = self.current
        if me is not None and not me.party.alive:
            self._hub.switch()  # never to come back

    # ------------------------------------------------------------ waiting

    def step(self, cost_s: float = 0.0) -> None:
        """Something that the outside can see is about to be done: the place where a process may die."""
        task = self.current
        if task is None:
            return
        party = task.party
        party.steps += 1
        if party.steps == party.crash_at:
            self.crash(party, f"at step {party.steps}")

    def block(self, timeout_s: float | None = None) -> bool:
        """Let others run until somebody wakes this thread (True), or the time is over (False)."""
        task = self.current
        if task is None or self.closed:
            raise GreenletExit
        task.token += 1
        task.blocked_at = self.now
        if timeout_s is not None:
            self._push(self.now + max(_LEAST_S, timeout_s), task, task.token, False)
        value = self._hub.switch()
        task.token += 1
        if self.closed:
            raise GreenletExit
        return bool(value)

    def pause(self) -> None:
        """A moment in which others may run."""
        self.block(self.rng.random() * STEP_S)

    def me(self) -> tuple[Task, int]:
        """Whom to wake from the wait that this thread begins next."""
        task = self.current
        if task is None or self.closed:
            raise GreenletExit
        return task, task.token + 1

    def wake(self, task: Task, token: int) -> None:
        """Make a waiting thread go on, unless it has done so."""
        if task.token == token and task.party.alive:
            self._push(self.now, task, token, True)

    def call_at(self, when: float, call: Callable[[], None]) -> None:
        """Do something then, in nobody's name."""
        self._push(max(when, self.now), call, 0, _NOTHING)

    def _push(self, when: float, what: Any, token: int, value: Any) -> None:
        heapq.heappush(self._heap, (when, self.rng.random(), what, token, value))

    # ------------------------------------------------------------ running

    def run(self, until: Callable[[], bool], limit_s: float) -> None:
        """Go on until the condition holds.

        Raises:
            Hang: it did not within ``limit_s`` of virtual time, or within the bound on steps.
        """
        heap = self._heap
        end = self.now + limit_s
        while not until():
            if not heap:
                raise Hang("nobody waits for anything any more")
            when, _, what, token, value = heapq.heappop(heap)
            if when > end:
                raise Hang(f"not done after {limit_s:g} s")
            self.steps += 1
            if self.steps > self.max_steps:
                raise Hang(f"not done after {self.max_steps} steps, at {self.now:.3f} s")
            self.now = max(self.now, when)
            if value is _NOTHING:
                what()
            elif what.party.frozen_until > self.now:
                heapq.heappush(heap, (what.party.frozen_until, self.rng.random(), what, token, value))
            elif what.token == token and what.party.alive and not what.done:
                self.current = what
                what.glet.switch(value)
                self.current = None

    def close(self) -> None:
        """The end of everything: whoever still waits is let go."""
        self.closed = True
        living = [task.glet for party in self.parties.values() for task in party.tasks if task.glet is not None]
        for glet in {id(g): g for g in (*living, *self._graveyard)}.values():
            for _ in range(100):  # a loop's guard may catch even this
                if glet.dead or not glet:
                    break
                with contextlib.suppress(BaseException):  # whatever a dying thread says
                    glet.throw(GreenletExit)
        self._heap.clear()
        self._graveyard.clear()
        for party in self.parties.values():
            party.tasks.clear()
            party.releases.clear()

    def say(self, text: str) -> None:
        """Tell whoever listens."""
        if self.trace is not None:
            self.trace(f"{self.now:10.4f} {text}")

    def stacks(self) -> str:
        """Where every living thread is."""
        out: list[str] = []
        for party in self.parties.values():
            for task in party.tasks:
                if party.alive and not task.done and task.glet is not None and task.glet.gr_frame is not None:
                    frames = traceback.extract_stack(task.glet.gr_frame)[-4:]
                    where = " < ".join(f"{f.name}:{f.filename.rpartition('/')[2]}:{f.lineno}" for f in reversed(frames))
                    out.append(f"{party.name}/{task.name} since {task.blocked_at:.3f}: {where}")
        return "\n".join(out)
