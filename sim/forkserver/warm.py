"""The launcher's side of the warm process: its start, what it is to load, its end.

Importing this takes a few milliseconds: the warm process is started before anything else is imported here.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping

from ...serialization.errors import ProcessError
from ...serialization.scratch import Scratch
from .client import Asked, WarmClient
from .wire import Preloaded

__all__ = ["THREAD_ENV", "Warm"]

#: One thread for each library: an OpenMP pool does not survive a fork, and a site's bits must not depend on the cores.
THREAD_ENV = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
}
#: Variables that libraries and the interpreter read when they are loaded: to set one later would do nothing.
_READ_AT_IMPORT = ("PYTHON", "LD_", "OMP_", "GOMP_", "MKL_", "OPENBLAS_", "NPY_", "TORCH", "PYTORCH", "HF_", "MALLOC_")
STOP_S = 0.6

_BOOT = "from fedloom.sim.forkserver.server import main; main()"


class Warm(WarmClient):
    """The warm process itself, as its launcher holds it; closing it ends everything that came out of it.

    Args:
        skip: modules that it must not load.

    Attributes:
        run_dir: a private folder with a short name, for the sockets of one run; it goes with the process.
        path: where other clients connect.

    Raises:
        ProcessError: no interpreter can be started here.
    """

    def __init__(self, skip: Iterable[str] = ()) -> None:
        if sys.platform != "linux":
            raise ProcessError(f"simulations need Linux (parent-death signals, /proc); this is {sys.platform}")
        self._scratch = Scratch("sim", short=True)
        self.run_dir = self._scratch.path
        self.path = self.run_dir / "warm"
        self.log_path = self.run_dir / "warm.log"
        self.skip = frozenset(skip)
        self.wanted: dict[str, None] = {}
        self.loading: list[Asked] = []
        self._env = dict(os.environ)
        ours, theirs = socket.socketpair()
        # the parent-death signal follows the thread, not the process: only the main thread is sure to stay
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        try:
            with theirs, self.log_path.open("ab") as output:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _BOOT, str(theirs.fileno()), str(self.run_dir), str(parent)],
                    env={**self._env, **THREAD_ENV},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=[theirs.fileno()],
                    process_group=0,  # a Ctrl-C at the terminal is the launcher's to handle
                )
        except OSError as error:
            ours.close()
            self._scratch.close()
            raise ProcessError(f"cannot start {sys.executable!r}: {error}") from None
        super().__init__(ours)

    def load(self, modules: Iterable[str]) -> None:
        """Have modules imported, without waiting. Those of `skip` are left out.

        Raises:
            ProcessError: the warm process has gone.
        """
        wanted = [name for name in modules if name not in self.skip]
        self.wanted.update(dict.fromkeys(wanted))
        self.loading.append(self.begin_preload(wanted))

    def loaded(self) -> list[Preloaded]:
        """Wait for everything that `load` has asked for.

        Raises:
            ProcessError: the warm process has gone; with what it said last.
        """
        try:
            return [self.finish_preload(asked) for asked in self.loading]
        except ProcessError as error:
            words = self.last_words().strip()
            raise ProcessError(f"{error}\n{words}" if words else str(error)) from None
        finally:
            self.loading.clear()

    def follow_env(self, env: Mapping[str, str]) -> bool:
        """Give it this environment, where it can still take it on; else it is of no use any more.

        The job's script may have set variables since the process was started, and its clients are to see them.

        Raises:
            ProcessError: the warm process has gone.
        """
        changed = {name for name in self._env.keys() | env.keys() if self._env.get(name) != env.get(name)}
        changed -= THREAD_ENV.keys()
        if any(name.startswith(_READ_AT_IMPORT) for name in changed):
            return False
        if changed:
            self.set_env({name: env[name] for name in changed if name in env}, sorted(changed - env.keys()))
            self._env = dict(env)
        return True

    def last_words(self, limit: int = 2000) -> str:
        """The end of what the warm process and processes without a log of their own have written."""
        try:
            return self.log_path.read_bytes()[-limit:].decode(errors="replace")
        except OSError:
            return ""

    def close(self) -> None:
        """Kill every process that came out of it, and it; within a second. Harmless a second time."""
        super().close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            # in the middle of an import, or waiting for a process that the kernel does not let go
            self.process.kill()
            self.process.wait()
            self.kill_others()
        self._scratch.close()
