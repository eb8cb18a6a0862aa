"""A client that remembers its optimizer: the result equals a bare loop that keeps it in memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.process

ROUNDS = 4
CLIENTS = 3


def bare_loop(repo: Path) -> dict[str, torch.Tensor]:
    """What client.py and job.py do, with the optimizers' states in a list."""
    folder = str(repo / "examples/momentum")
    sys.path.insert(0, folder)
    try:
        import data  # type: ignore[import-not-found]
    finally:
        sys.path.remove(folder)
        del sys.modules["data"]
    torch.manual_seed(0)
    model = torch.nn.Linear(data.FEATURES, 1)
    params = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states: list[dict[str, Any] | None] = [None] * CLIENTS
    for _ in range(ROUNDS):
        results: list[dict[str, torch.Tensor]] = []
        for number in range(CLIENTS):
            x, y = data.site_data(f"site-{number + 1}")
            model.load_state_dict(params)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
            if (state := states[number]) is not None:
                optimizer.load_state_dict(state)
            for _ in range(5):
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(model(x), y).backward()
                optimizer.step()
            # a copy: the state's tensors are the optimizer's own
            states[number] = {
                "param_groups": optimizer.state_dict()["param_groups"],
                "state": {
                    key: {name: value.clone() for name, value in entry.items()}
                    for key, entry in optimizer.state_dict()["state"].items()
                },
            }
            results.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        params = {name: sum(r[name].double() for r in results).div(CLIENTS).float() for name in params}  # type: ignore[union-attr]
    return params


@pytest.mark.parametrize("threads", ["1", "3"])
def test_state_goes_from_round_to_round(children: Any, repo: Path, workspace: Path, threads: str) -> None:
    args = ["--rounds", str(ROUNDS), "--threads", threads, "--workspace", workspace]
    code, out, err = children.output(
        [sys.executable, repo / "examples/momentum/job.py", *args], timeout_s=180, cwd=workspace
    )
    assert code == 0, f"{out}\n{err}"
    result = workspace / "momentum"
    rounds = [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]
    assert [record["metrics"]["rounds_remembered"] for record in rounds] == [1, 2, 3, 4]
    assert all(record["state_lost"] == [] for record in rounds)
    model = load_file(result / "model.safetensors")
    expected = bare_loop(repo)
    assert model.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(model[name], tensor, rtol=1e-5, atol=1e-6)
    children.gone()
