"""What a site's script printed, read from elsewhere: `fedloom job logs` and the downloaded folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fedloom.recipe import NumpyFedAvgRecipe

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

CLIENT = """
import fedloom.client as flare

flare.init()
print("ready at", flare.get_site_name())
while flare.is_running():
    model = flare.receive()
    print(f"round {model.current_round}: l\u00f6ss", 0.5)
    flare.send(flare.FLModel(params=model.params, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
print("the job is over")
"""


def test_logs_of_sites_that_are_processes_of_their_own(cluster: Any, workspace: Path) -> None:
    (workspace / "client.py").write_text(CLIENT, "utf-8")
    recipe = NumpyFedAvgRecipe(
        name="logs", model=[1.0, 2.0], min_clients=2, num_rounds=2, train_script=str(workspace / "client.py")
    )
    cluster.broker()
    cluster.controller()
    cluster.executor("site-1")
    cluster.children.fedloom(
        "executor", "--broker", cluster.endpoint, "--site", "site-2", "-w", workspace / "two", "--no-share-logs"
    )
    job_id = cluster.submit(recipe.export(workspace / "job"))
    folder = cluster.result(job_id)
    printed = (folder / "logs" / "site-1.log").read_text("utf-8")
    # all that came before the last result is there as soon as the job has ended, as it was printed
    assert printed.startswith("ready at site-1\nround 0: l\u00f6ss 0.5\nround 1: l\u00f6ss 0.5\n")
    assert not (folder / "logs" / "site-2.log").exists()
    shown = cluster.job("logs", job_id, "--site", "site-1")[1].splitlines()
    assert any(line.startswith("site-1  ") and line.endswith("ready at site-1") for line in shown)
    assert "round 1: l\u00f6ss 0.5" in "\n".join(shown)
    events = json.loads(cluster.job("logs", job_id, "--json")[1])["events"]
    assert {event["site"] for event in events if event["kind"] == "log"} == {"site-1"}
    assert "round 1" in (workspace / "two" / "logs" / job_id / "site-2.log").read_text("utf-8")
