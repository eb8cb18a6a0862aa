"""Fit one line to the measurements of all services: run at the broker that they are connected to.

python job.py --broker tcp://127.0.0.1:7600 --sites 2
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from fedloom.recipe import NumpyFedAvgRecipe, ProdEnv
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit a line to what several services have measured.")
    parser.add_argument("--broker", default="tcp://127.0.0.1:7600")
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()

    recipe = NumpyFedAvgRecipe(
        name="line",
        model={"line": np.zeros(2, np.float32)},
        min_clients=args.sites,
        num_rounds=args.rounds,
        # what a site without a function of its own would run; an embedded executor's "train" comes before it
        train_script=f"{HERE / 'train.py'}:train",
    )
    run = recipe.execute(ProdEnv(args.broker))
    result = run.get_result()
    slope, offset = load_file(Path(result) / "model.safetensors")["line"]
    print(f"job {run.get_job_id()}: {run.get_status()}")
    print(f"y = {slope:.3f} x {offset:+.3f}    (the truth: y = 2 x - 1)")
    sys.exit(0 if run.get_status() == "FINISHED:COMPLETED" else 1)


if __name__ == "__main__":
    main()
