"""A row in NVFLARE's simulator. The model that its server leaves in the run's folder is read by whoever measures."""

import os
from pathlib import Path

from nvflare.recipe import SimEnv
from workload import arguments

HERE = Path(__file__).resolve().parent


def recipe_for(args):
    common = {"name": "bench", "min_clients": args.clients, "num_rounds": args.rounds}
    if args.kind == "np":
        from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
        from workload import TINY

        return NumpyFedAvgRecipe(model=[0.0] * TINY, train_script="nvflare_client.py", **common)
    from nets import Digits, Large
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.client.config import ExchangeFormat

    return FedAvgRecipe(
        model=Large(args.mib, args.tensors) if args.kind == "big" else Digits(),
        train_script="nvflare_client_torch.py",
        train_args=f"{args.kind} {args.clients}",
        server_expected_format=ExchangeFormat.NUMPY,
        **common,
    )


def main():
    args = arguments(__doc__).parse_args()
    workspace = Path.cwd()  # the run's own folder
    os.chdir(HERE)  # where it looks for scripts
    env = SimEnv(num_clients=args.clients, num_threads=args.at_once, workspace_root=str(workspace))
    recipe_for(args).execute(env)


if __name__ == "__main__":
    main()
