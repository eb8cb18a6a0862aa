"""Jobs of numpy arrays: 1,000 values, or so many MiB; scripts or functions at the sites.

fedloom sim job_np.py -w FOLDER -- --kind np --clients 8 --rounds 10 --at-once 8
"""

from __future__ import annotations

from pathlib import Path

from fedloom.recipe import NumpyFedAvgRecipe, SimEnv
from workload import arguments, numpy_model

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--float32", action="store_true", help="exact=False: a running mean in float32")
    parser.add_argument("--functions", action="store_true", help="function tasks instead of a script a site")
    parser.add_argument("--no-prefold", action="store_true", help="every result goes to the controller singly")
    args = parser.parse_args()
    recipe = NumpyFedAvgRecipe(
        name="bench",
        model=numpy_model(args.kind, args.mib, args.tensors),
        min_clients=args.clients,
        num_rounds=args.rounds,
        exact=not args.float32,
        train_script=f"{HERE / 'tasks.py'}:train" if args.functions else str(HERE / "client.py"),
    )
    extra = {"prefold": False} if args.no_prefold else {}
    recipe.execute(SimEnv(num_clients=args.clients, num_threads=args.at_once, show_progress=False, extra=extra))


if __name__ == "__main__":
    main()
