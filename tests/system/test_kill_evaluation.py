"""kill -9 of the job's process in the middle of an evaluation: the matrix is whole, and nothing is done twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.recipe import NumpyFedAvgRecipe, add_cross_site_evaluation

pytestmark = pytest.mark.process

SITES = ("site-1", "site-2", "site-3")
ROUNDS = 2
#: More than rides in a message: sites' models lie in the spool as files.
ELEMENTS = 20_000
#: A small spool: not all sites' models at once.
QUOTA = 720_000

CLIENT = """\
import sys
import fedloom.client as flare
import numpy as np

flare.init()
number = int(flare.get_site_name()[-1])
while flare.is_running():
    model = flare.receive()
    first = "" if model.params is None else f"{model.params['numpy_key'][0]:.3f}"
    with open(sys.argv[1], "a") as log:
        log.write(f"{number} {flare.get_task_name()} {first}\\n")
    if flare.is_submit_model():
        flare.send(flare.FLModel(params={"numpy_key": flare.state()["own"]}))
    elif flare.is_evaluate():
        flare.send(flare.FLModel(metrics={"score": float(model.params["numpy_key"].mean()) * number}))
    else:
        flare.state()["own"] = own = model.params["numpy_key"] + np.float32(number)
        flare.send(flare.FLModel(params={"numpy_key": own}, metrics={"accuracy": float(first)}))
"""

#: After two rounds of adding 1, 2 and 3: the server's models, and the sites' before the second mean.
VALUES = {"SRV_model": 4.0, "SRV_best_model": 2.0, "site-1": 3.0, "site-2": 4.0, "site-3": 5.0}


def test_evaluation_goes_on(cluster: Any, workspace: Path) -> None:
    fault = "job.before_commit:7"  # of eight: what was scored, and not committed, is found again
    (workspace / "client.py").write_text(CLIENT)
    runs = workspace / "runs.log"
    recipe = NumpyFedAvgRecipe(
        name="scores",
        model=np.zeros(ELEMENTS, np.float32),
        min_clients=len(SITES),
        num_rounds=ROUNDS,
        train_script=str(workspace / "client.py"),
        train_args=f"'{runs}'",
    )
    add_cross_site_evaluation(recipe)
    cluster.children.fedloom(
        "broker", "--bind", cluster.endpoint, "--store", workspace / "store", "--quota-bytes", str(QUOTA)
    )
    cluster.controller(fault=fault, streamed=True)
    for site in SITES:
        cluster.executor(site, streamed=True)
    folder = cluster.result(cluster.submit(recipe.export(workspace / "job")))
    assert cluster.faults_hit() == [fault.partition(":")[0]]
    matrix = json.loads((folder / "cross_site_val/cross_val_results.json").read_text())
    assert matrix == {
        site: {model: {"score": value * int(site[-1])} for model, value in VALUES.items()} for site in SITES
    }
    lines = runs.read_text().splitlines()
    done = Counter(lines)
    wanted = [f"{number} train {value:.3f}" for number in (1, 2, 3) for value in (0, 2)]
    wanted += [f"{number} submit_model " for number in (1, 2, 3)]
    wanted += [f"{number} validate {value:.3f}" for number in (1, 2, 3) for value in VALUES.values()]
    assert done == Counter(wanted)
    asked = [at for at, line in enumerate(lines) if "submit_model" in line]
    assert asked[-1] - asked[0] > len(SITES), "models were scored before the last ones were asked for"
