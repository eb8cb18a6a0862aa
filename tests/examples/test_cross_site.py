"""Every entry of the matrix, computed again from the saved models and the sites' data."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.process

SITES = [f"site-{number}" for number in (1, 2, 3)]
MODELS = ["SRV_model", "SRV_best_model", *SITES]


@pytest.fixture
def example(repo: Path) -> Iterator[dict[str, ModuleType]]:
    """The example's own modules."""
    folder = str(repo / "examples/cross_site")
    sys.path.insert(0, folder)
    try:
        import data  # type: ignore[import-not-found]
        import model  # type: ignore[import-not-found]

        yield {"data": data, "model": model}
    finally:
        sys.path.remove(folder)
        for name in ("data", "model"):
            sys.modules.pop(name, None)


def test_matrix_is_full_and_true(children: Any, repo: Path, workspace: Path, example: dict[str, ModuleType]) -> None:
    code, out, err = children.fedloom_output(
        "sim", repo / "examples/cross_site/job.py", "-t", "2", "-w", workspace, timeout_s=180, cwd=workspace
    )
    assert code == 0, f"{out}\n{err}"
    result = workspace / "cross-site"
    matrix = json.loads((result / "cross_site_val/cross_val_results.json").read_text())
    assert list(matrix) == SITES
    assert all(list(row) == MODELS for row in matrix.values())

    images = {site: example["data"].site_data(site) for site in SITES}
    models = {"SRV_model": load_file(result / "model.safetensors")}
    models["SRV_best_model"] = load_file(result / "best_model.safetensors")
    # the best one is what the last round received: each site's own model is one training away from it
    summary = json.loads((result / "summary.json").read_text())
    assert summary["best_round"] == 3
    for site in SITES:
        models[site] = example["model"].train(models["SRV_best_model"], images[site][0], 20)
    for site in SITES:
        for name in MODELS:
            assert matrix[site][name] == pytest.approx(example["model"].score(models[name], images[site][1]), abs=1e-5)
    own = sum(matrix[site][site]["accuracy"] for site in SITES) / 3
    others = sum(matrix[site][name]["accuracy"] for site in SITES for name in SITES if name != site) / 6
    assert own > 0.9 > others, "a model of one's own knows one's own digits"
    assert summary["cross_site_val"]["failed"] == 0
    assert "SRV_best_model" in err, "the run's end shows the matrix"
    children.gone()
