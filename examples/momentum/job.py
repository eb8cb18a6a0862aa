"""Sites that keep their optimizer's momentum from round to round: see client.py."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from data import FEATURES
from fedloom.recipe import FedAvgRecipe, SimEnv

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Sites that remember their momentum.")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--workspace", help="where the results go (default: ./fedloom-workspace)")
    args = parser.parse_args()

    torch.manual_seed(0)
    recipe = FedAvgRecipe(
        name="momentum",
        initial_model=torch.nn.Linear(FEATURES, 1),
        min_clients=args.clients,
        num_rounds=args.rounds,
        train_script=str(HERE / "client.py"),
        key_metric="score",
    )
    run = recipe.execute(SimEnv(num_clients=args.clients, num_threads=args.threads, workspace_root=args.workspace))
    result = Path(run.get_result())
    print(f"job {run.get_job_id()}: {run.get_status()}")
    for line in (result / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        metrics = record["metrics"]
        print(
            f"round {record['round']}: loss {metrics['loss']:.6f}, rounds remembered {metrics['rounds_remembered']:g}"
        )
    sys.exit(0 if run.get_status() == "FINISHED:COMPLETED" else 1)


if __name__ == "__main__":
    main()
