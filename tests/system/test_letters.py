"""Dead letters by the command line, over separate processes: a site's data is mended while its step is open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloom.recipe import NumpyFedAvgRecipe
from fedloom.recipe.client import JobClient

pytestmark = pytest.mark.process

#: site-2 needs a file that is not there; site-1 takes its time in the first round.
CLIENT = """\
import argparse, pathlib, time
import fedloom.client as flare

parser = argparse.ArgumentParser()
parser.add_argument("--folder", type=pathlib.Path)
folder = parser.parse_args().folder
flare.init()
while flare.is_running():
    model = flare.receive()
    if flare.get_site_name() == "site-2":
        (folder / f"data-{model.current_round}").read_text()
        (folder / "done").touch()
    for _ in range(1200):
        if (folder / "done").exists():
            break
        time.sleep(0.05)
    flare.send(flare.FLModel(params=model.params))
"""


def test_a_site_is_mended_and_retried(cluster: Any, workspace: Path, until: Any) -> None:
    (workspace / "client.py").write_text(CLIENT)
    folder = NumpyFedAvgRecipe(
        name="letters", model=np.zeros(3, np.float32), min_clients=1, num_rounds=2,
        train_script=str(workspace / "client.py"), train_args=f"--folder '{workspace}'",
    ).export(workspace / "job")  # fmt: skip
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"sites": ["site-1", "site-2"]}))
    cluster.broker().says("broker_ready")
    cluster.controller()
    for site in ("site-1", "site-2"):
        cluster.executor(site)
    with JobClient(cluster.endpoint) as client:
        job = client.submit(folder)
        until(lambda: client.letters(job), "the first round is given up by site-2")
        (letter,) = client.letters(job)
        assert (letter["site"], letter["round"], letter["attempts"], letter["open"]) == ("site-2", 0, 1, True)
        assert "Traceback" in letter["text"] and "FileNotFoundError" in letter["text"]
        (workspace / "data-0").touch()
        said = cluster.job("retry", job, "--site", "site-2")[1]
        assert said.startswith("retried site-2: round 0, step 0, train (")
        assert client.wait(job, 60).status == "FINISHED:COMPLETED"
        records = client.rounds(job)
        shown = cluster.job("letters", job)[1]
        code, _, err = cluster.job("retry", job, "--all", ok=False)
        dropped = json.loads(cluster.job("drop", job, "--site", "site-2", "--json")[1])["dropped"]
        assert client.letters(job) == []
    assert [record["results"] for record in records] == [2, 1], "the second round went on without it"
    assert [[f["site"] for f in record["failures"]] for record in records] == [[], ["site-2"]]
    assert "site-2" in shown and "closed" in shown and "data-1" in shown and "data-0" not in shown
    assert code == 3 and f"fedloom job resume {job}" in err and "Traceback" not in err
    assert [(letter["site"], letter["round"]) for letter in dropped] == [("site-2", 1)]
