from __future__ import annotations

import os
import queue
import socket
import struct
from pathlib import Path

import pytest
from fedloom.executor.channel import MAX_FRAME_BYTES, Channel, ChannelServer, FrameReader, pack_frame
from fedloom.serialization.errors import CodecError, LinkError, LinkTimeout


@pytest.fixture
def server():
    heard: queue.Queue = queue.Queue()
    server = ChannelServer(lambda *what: heard.put(what))
    server.heard = heard
    server.start()
    yield server
    server.close()
    assert not Path(server.path).exists()


def test_frames_come_out_whole_however_they_are_cut():
    sent = [{"op": "a", "n": 1}, {"op": "b", "data": b"x" * 5000}, {"op": "c"}]
    raw = b"".join(pack_frame(m) for m in sent)
    for step in (1, 3, 7, len(raw)):
        reader, got = FrameReader(), []
        for start in range(0, len(raw), step):
            got += reader.feed(raw[start : start + step])
        assert got == sent


@pytest.mark.parametrize(
    "raw", [struct.pack(">I", MAX_FRAME_BYTES + 1), struct.pack(">I", 1) + b"\x01", struct.pack(">I", 1) + b"\x80"]
)
def test_malformed_frames_are_refused(raw):
    with pytest.raises(CodecError):
        FrameReader().feed(raw)


def test_what_the_other_end_would_refuse_is_refused_here():
    with pytest.raises(CodecError, match="at most"):
        pack_frame({"op": "x", "data": b"x" * MAX_FRAME_BYTES})
    with pytest.raises(CodecError, match="finite"):
        pack_frame({"op": "x", "v": float("nan")})


def test_both_ways_in_order_and_the_end_is_told(server):
    channel = Channel.connect(server.environ("h1"), "host")
    connection, host, role, hello = server.heard.get(timeout=10)
    assert (host, role, hello["op"], hello["pid"]) == ("h1", "host", "hello", os.getpid())
    big = [{"op": "task", "i": i, "data": b"y" * 200_000} for i in range(30)]  # more than the socket holds
    for message in big:
        assert server.send(connection, message)
    assert [channel.receive(10) for _ in big] == big
    with pytest.raises(LinkTimeout):
        channel.receive(0.01)
    channel.send({"op": "waiting"})
    assert server.heard.get(timeout=10)[3] == {"op": "waiting"}
    channel.close()
    assert server.heard.get(timeout=10) == (connection, "h1", "host", None)
    assert not server.send(connection, {"op": "task"})


def test_a_wrong_token_is_shut_out(server):
    channel = Channel.connect(server.environ("h1") | {"FEDLOOM_TOKEN": "guess"}, "host")
    with pytest.raises(LinkError):
        channel.receive(10)
    channel.close()
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    raw.connect(server.path)
    raw.sendall(pack_frame({"op": "result"}))
    assert raw.recv(1) == b""
    raw.close()
    assert server.heard.empty()


def test_only_this_user_can_reach_the_socket(server):
    assert Path(server.path).parent.stat().st_mode & 0o777 == 0o700
    assert len(server.path) < 100


def test_a_host_without_its_environment_or_agent(server):
    with pytest.raises(LinkError, match="FEDLOOM_CHANNEL"):
        Channel.connect({}, "host")
    environ = server.environ("h1")
    channel = Channel.connect(environ, "host")
    server.close()
    with pytest.raises(LinkError):
        channel.receive(10)
    channel.close()
    with pytest.raises(LinkError, match="has ended"):
        Channel.connect(environ, "host")
