"""A site's torch script, written for NVFLARE. fedloom runs it as it is."""

from __future__ import annotations

import argparse

import nvflare.client as flare
import torch
from model import SimpleNetwork, ring
from nvflare.client.tracking import SummaryWriter
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset


def evaluate(model: nn.Module, points: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(points).argmax(dim=1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=0.1)
    args = parser.parse_args()

    flare.init()
    site = flare.system_info()["site_name"]
    number = int(site.rpartition("-")[2])
    batches = DataLoader(TensorDataset(*ring(number, 512)), batch_size=32, shuffle=True)
    held_out = ring(0, 1000)
    model = SimpleNetwork()
    loss = nn.CrossEntropyLoss()
    optimizer = SGD(model.parameters(), lr=args.learning_rate, momentum=0.9)
    writer = SummaryWriter()
    trained: dict[str, torch.Tensor] | None = None

    while flare.is_running():
        received = flare.receive()
        if flare.is_submit_model():  # it carries no params: the site's own model is asked for
            flare.send(flare.FLModel(params=trained))
            continue

        model.load_state_dict(received.params)
        accuracy = evaluate(model, *held_out)
        print(f"site={site}, round={received.current_round}, the received model scores {accuracy:.4f}")
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics={"accuracy": accuracy}))
            continue

        model.train()
        steps = args.epochs * len(batches)
        for epoch in range(args.epochs):
            for points, labels in batches:
                optimizer.zero_grad()
                cost = loss(model(points), labels)
                cost.backward()
                optimizer.step()
            writer.add_scalar("loss", cost.item(), global_step=received.current_round * args.epochs + epoch)

        trained = {name: tensor.detach().clone() for name, tensor in model.cpu().state_dict().items()}
        flare.send(
            flare.FLModel(params=trained, metrics={"accuracy": accuracy}, meta={"NUM_STEPS_CURRENT_ROUND": steps})
        )


if __name__ == "__main__":
    main()
