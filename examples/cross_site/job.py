"""Train on three sites, then score every model on every site's data: see README.md."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from data import SITES
from fedloom.recipe import NumpyFedAvgRecipe, SimEnv, add_cross_site_evaluation
from model import initial

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Every model on every site's data.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--external", action="store_true", help="the sites' scripts as commands of their own")
    parser.add_argument("--each-task", action="store_true", help="start the scripts for each task")
    parser.add_argument("--workspace", help="where the results go (default: ./fedloom-workspace)")
    args = parser.parse_args()

    recipe = NumpyFedAvgRecipe(
        name="cross-site",
        model=initial(),
        min_clients=SITES,
        num_rounds=args.rounds,
        train_script=str(HERE / "client.py"),
        launch_external_process=args.external,
        launch_once=not args.each_task,
    )
    add_cross_site_evaluation(recipe)
    run = recipe.execute(SimEnv(num_clients=SITES, num_threads=args.threads, workspace_root=args.workspace))

    matrix = run.cross_site_results()
    written = json.loads((Path(run.get_result()) / "cross_site_val" / "cross_val_results.json").read_text())
    assert matrix == written
    print(f"job {run.get_job_id()}: {run.get_status()}")
    for site, row in matrix.items():
        print(site, {model: round(scores["accuracy"], 3) for model, scores in row.items()})
    sys.exit(0 if run.get_status() == "FINISHED:COMPLETED" and not run.failures() else 1)


if __name__ == "__main__":
    main()
