"""``fedloom broker``: the control loop in this process, the data process as its child.

The data process is started anew when it dies, and the kernel kills it when this process does. `start_broker` runs the
whole thing as a child of a test.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import structlog

from ..serialization.errors import FedloomError, LinkError, LinkTimeout, StorageError
from ..serialization.scratch import Scratch
from .control import ControlConfig, ControlLoop
from .data import STORAGE_EXIT, DataConfig
from .sockets import data_endpoint_for, free_endpoint
from .spool import Durability

__all__ = ["Broker", "BrokerConfig", "internal_endpoint", "main", "run_broker", "start_broker"]

log = structlog.get_logger(__name__)

_MAX_INTERNAL = 100
_STOP_S = 0.5
_RESTART_S = 0.1
_RESTART_MAX_S = 5.0
_STEADY_S = 30.0
_READY = "fedloom broker ready at "


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """The options of ``fedloom broker``; see `ControlConfig` for the meaning of times and sizes."""

    store: Path
    bind: str = "tcp://127.0.0.1:7600"
    data_bind: str = ""
    advertise: str = ""
    durability: Durability = "power"
    integrity: Literal["digest", "size"] = "digest"
    insecure: bool = False
    trust_local: bool = True
    chunk_bytes: int = 1024 * 1024
    window: int = 8
    ping_s: float = 5.0
    dead_s: float = 30.0
    lost_s: float = 10.0
    takeover_s: float = 1.0
    start_s: float = 30.0
    retry_s: float = 1.0
    quota_bytes: int = 0  # 0: four fifths of the disk's free space at the start, and what the store holds
    bounds: Mapping[str, int | float] = field(default_factory=dict[str, int | float])  # further ones, see `options`

    def control(self, internal: str) -> ControlConfig:
        """For the control loop; a wildcard port becomes a concrete one here, since the data link's is next to it."""
        bind = free_endpoint(self.bind)
        data_bind = self.data_bind or data_endpoint_for(bind)
        fields: dict[str, Any] = asdict(self)
        fields |= {name: value for name, value in self.bounds.items() if name in fields}
        fields |= {"store": self.store.absolute(), "bind": bind, "data_bind": data_bind, "internal": internal}
        return ControlConfig(**fields)


def data_config(control: ControlConfig, parent: int = 0) -> DataConfig:
    """For the data process of this control process."""
    return DataConfig(
        store=control.store,
        bind=control.data_bind or data_endpoint_for(control.bind),
        internal=control.internal,
        durability=control.durability,
        integrity=control.integrity,
        insecure=control.insecure,
        chunk_bytes=control.chunk_bytes,
        window=control.window,
        trust_local=control.local,
        bounds=control.bounds,
        parent=parent,
    )


@contextlib.contextmanager
def internal_endpoint(store: Path) -> Generator[str]:
    """Where control and data process meet: in the store, or in a folder of its own where that path is too long."""
    path = store.absolute() / "run" / "internal"
    if len(os.fsencode(path)) > _MAX_INTERNAL:
        with Scratch("broker", short=True) as folder:
            yield f"ipc://{folder}/internal"
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    yield f"ipc://{path}"


class DataChild:
    """The data process, kept running."""

    def __init__(self, config: ControlConfig) -> None:
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._start_at = 0.0
        self._pause_s = _RESTART_S
        self.seen_up = False

    def start(self) -> None:
        """Start it; it ends with this process."""
        argument = data_config(self._config, os.getpid()).to_json()
        command = [sys.executable, "-m", "fedloom.broker.data", argument]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self._started_at = time.monotonic()
        (self._config.store / "run" / "data.pid").write_text(f"{self._process.pid}\n")

    def watch(self) -> bool:
        """Start it again if it has died, with a growing pause; whether it was found dead just now.

        Raises:
            LinkError: it ended before it ever worked: its endpoint is in use or may not be bound.
        """
        now = time.monotonic()
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return False
            if not self.seen_up:
                raise LinkError(
                    f"the data link at {self._config.data_bind} could not start (exit code {code}): its own message is"
                    " above; free that port, or choose another with --data-bind"
                )
            if code == STORAGE_EXIT:
                # after a failed sync the kernel may call pages clean that never reached the disk: no retry is safe
                raise StorageError(f"the disk of store {self._config.store} failed the data process: see its message")
            if now - self._started_at > _STEADY_S:
                self._pause_s = _RESTART_S
            log.error(
                "data_process_died",
                code=code,
                next=f"started again in {self._pause_s:g} s; streams go on where they were",
            )
            self._process = None
            self._start_at = now + self._pause_s
            self._pause_s = min(_RESTART_MAX_S, self._pause_s * 2)
            return True
        if now >= self._start_at:
            self.start()
        return False

    def stop(self) -> None:
        """End it, politely at first."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_STOP_S)
        self._process = None


def run_broker(config: BrokerConfig, on_ready: Callable[[str], None] | None = None) -> None:
    """Run a broker in this process (its main thread) until SIGTERM or SIGINT; both stop it within a second.

    Args:
        on_ready: called with the control endpoint once both links accept peers.

    Raises:
        FaultError: ``insecure_bind``. LinkError: an endpoint is in use.
        StorageError: the store is another broker's, damaged, or its disk failed.
    """
    with internal_endpoint(config.store) as internal:
        _run(config.control(internal), on_ready)


def _run(control: ControlConfig, on_ready: Callable[[str], None] | None) -> None:
    stop = threading.Event()
    loop = ControlLoop(control)
    child = DataChild(control)

    def end(signum: int, frame: object) -> None:
        stop.set()
        loop.wake()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}

    def turn() -> None:
        if child.watch():
            loop.core.state.counters["dead.data"] += 1
        if not child.seen_up and loop.data_up:
            child.seen_up = True
            log.info("broker_ready", endpoint=loop.endpoint, data=control.data_bind, store=str(control.store))
            if on_ready is not None:
                on_ready(loop.endpoint)

    try:
        child.start()
        loop.run(stop, turn)
    except StorageError as error:
        next_ = "it ends; nothing acknowledged is lost: make room or mend the disk, and start it again"
        log.error("broker_failed", error=str(error), next=next_)
        raise
    finally:
        child.stop()
        loop.close()
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- a broker for tests


@dataclass(slots=True)
class Broker:
    """A broker that runs as a child process; `kill` and `start` again to see what it remembers."""

    config: BrokerConfig
    env: dict[str, str] = field(default_factory=dict[str, str])
    log_path: Path | None = None
    endpoint: str = ""
    _process: subprocess.Popen[str] | None = None
    _log: IO[bytes] | None = None

    def start(self, timeout_s: float = 30.0) -> Broker:
        """Start it and wait until it is ready. After the first time it listens where it did before.

        Raises:
            LinkError: it ended instead. LinkTimeout: it was not ready in time.
        """
        assert not self.alive, "it runs already"
        if self.endpoint:
            self.config = replace(self.config, bind=self.endpoint)
        path = self.log_path or self.config.store / "broker.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log = path.open("ab")
        options = json.dumps(asdict(self.config) | {"store": str(self.config.store)})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedloom.broker.service", options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | self.env | {"FEDLOOM_PARENT": str(os.getpid())},
            text=True,
        )
        lines: list[str] = []
        reader = threading.Thread(target=self._read_ready, args=(lines,), name="fedloom-broker-ready", daemon=True)
        reader.start()
        reader.join(timeout_s)
        if not lines:
            ended = self._process.poll()
            self.kill()
            said = path.read_text(errors="replace")[-2000:]
            if ended is None and reader.is_alive():
                raise LinkTimeout(f"the broker was not ready within {timeout_s:g} s:\n{said}")
            raise LinkError(f"the broker ended (exit code {ended}):\n{said}")
        self.endpoint = lines[0].removeprefix(_READY).strip()
        return self

    def _read_ready(self, lines: list[str]) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_READY):
                lines.append(line)
                return

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The control process."""
        assert self._process is not None
        return self._process.pid

    @property
    def data_pid(self) -> int:
        """The data process."""
        return int((self.config.store / "run" / "data.pid").read_text())

    def wait(self, timeout_s: float) -> int:
        """Its exit code once it has ended.

        Raises:
            LinkTimeout: it still runs.
        """
        assert self._process is not None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise LinkTimeout(f"the broker still runs after {timeout_s:g} s") from None

    def stop(self, timeout_s: float = 5.0) -> int:
        """SIGTERM; its exit code."""
        return self._end(signal.SIGTERM, timeout_s)

    def kill(self) -> int:
        """SIGKILL, as a crash; its data process goes with it."""
        return self._end(signal.SIGKILL, 5.0)

    def _end(self, number: int, timeout_s: float) -> int:
        process = self._process
        assert process is not None
        if process.poll() is None:
            process.send_signal(number)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait(timeout_s)
        if process.stdout is not None:
            process.stdout.close()
        if self._log is not None:
            self._log.close()
            self._log = None
        return code

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def start_broker(
    store: Path,
    bind: str = "tcp://127.0.0.1:*",
    *,
    env: dict[str, str] | None = None,
    timeout_s: float = 30.0,
    **options: Any,
) -> Broker:
    """A broker as a child process, ready: ``options`` are fields of `BrokerConfig`, ``env`` adds to the environment."""
    return Broker(BrokerConfig(store=store, bind=bind, **options), dict(env or {})).start(timeout_s)


def main(argv: list[str] | None = None) -> int:
    """``python -m fedloom.broker.service JSON``: the fields of `BrokerConfig`. For `start_broker`."""
    (options,) = sys.argv[1:] if argv is None else argv
    fields: dict[str, Any] = json.loads(options)
    fields["store"] = Path(fields["store"])
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    try:
        run_broker(
            BrokerConfig(**fields),
            on_ready=lambda endpoint: print(_READY + endpoint, flush=True),
        )
    except FedloomError as error:
        log.error("broker_failed", error=str(error))
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
