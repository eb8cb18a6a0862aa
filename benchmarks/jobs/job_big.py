"""The job of the large models: float32 tensors of torch; scripts or functions at the sites.

fedloom sim job_big.py -w FOLDER -- --kind big --clients 4 --rounds 3 --at-once 2 --mib 100 --tensors 50 --functions
"""

from __future__ import annotations

from pathlib import Path

import torch
from fedloom.recipe import FedAvgRecipe, SimEnv
from workload import arguments, shapes

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--float32", action="store_true", help="exact=False: a running mean in float32")
    parser.add_argument("--functions", action="store_true", help="function tasks instead of a script a site")
    args = parser.parse_args()
    recipe = FedAvgRecipe(
        name="bench",
        model={name: torch.zeros(shape) for name, shape in shapes(args.mib, args.tensors).items()},
        min_clients=args.clients,
        num_rounds=args.rounds,
        exact=not args.float32,
        train_script=f"{HERE / 'tasks.py'}:train" if args.functions else str(HERE / "client.py"),
    )
    recipe.execute(SimEnv(num_clients=args.clients, num_threads=args.at_once, show_progress=False))


if __name__ == "__main__":
    main()
