"""A client of the digits row."""

from __future__ import annotations

import sys

import digitsnet
import fedloom.client as flare
import sklearn.datasets  # noqa: F401 - for digitsnet.load: at the top, as a training script has it
import torch
from workload import note


def main() -> None:
    torch.set_num_threads(1)
    flare.init()
    client = int(flare.get_site_name().rsplit("-", 1)[1]) - 1
    parts, _ = digitsnet.load(int(sys.argv[1]))
    net = digitsnet.network()
    while flare.is_running():
        received = flare.receive()
        note("task", round=received.current_round, client=client + 1)
        net.load_state_dict(received.params)
        samples = digitsnet.train(net, parts[client], received.current_round, client)
        flare.send(flare.FLModel(params=net.state_dict(), meta={"NUM_STEPS_CURRENT_ROUND": samples}))


if __name__ == "__main__":
    main()
