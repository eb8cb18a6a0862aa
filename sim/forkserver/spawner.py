"""The agent's hosts, forked from the warm process."""

from __future__ import annotations

from ...executor.host import ENV_PARENT
from ...executor.hosts import HostRequest, open_log
from ...serialization.errors import ProcessError
from .client import ForkedProcess, WarmClient

__all__ = ["ForkSpawner"]


class ForkSpawner:
    """The agent's `executor.hosts.Spawner`: hosts forked from the warm process. Thread-safe.

    The hosts end with the connection, so with the agent, however it ends.
    """

    def __init__(self, client: WarmClient) -> None:
        self._client = client

    def spawn(self, request: HostRequest) -> ForkedProcess:
        """Start a host, or the request's command.

        Raises:
            OSError: it cannot be started.
        """
        if request.log_path:
            open_log(request.log_path).close()  # makes its folder, and moves a log aside that has grown too large
        try:
            return self._client.fork(
                request.name or "host",
                "" if request.argv else "fedloom.executor.host:main",
                argv=request.argv,
                env=dict(request.env),
                unset=[ENV_PARENT],  # a host's parent is the warm process, and sees to it itself
                cwd=request.cwd,
                log_path=request.log_path,
            )
        except ProcessError as error:
            raise OSError(str(error)) from None
