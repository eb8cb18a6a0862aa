"""The data process as a process: killed, resumed, ended with its parent."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq
from fedloom.broker.data import DataConfig
from fedloom.broker.sockets import free_endpoint
from fedloom.serialization.digest import BLOCK_BYTES, digest_buffers
from fedloom.serialization.messages import (
    PayloadId,
    PayloadRef,
    Put,
    Stored,
)

M = TypeVar("M")
KIB = 1024
S1, S2 = "1" * 32, "2" * 32
TIMEOUT_S = 20.0


def ref(data: bytes, id: str = "") -> PayloadRef:
    digest = digest_buffers([data])
    return PayloadRef(PayloadId(id or f"b3-{digest}"), len(data), digest)


def start_process(config: DataConfig, **env: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "fedloom.broker.data", config.to_json()]
    return subprocess.Popen(argv, env=os.environ | env, cwd="/", stderr=subprocess.DEVNULL)


@pytest.mark.process
@pytest.mark.parametrize("point", ["data.mid_upload:150", "data.after_file_before_row:1"])
def test_killed_at_a_point_and_resumed(world: Any, tmp_path: Path, point: str) -> None:
    body = random.Random(6).randbytes(3 * BLOCK_BYTES)
    payload = ref(body, "r-t.1")
    config = replace(world.config, stall_s=10.0, hello_wait_s=5.0)
    process = start_process(config, FEDLOOM_FAULT=point, FEDLOOM_FAULT_LOG=str(tmp_path / "log"))
    try:
        peer = world.peer()
        peer.broken = lambda: process.poll() is not None
        peer.socket.set(zmq.SNDTIMEO, 1000)
        with pytest.raises((AssertionError, zmq.Again)):
            peer.upload(body, Put(payload, S1))
        assert process.wait(TIMEOUT_S) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "log").read_text().split() == [point.split(":")[0]]
    process = start_process(config)
    try:
        again = world.peer("s2")
        answer, sent = again.upload(body, Put(payload, S2))
        assert answer == Stored(stream=S2, payload=payload)
        assert sent == (64 if "mid_upload" in point else 0)
        assert world.control.rows == {payload.id: payload}
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.process
def test_dies_with_its_parent(tmp_path: Path) -> None:
    config = DataConfig(tmp_path / "s", free_endpoint("tcp://127.0.0.1:*"), f"ipc://{tmp_path}/i")
    code = (
        "import subprocess, sys, os, time, zmq\n"
        f"child = subprocess.Popen([sys.executable, '-m', 'fedloom.broker.data', {config.to_json()!r}])\n"
        "context = zmq.Context(); router = context.socket(zmq.ROUTER)\n"
        f"router.bind({config.internal!r}); router.recv_multipart()\n"
        "print(child.pid, flush=True); os._exit(0)\n"
    )
    parent = subprocess.run([sys.executable, "-c", code], cwd="/", stdout=subprocess.PIPE, timeout=60, check=True)
    pid = int(parent.stdout)
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        threading.Event().wait(0.02)
    raise AssertionError("the data process outlived its parent")
