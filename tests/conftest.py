"""What many tests need: ports, workspaces, processes that are always gone in the end, and their logs on failure."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import structlog

ROOT = Path(__file__).resolve().parent.parent
#: Every process that a test starts, and whatever those start, has this in its environment: no orphan escapes.
MARK = "FEDLOOM_TEST_RUN"
LOG_TAIL_CHARS = 6000

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a run that a shell has put into the background ignores Ctrl-C, and so would every process that a test starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Let fixtures see whether their test failed."""
    report = yield
    item.stash.setdefault(_reports, {})[report.when] = report
    return report


_reports: pytest.StashKey[dict[str, pytest.TestReport]] = pytest.StashKey()


def failed(item: pytest.Item) -> bool:
    """Whether the test went wrong so far."""
    return any(report.failed for report in item.stash.get(_reports, {}).values())


def eventually(check: Callable[[], object], timeout_s: float = 20.0, what: str = "") -> object:
    """The first truthy value of ``check()``; an AssertionError when none came in time."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what or check}")
        pause.wait(0.05)


@pytest.fixture(autouse=True)
def _default_logging() -> Iterator[None]:
    """What a command sets up for its process must not reach the next test."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def repo() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A TCP port on loopback that is free now, as is the one behind it; never the same twice in this process."""
    return _next_port


def _next_port() -> int:
    for _, port in zip(range(11_000), _PORTS, strict=False):
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port
    raise AssertionError("no two free ports in a row")


#: Below those that the kernel gives to whoever connects (32768 on Linux), which would be in use before they are bound.
_PORTS = itertools.islice(itertools.cycle(range(10_000, 32_000, 2)), random.SystemRandom().randrange(11_000), None)


@pytest.fixture
def endpoint(free_port: Callable[[], int]) -> str:
    """A TCP endpoint on loopback for a broker."""
    return f"tcp://127.0.0.1:{free_port()}"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """An empty folder whose path has a space."""
    folder = tmp_path / "work space"
    folder.mkdir()
    return folder


class Child:
    """A process of a test's, in a process group of its own, with a log of what it prints."""

    def __init__(self, process: subprocess.Popen[bytes], name: str, log_path: Path) -> None:
        self.process = process
        self.name = name
        self.log_path = log_path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def text(self) -> str:
        """What it has printed so far, both streams."""
        return self.log_path.read_text(errors="replace")

    def wait(self, timeout_s: float = 60.0) -> int:
        """Its exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.name} still runs after {timeout_s:g} s:\n{self.text[-LOG_TAIL_CHARS:]}"
            ) from None

    def says(self, words: str, timeout_s: float = 30.0) -> None:
        """Wait until it has printed these words."""

        def check() -> bool:
            if words in self.text:
                return True
            if self.process.poll() is not None:
                raise AssertionError(
                    f"{self.name} ended with {self.process.returncode} and never said {words!r}:\n{self.text}"
                )
            return False

        eventually(check, timeout_s, f"{self.name} says {words!r}; it said:\n{self.text[-LOG_TAIL_CHARS:]}")

    def send_signal(self, signum: int) -> None:
        """To this one process."""
        self.process.send_signal(signum)

    def interrupt(self) -> None:
        """What Ctrl-C at a terminal does: SIGINT to the whole group."""
        os.killpg(self.pid, signal.SIGINT)

    def kill(self) -> None:
        """kill -9, this one process."""
        self.process.kill()
        self.process.wait(10)

    def stop(self, timeout_s: float = 10.0) -> int:
        """SIGTERM, and its exit code."""
        self.process.terminate()
        return self.wait(timeout_s)


class Children:
    """The processes of one test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.all: list[Child] = []

    def start(
        self,
        argv: Sequence[str | Path],
        *,
        name: str = "",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Child:
        """Start a command."""
        name = name or Path(str(argv[0])).name
        log_path = self.folder / f"{len(self.all):02d}-{name}.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [str(part) for part in argv],
                env={**os.environ, MARK: self.mark, "PYTHONUNBUFFERED": "1", **(env or {})},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        child = Child(process, name, log_path)
        self.all.append(child)
        return child

    def python(self, *argv: str | Path, name: str = "", **kwargs: object) -> Child:
        """Start a Python script or module with the interpreter that runs the tests."""
        return self.start([sys.executable, *argv], name=name or Path(str(argv[0])).stem, **kwargs)  # type: ignore[arg-type]

    def fedloom(self, *argv: str | Path, **kwargs: object) -> Child:
        """Start a `fedloom` command."""
        return self.python("-m", "fedloom", *argv, name=f"fedloom-{argv[0]}", **kwargs)

    def output(self, argv: Sequence[str | Path], timeout_s: float = 60.0, **kwargs: object) -> tuple[int, str, str]:
        """Run a command to its end: exit code, standard output, standard error."""
        env = {**os.environ, MARK: self.mark, **kwargs.pop("env", {})}  # type: ignore[dict-item]
        done = subprocess.run(
            [str(part) for part in argv],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            **kwargs,  # type: ignore[call-overload]
        )
        return done.returncode, done.stdout, done.stderr

    def fedloom_output(self, *argv: str | Path, timeout_s: float = 60.0, **kwargs: object) -> tuple[int, str, str]:
        """Run a `fedloom` command to its end."""
        return self.output([sys.executable, "-m", "fedloom", *argv], timeout_s, **kwargs)

    def alive(self) -> list[int]:
        """The ids of all processes, direct or not, that this test has started and that still run."""
        wanted = f"{MARK}={self.mark}".encode()
        found: list[int] = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state not in "ZX":
                        found.append(int(entry.name))
        return found

    def gone(self, timeout_s: float = 5.0) -> None:
        """Assert that no process of this test is left."""
        eventually(lambda: not self.alive(), timeout_s, f"processes are gone; left: {self.describe()}")

    def describe(self) -> str:
        """The command lines of what still runs."""
        lines: list[str] = []
        for pid in self.alive():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                lines.append(f"{pid} {words.strip()}")
        return "; ".join(lines) or "none"

    def close(self) -> None:
        """End everything, by id: gently the test's own children, then whatever is left of their descendants."""
        for child in reversed(self.all):
            if child.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.terminate()
        for child in self.all:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(3)
        for _ in range(5):
            left = self.alive()
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            for child in self.all:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(2)
            if not left:
                return

    def dump(self) -> str:
        """The end of every log."""
        parts = [f"--- {child.name} (pid {child.pid}, exit code {child.process.poll()})" for child in self.all]
        return "\n".join(f"{part}\n{c.text[-LOG_TAIL_CHARS:]}" for part, c in zip(parts, self.all, strict=True))


@pytest.fixture
def children(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    """Start processes here: they are gone when the test ends, and their logs are shown if it failed."""
    processes = Children(tmp_path_factory.mktemp("logs"))
    try:
        yield processes
    finally:
        was_failed = failed(request.node)
        processes.close()
        if was_failed and processes.all:
            print(processes.dump(), file=sys.stderr)
