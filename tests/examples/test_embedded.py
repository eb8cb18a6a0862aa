"""An executor inside a running web service, which goes on answering while it trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.process

ROUNDS = 40


def test_service_answers_while_it_trains(
    children: Any, repo: Path, workspace: Path, endpoint: str, free_port: Callable[[], int]
) -> None:
    folder = repo / "examples/embedded"
    children.fedloom("broker", "--bind", endpoint, "--store", workspace / "store")
    children.fedloom("controller", "--broker", endpoint)
    urls: list[str] = []
    for number in (1, 2):
        port = free_port()
        urls.append(f"http://127.0.0.1:{port}")
        service = children.python(
            "-m",
            "uvicorn",
            "service:app",
            "--port",
            str(port),
            "--log-level",
            "warning",
            name=f"service-{number}",
            cwd=folder,
            env={
                "FEDLOOM_BROKER": endpoint,
                "FEDLOOM_SITE": f"site-{number}",
                "FEDLOOM_WORKSPACE": str(workspace / f"site {number}"),
            },
        )
        wait_for_service(service, urls[-1])

    job = children.python(
        folder / "job.py", "--broker", endpoint, "--sites", "2", "--rounds", str(ROUNDS), cwd=workspace
    )
    seen: set[int] = set()
    slowest = 0.0
    with httpx.Client() as client:
        assert client.post(f"{urls[0]}/measure", json={"x": 0.5, "y": 0.0}).json() == {"measurements": 101}
        while job.process.poll() is None:
            started = time.monotonic()
            answer = client.get(f"{urls[0]}/predict", params={"x": 1.5}, timeout=5).raise_for_status().json()
            slowest = max(slowest, time.monotonic() - started)
            seen.add(answer["rounds"])
        assert job.wait() == 0, job.text
        answer = client.get(f"{urls[1]}/predict", params={"x": 1.5}).json()

    assert "FINISHED:COMPLETED" in job.text
    assert answer["rounds"] == ROUNDS
    assert abs(answer["y"] - 2.0) < 0.1  # y = 2 x - 1
    assert len(seen - {0, ROUNDS}) >= 3, f"no answers between rounds: {sorted(seen)}"
    assert slowest < 2.0

    # the services end as services do: SIGTERM, exit code 0 from uvicorn, no threads that hold them
    for child in children.all:
        if child.name.startswith("service"):
            assert child.stop(10) in (0, -15), child.text


def wait_for_service(service: Any, url: str) -> None:
    """Until it answers."""
    deadline = time.monotonic() + 60
    while True:
        assert service.process.poll() is None, service.text
        try:
            httpx.get(f"{url}/predict", params={"x": 0}, timeout=1).raise_for_status()
            return
        except httpx.TransportError:
            assert time.monotonic() < deadline, service.text
            time.sleep(0.05)
