"""A network of the run's own: peers in a namespace behind a veth pair, which can be taken down as a cable is pulled.

Unlike a connection that a proxy cuts, nobody is told: both sides are silent to each other until it is up again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess


class Network:
    """Made with the object, gone with `close`. Needs Linux, iproute2 and the right to make namespaces.

    Attributes:
        host: the address of this machine's end, where the broker is reached.
        prefix: words before a command that is to run at the other end.

    Raises:
        subprocess.CalledProcessError: this user may not make one.
    """

    def __init__(self) -> None:
        number = os.getpid() % 16384
        self._name = f"fedloom-{number}"
        self._end = f"fl{number}"
        net = f"10.213.{number // 64}.{4 * (number % 64)}".rsplit(".", 1)
        self.host, other = (f"{net[0]}.{int(net[1]) + n}" for n in (1, 2))
        self.prefix = ("ip", "netns", "exec", self._name)
        try:
            _ip("netns", "add", self._name)
            _ip("link", "add", self._end, "type", "veth", "peer", "name", "broker", "netns", self._name)
            _ip("address", "add", f"{self.host}/30", "dev", self._end)
            _ip("link", "set", self._end, "up")
            _ip("-n", self._name, "address", "add", f"{other}/30", "dev", "broker")
            for name in ("broker", "lo"):
                _ip("-n", self._name, "link", "set", name, "up")
        except BaseException:
            self.close()
            raise

    def down(self) -> None:
        """Pull the cable."""
        _ip("link", "set", self._end, "down")

    def up(self) -> None:
        """Plug it in."""
        _ip("link", "set", self._end, "up")

    def close(self) -> None:
        """Behind the end of all processes."""
        for words in (("link", "delete", self._end), ("netns", "delete", self._name)):
            with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError):
                _ip(*words)


def may_make() -> bool:
    """Whether this process may make such a network."""
    if shutil.which("ip") is None:
        return False
    try:
        Network().close()
    except subprocess.CalledProcessError:
        return False
    return True


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
