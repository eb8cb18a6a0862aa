"""The smallest job there is: a 3x3 matrix, and sites that add one to it.

    python job.py                                  the sites send the whole matrix
    python job.py --transfer DIFF                  the sites send what changed
    python job.py --export FOLDER                  only a job folder, for `fedloom sim FOLDER` and `fedloom job submit`

Both end with the initial matrix plus the number of rounds, exactly.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from fedloom.recipe import NumpyFedAvgRecipe, SimEnv
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
INITIAL = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sites add one to a matrix.")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transfer", choices=["FULL", "DIFF"], default="FULL")
    parser.add_argument("--export", metavar="FOLDER", help="only write the job folder")
    parser.add_argument("--workspace", help="where the results go (default: ./fedloom-workspace)")
    args = parser.parse_args()

    recipe = NumpyFedAvgRecipe(
        name=f"hello-numpy-{args.transfer.lower()}",
        model=INITIAL,
        min_clients=args.clients,
        num_rounds=args.rounds,
        train_script=str(HERE / "client.py"),
        params_transfer_type=args.transfer,
    )
    if args.export:
        print(f"job folder: {recipe.export(args.export)}")
        return
    run = recipe.execute(SimEnv(num_clients=args.clients, workspace_root=args.workspace))
    result = Path(run.get_result())
    print(f"job {run.get_job_id()}: {run.get_status()}")
    for name, matrix in load_file(result / "model.safetensors").items():
        print(f"{name} =\n{matrix}")
        if not np.array_equal(matrix, INITIAL + args.rounds):
            sys.exit(f"expected\n{INITIAL + args.rounds}")
    sys.exit(0 if run.get_status() == "FINISHED:COMPLETED" else 1)


if __name__ == "__main__":
    main()
