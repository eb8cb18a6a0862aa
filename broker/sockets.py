"""The one socket factory: every option is set here and nowhere else.

What bites, and what is done about it: a ROUTER drops silently at its high-water mark (MANDATORY, and every send is
DONTWAIT); a DEALER queues to endpoints that do not exist (IMMEDIATE); a stopped peer goes unnoticed (ZMTP heartbeats);
LINGER defaults to for ever (0); all peers reconnect at once after a restart (random intervals); routing ids can be
guessed and repeat (no IDENTITY, no HANDOVER). Sockets belong to one thread and do not survive a fork: make the context
in the process that uses it.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import random
import resource
import socket as stdlib_socket
from pathlib import Path
from typing import Literal

import zmq

from ..serialization.envelope import MAX_BODY_BYTES, MAX_TAIL_BYTES
from ..serialization.errors import FaultError, LinkError

__all__ = [
    "CHUNK_BYTES",
    "SocketKind",
    "bind",
    "connect",
    "data_endpoint_for",
    "free_endpoint",
    "is_local",
    "make_context",
    "make_socket",
    "resolve_data_endpoint",
]

#: control-router and data-router listen for peers; internal-router listens for the broker's own data process.
SocketKind = Literal[
    "control-router", "data-router", "internal-router", "control-dealer", "data-dealer", "internal-dealer"
]

CHUNK_BYTES = 1024 * 1024
_CONTROL_HWM = 1024
_DATA_HWM = 64
_HEARTBEAT_MS = 5000
_HEARTBEAT_TIMEOUT_MS = 15000
_HANDSHAKE_MS = 10000
_RECONNECT_MAX_MS = 10000
_MAX_IPC_PATH = 100
_RECONNECT_MS = (100, 1000)


def make_context(io_threads: int = 1) -> zmq.Context[zmq.Socket[bytes]]:
    """A context of this process's own, with room for as many sockets as the process may open files."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    context.set(zmq.MAX_SOCKETS, max(1023, min(soft, 65535)) if soft > 0 else 65535)
    return context


def make_socket(
    context: zmq.Context[zmq.Socket[bytes]], kind: SocketKind, *, chunk_bytes: int = CHUNK_BYTES
) -> zmq.Socket[bytes]:
    """A socket of this kind with all its options set; ``chunk_bytes`` bounds a data socket's frames."""
    link, _, shape = kind.partition("-")
    sock = context.socket(zmq.ROUTER if shape == "router" else zmq.DEALER)
    data = link == "data"
    hwm = _DATA_HWM if data else _CONTROL_HWM
    sock.set(zmq.LINGER, 0)
    sock.set(zmq.SNDHWM, hwm)
    sock.set(zmq.RCVHWM, hwm)
    # what is over it is cut by libzmq with the connection, so this is the last line; the codec refuses politely before
    sock.set(zmq.MAXMSGSIZE, (max(chunk_bytes, MAX_BODY_BYTES) if data else MAX_TAIL_BYTES) + 4096)
    sock.set(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    sock.set(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    sock.set(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    sock.set(zmq.HEARTBEAT_TTL, _HEARTBEAT_TIMEOUT_MS)
    sock.set(zmq.TCP_KEEPALIVE, 1)
    sock.set(zmq.TCP_KEEPALIVE_IDLE, 30)
    if shape == "router":
        sock.set(zmq.ROUTER_MANDATORY, 1)
        sock.set(zmq.BACKLOG, 4096)
    else:
        sock.set(zmq.IMMEDIATE, 1)
        # the data process finds its control at once; peers come back with jitter (user code may have seeded `random`)
        sock.set(zmq.RECONNECT_IVL, 50 if link == "internal" else random.SystemRandom().randint(*_RECONNECT_MS))
        sock.set(zmq.RECONNECT_IVL_MAX, 500 if link == "internal" else _RECONNECT_MAX_MS)
    return sock


def bind(sock: zmq.Socket[bytes], endpoint: str, insecure: bool = False) -> str:
    """Bind, and return the actual endpoint (a wildcard port filled in).

    Raises:
        FaultError: ``insecure_bind``: other machines could reach the endpoint and nobody said that they may.
        LinkError: the endpoint is in use, cannot be read, or is not of this machine.
    """
    if not is_local(endpoint) and not insecure:
        raise FaultError(
            "insecure_bind",
            f"{endpoint} can be reached from other machines and the link has no keys: bind tcp://127.0.0.1:PORT or"
            " ipc://PATH, or say --insecure if the network is yours alone",
        )
    transport, address = _split(endpoint)
    if transport == "ipc":
        _check_ipc(endpoint, address)
    if transport == "tcp":
        if "[" in address:
            sock.set(zmq.IPV6, 1)
        host, port = _host_port(endpoint)
        endpoint = f"tcp://{_lookup(host)}:{'*' if port == '0' else port}"
    try:
        sock.bind(endpoint)
    except zmq.ZMQError as error:
        raise LinkError(_bind_advice(endpoint, error)) from None
    if transport == "ipc" and not address.startswith("@"):
        with contextlib.suppress(OSError):
            Path(address).chmod(0o600)
    actual = sock.get(zmq.LAST_ENDPOINT)
    return actual.rstrip(b"\0").decode() if isinstance(actual, bytes) else endpoint


def connect(sock: zmq.Socket[bytes], endpoint: str) -> None:
    """Connect; that the other side is not there yet is no error.

    Raises:
        LinkError: the endpoint cannot be read.
    """
    transport, address = _split(endpoint)
    if transport == "tcp" and "[" in address:
        sock.set(zmq.IPV6, 1)
    try:
        sock.connect(endpoint)
    except zmq.ZMQError as error:
        raise LinkError(f"cannot connect to {endpoint}: {error}; it is tcp://HOST:PORT or ipc://PATH") from None


def is_local(endpoint: str) -> bool:
    """Whether only this machine can reach the endpoint: ipc, inproc, or TCP on a loopback address.

    Raises:
        LinkError: the endpoint cannot be read.
    """
    transport, _ = _split(endpoint)
    if transport != "tcp":
        return True
    host, _ = _host_port(endpoint)
    if host == "lo":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        pass
    try:
        found = stdlib_socket.getaddrinfo(host, None, type=stdlib_socket.SOCK_STREAM)
    except OSError:
        return False  # "*", a network interface's name, or a host that nobody knows
    return bool(found) and all(ipaddress.ip_address(str(info[4][0])).is_loopback for info in found)


def data_endpoint_for(control_endpoint: str) -> str:
    """Where the data link of a control endpoint is by default: the next port, or the path with ``.data``.

    Raises:
        LinkError: the endpoint cannot be read, or its port is a wildcard or the last one.
    """
    transport, address = _split(control_endpoint)
    if transport != "tcp":
        return f"{transport}://{address}.data"
    host, port = _host_port(control_endpoint)
    if not port.isdigit() or not 0 < int(port) < 65535:
        raise LinkError(f"{control_endpoint} has no next port for the data link: give a port from 1 to 65534")
    return f"tcp://{host}:{int(port) + 1}"


def resolve_data_endpoint(dialled: str, offered: str) -> str:
    """The data endpoint for a peer that dialled ``dialled`` for control and was offered ``offered`` in Welcome.

    Nothing offered: the default place. A host of ``*``: the host that was dialled.
    """
    if not offered:
        return data_endpoint_for(dialled)
    if offered.startswith("tcp://*:") and dialled.startswith("tcp://"):
        return f"tcp://{_host_port(dialled)[0]}:{offered.rpartition(':')[2]}"
    return offered


def free_endpoint(endpoint: str, tries: int = 50) -> str:
    """A TCP endpoint with a wildcard port (``*`` or 0) made concrete, such that the next port is free as well.

    Raises:
        LinkError: no such pair of ports was found.
    """
    if not endpoint.startswith("tcp://"):
        return endpoint
    host, port = _host_port(endpoint)
    if port not in ("*", "0"):
        return endpoint
    address = "" if host == "*" else _lookup(host).strip("[]")
    family = stdlib_socket.AF_INET6 if ":" in address else stdlib_socket.AF_INET
    for _ in range(tries):
        with stdlib_socket.socket(family) as first, stdlib_socket.socket(family) as second:
            first.bind((address, 0))
            found = int(first.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                second.bind((address, found + 1))
                return f"tcp://{host}:{found}"
    raise LinkError(f"no two free ports in a row for {endpoint}: name a port, or bind ipc://PATH")


def _split(endpoint: str) -> tuple[str, str]:
    transport, sep, address = endpoint.partition("://")
    if not sep or transport not in ("tcp", "ipc", "inproc") or not address:
        raise LinkError(f"endpoint {endpoint!r}; it is tcp://HOST:PORT or ipc://PATH")
    return transport, address


def _host_port(endpoint: str) -> tuple[str, str]:
    host, sep, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not sep or not host or not (port == "*" or (port.isdigit() and int(port) < 65536)):
        raise LinkError(f"endpoint {endpoint!r}; it is tcp://HOST:PORT with a port below 65536")
    return host, port


def _lookup(host: str) -> str:
    """A numeric address: libzmq binds no host names, only addresses and interfaces."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        with contextlib.suppress(OSError):
            info = stdlib_socket.getaddrinfo(host, None, stdlib_socket.AF_INET, stdlib_socket.SOCK_STREAM)
            return str(info[0][4][0])
    return host


def _check_ipc(endpoint: str, path: str) -> None:
    """libzmq unlinks a socket file that is there, in use or not: look first whether somebody answers on it."""
    if path.startswith("@"):
        return
    if len(path.encode()) > _MAX_IPC_PATH:
        raise LinkError(f"{endpoint}: a socket's path may be {_MAX_IPC_PATH} bytes long, this one has {len(path)}")
    if not Path(path).exists():
        return
    with stdlib_socket.socket(stdlib_socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            return  # left behind by a process that is gone
    raise LinkError(f"{endpoint} is in use: another broker runs there; stop it or choose another path")


def _bind_advice(endpoint: str, error: zmq.ZMQError) -> str:
    match error.errno:
        case zmq.EADDRINUSE:
            return f"{endpoint} is in use: another broker runs there; stop it or choose another port"
        case errno.ENODEV | zmq.EADDRNOTAVAIL:
            return f"{endpoint} is not an address of this machine"
        case _:
            return (
                f"cannot listen on {endpoint}: {error.strerror}; use tcp://HOST:PORT, or ipc://PATH in a folder you own"
            )
