"""Sites that train one step, one at a time: how soon a forked one is ready. ``fedloom sim job_step.py -- CLIENTS``"""

from __future__ import annotations

import sys
from pathlib import Path

from digitsnet import network
from fedloom.recipe import FedAvgRecipe, SimEnv

HERE = Path(__file__).resolve().parent


def main() -> None:
    clients = int(sys.argv[1])
    recipe = FedAvgRecipe(
        name="bench",
        model=network(),
        min_clients=clients,
        num_rounds=1,
        train_script=str(HERE / "client_step.py"),
    )
    recipe.execute(SimEnv(num_clients=clients, num_threads=1, show_progress=False))


if __name__ == "__main__":
    main()
