"""Small jobs to simulate."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.serialization.jobspec import Component, ExecutorSpec, JobSpec
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import encode_model

#: Adds one to every value; sites differ by their number of steps, which is their weight.
CLIENT = """
import fedloom.client as flare

flare.init()
number = int(flare.get_site_name().rpartition("-")[2])
while flare.is_running():
    model = flare.receive()
    params = {name: value + 1 for name, value in model.params.items()}
    meta = {"NUM_STEPS_CURRENT_ROUND": number}
    flare.send(flare.FLModel(params=params, metrics={"accuracy": number / 10}, meta=meta))
"""

MakeJob = Callable[..., Path]


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    """Writes a numpy FedAvg job folder: ``make_job(client=..., rounds=2, min_clients=1, **of FedAvg)``."""

    def make(
        client: str = CLIENT,
        *,
        name: str = "adder",
        rounds: int = 2,
        min_clients: int = 1,
        sites: tuple[str, ...] | None = None,
        executor: dict[str, Any] | None = None,
        folder: str = "job folder",
        **workflow: Any,
    ) -> Path:
        place = tmp_path / folder
        spec = JobSpec(
            name=name,
            min_clients=min_clients,
            num_rounds=rounds,
            sites=sites,
            workflows=(
                Component(
                    "fedloom.controller.workflows.fedavg.FedAvg",
                    {
                        "num_rounds": rounds,
                        "min_clients": min_clients,
                        "initial_model": "initial_model.safetensors",
                        **workflow,
                    },
                    "controller",
                ),
            ),
            executors=(
                ExecutorSpec(
                    ("*",),
                    Component(
                        "fedloom.executor.script.ScriptExecutor", {"task_script_path": "client.py", **(executor or {})}
                    ),
                ),
            ),
        )
        spec.write(place)
        (spec.custom_dir(place) / "client.py").write_text(textwrap.dedent(client))
        model = FLModel(
            params={"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(3, np.float32)}
        )
        (spec.app_dir(place) / "initial_model.safetensors").write_bytes(encode_model(model).tobytes())
        return place

    return make
