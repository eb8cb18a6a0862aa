"""What every site runs: an ordinary PyTorch training loop with a few lines of fedloom around it.

The same file works unchanged in a simulation (`python job.py`), under `fedloom executor`, and as an external process.
"""

from __future__ import annotations

import argparse

import fedloom.client as flare
from data import load, site_split
from model import DigitsNet, accuracy, train
from torch.utils.data import DataLoader


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.05)
    args = parser.parse_args()

    flare.init()
    site = flare.system_info()["site_name"]
    _, held_out = load()
    batches = DataLoader(site_split(site), batch_size=16, shuffle=True)
    model = DigitsNet()

    while flare.is_running():
        received = flare.receive()
        model.load_state_dict(received.params)
        score = accuracy(model, held_out)  # of the global model, before this site trains on it
        print(f"{site} round {received.current_round}: received a model that scores {score:.4f}")

        steps = train(model, batches, args.epochs, args.lr)
        flare.send(
            flare.FLModel(
                params=model.state_dict(),
                metrics={"accuracy": score},
                meta={"NUM_STEPS_CURRENT_ROUND": steps},
            )
        )


if __name__ == "__main__":
    main()
