"""Eight sites, each with digits of its own that it never shows, train one network together.

python job.py                                     simulated on this machine
python job.py --external                          each site's script as a command of its own, `python3 -u client.py ...`
python job.py --broker tcp://127.0.0.1:7600       at a broker, by the executors that are connected to it
python job.py --export FOLDER                     as a job folder, for `fedloom job submit`
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from data import NUM_SITES, load
from fedloom.recipe import FedAvgRecipe, ProdEnv, SimEnv
from model import DigitsNet, accuracy, train
from safetensors.torch import load_file
from torch.utils.data import DataLoader

HERE = Path(__file__).resolve().parent
SEED = 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on scikit-learn's digits, split over eight sites.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sites", type=int, default=NUM_SITES, help="how many of the eight take part")
    parser.add_argument("--threads", type=int, help="how many sites run at once (default: all of them)")
    parser.add_argument("--external", action="store_true", help="start the sites' scripts as commands of their own")
    parser.add_argument("--workspace", help="where a simulation keeps its results (default: ./fedloom-workspace)")
    parser.add_argument("--broker", metavar="ENDPOINT", help="run at this broker instead of simulating")
    parser.add_argument("--export", metavar="FOLDER", help="only write the job folder")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(SEED)
    recipe = FedAvgRecipe(
        name="digits",
        initial_model=DigitsNet(),
        min_clients=args.sites,
        num_rounds=args.rounds,
        train_script=str(HERE / "client.py"),
        train_args="--epochs 4 --lr 0.05",
        launch_external_process=args.external,
        seed=SEED,
    )
    if args.export:
        print(f"job folder: {recipe.export(args.export)}")
        return

    if args.broker:
        env = ProdEnv(args.broker)
    else:
        env = SimEnv(num_clients=args.sites, num_threads=args.threads, workspace_root=args.workspace)
    run = recipe.execute(env)
    result = Path(run.get_result())
    status = run.get_status()

    train_set, held_out = load()
    model = DigitsNet()
    model.load_state_dict(load_file(result / "model.safetensors"))
    torch.manual_seed(SEED)
    central = DigitsNet()
    train(central, DataLoader(train_set, batch_size=32, shuffle=True), epochs=20, lr=0.05)

    print()
    print(f"job {run.get_job_id()}: {status}")
    print(f"  held-out accuracy, trained by {args.sites} sites:                 {accuracy(model, held_out):.4f}")
    print(f"  held-out accuracy, trained with all data in one place: {accuracy(central, held_out):.4f}")
    print(f"  global model: {result / 'model.safetensors'}")
    print(f"  every round:  {result / 'metrics.jsonl'}")
    sys.exit(0 if status == "FINISHED:COMPLETED" else 1)


if __name__ == "__main__":
    main()
