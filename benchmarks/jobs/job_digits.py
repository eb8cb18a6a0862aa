"""The job of the digits row.

fedloom sim job_digits.py -w FOLDER -- --kind digits --clients 4 --rounds 10 --at-once 4
"""

from __future__ import annotations

from pathlib import Path

from digitsnet import network
from fedloom.recipe import FedAvgRecipe, SimEnv
from workload import arguments

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--float32", action="store_true", help="exact=False: a running mean in float32")
    args = parser.parse_args()
    recipe = FedAvgRecipe(
        name="bench",
        model=network(),
        min_clients=args.clients,
        num_rounds=args.rounds,
        exact=not args.float32,
        train_script=str(HERE / "client_digits.py"),
        train_args=str(args.clients),
    )
    recipe.execute(SimEnv(num_clients=args.clients, num_threads=args.at_once, show_progress=False))


if __name__ == "__main__":
    main()
