"""Watch a federated training with TensorBoard: the loss of every step at every site, and the server's rounds.

python job.py
tensorboard --logdir fedloom-workspace/tensorboard/tb_events
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from fedloom.recipe import NumpyFedAvgRecipe, SimEnv, add_experiment_tracking

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description="A line through points of several sites.")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workspace", help="where the results go (default: ./fedloom-workspace)")
    args = parser.parse_args()

    recipe = NumpyFedAvgRecipe(
        name="tensorboard",
        model={"w": np.zeros(2, np.float32)},
        min_clients=args.clients,
        num_rounds=args.rounds,
        train_script=str(HERE / "client.py"),
        key_metric="loss",
        key_metric_mode="min",
    )
    add_experiment_tracking(recipe, "tensorboard")
    run = recipe.execute(SimEnv(num_clients=args.clients, workspace_root=args.workspace))
    result = Path(run.get_result())
    print(f"job {run.get_job_id()}: {run.get_status()}")
    for file in sorted((result / "tb_events").rglob("*tfevents*")):
        print(f"{file.relative_to(result)}: {file.stat().st_size} bytes")
    print(f"tensorboard --logdir {result / 'tb_events'}")
    sys.exit(0 if run.get_status() == "FINISHED:COMPLETED" else 1)


if __name__ == "__main__":
    main()
