"""No system at all: the work of a row in a plain loop in one process. What everything else is compared with."""

from __future__ import annotations

import argparse

from workload import arguments, hand_in, note, numpy_model, shapes, update, weight


def tiny(args: argparse.Namespace) -> None:
    """1,000 values in numpy."""
    import numpy as np

    model = numpy_model("np", 0, 0)
    for number in range(args.rounds):
        total = {name: np.zeros_like(value) for name, value in model.items()}
        weights = 0
        for client in range(1, args.clients + 1):
            if client == 1:
                note("task", round=number, client=client)
            for name, value in update(model, client).items():
                total[name] += value * np.float32(weight(client))
            weights += weight(client)
        model = {name: value / np.float32(weights) for name, value in total.items()}
    hand_in("np", model)


def big(args: argparse.Namespace) -> None:
    """Float32 tensors on two threads of torch: `acc += w * x`."""
    import torch

    torch.set_num_threads(2)
    model = {name: torch.zeros(shape) for name, shape in shapes(args.mib, args.tensors).items()}
    for number in range(args.rounds):
        total = {name: torch.zeros_like(value) for name, value in model.items()}
        weights = 0
        for client in range(1, args.clients + 1):
            if client == 1:
                note("task", round=number, client=client)
            trained = update(model, client)
            for name, value in total.items():
                value.add_(trained[name], alpha=weight(client))
            weights += weight(client)
        for value in total.values():
            value.div_(weights)
        model = total
    hand_in("big", model)


def digits(args: argparse.Namespace) -> None:
    """The digits, one client after another."""
    import digitsnet
    import torch

    torch.set_num_threads(1)
    parts, _ = digitsnet.load(args.clients)
    net = digitsnet.network()
    model = {name: value.clone() for name, value in net.state_dict().items()}
    for number in range(args.rounds):
        total = {name: torch.zeros_like(value) for name, value in model.items()}
        samples = 0
        for client in range(args.clients):
            if client == 0:
                note("task", round=number, client=client + 1)
            net.load_state_dict(model)
            count = digitsnet.train(net, parts[client], number, client)
            for name, value in net.state_dict().items():
                total[name].add_(value, alpha=count)
            samples += count
        model = {name: value / samples for name, value in total.items()}
    hand_in("digits", model)


def main() -> None:
    args = arguments(__doc__ or "").parse_args()
    {"np": tiny, "big": big, "digits": digits}[args.kind](args)


if __name__ == "__main__":
    main()
