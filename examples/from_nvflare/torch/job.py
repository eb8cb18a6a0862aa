"""A torch job script, written for NVFLARE: fedloom sim --compat nvflare job.py"""

from __future__ import annotations

import argparse

from model import SimpleNetwork
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv, add_experiment_tracking
from nvflare.recipe.utils import add_cross_site_evaluation


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n_clients", type=int, default=2)
    parser.add_argument("--num_rounds", type=int, default=5)
    parser.add_argument("--cross_site_eval", action="store_true")
    parser.add_argument("--tensorboard", action="store_true")
    args = parser.parse_args()

    recipe = FedAvgRecipe(
        name="ring",
        initial_model=SimpleNetwork(),
        min_clients=args.n_clients,
        num_rounds=args.num_rounds,
        train_script="client.py",
    )
    if args.tensorboard:
        add_experiment_tracking(recipe, tracking_type="tensorboard")
    if args.cross_site_eval:
        add_cross_site_evaluation(recipe)

    run = recipe.execute(SimEnv(num_clients=args.n_clients))
    print()
    print("Job Status is:", run.get_status())
    print("Result can be found in:", run.get_result())


if __name__ == "__main__":
    main()
