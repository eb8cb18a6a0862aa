"""A job script, written for NVFLARE. fedloom runs it as it is: fedloom sim --compat nvflare job.py"""

from __future__ import annotations

import argparse

from median import Median
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe import SimEnv


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n_clients", type=int, default=2)
    parser.add_argument("--num_rounds", type=int, default=20)
    parser.add_argument("--update_type", choices=["full", "diff"], default="full")
    parser.add_argument("--median", action="store_true", help="instead of the weighted mean")
    parser.add_argument("--launch_external_process", action="store_true")
    args = parser.parse_args()

    recipe = NumpyFedAvgRecipe(
        name=f"line-{args.update_type}",
        initial_model=[0.0, 0.0],
        min_clients=args.n_clients,
        num_rounds=args.num_rounds,
        train_script="client.py",
        train_args=f"--update_type {args.update_type}",
        aggregator=Median() if args.median else None,
        launch_external_process=args.launch_external_process,
    )
    run = recipe.execute(SimEnv(num_clients=args.n_clients))
    print()
    print("Job Status is:", run.get_status())
    print("Result can be found in:", run.get_result())


if __name__ == "__main__":
    main()
