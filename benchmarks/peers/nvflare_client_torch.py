"""NVFLARE's client of the `big` and `digits` rows, in torch."""

import sys

import digitsnet
import nvflare.client as flare
import torch
from nets import Digits
from workload import note, update, weight


def main():
    kind, clients = sys.argv[1], int(sys.argv[2])
    flare.init()
    client = int(flare.get_site_name().rsplit("-", 1)[1])
    parts, net = None, None
    if kind == "digits":
        torch.set_num_threads(1)
        parts, net = digitsnet.load(clients)[0], Digits()
    while flare.is_running():
        received = flare.receive()
        if received is None:
            return
        note("task", round=received.current_round, client=client)
        params = {name: torch.as_tensor(value) for name, value in received.params.items()}
        if net is None:
            trained, steps = update(params, client), weight(client)
        else:
            net.load_state_dict(params)
            steps = digitsnet.train(net, parts[client - 1], received.current_round, client - 1)
            trained = net.state_dict()
        flare.send(flare.FLModel(params=trained, params_type="FULL", meta={"NUM_STEPS_CURRENT_ROUND": steps}))


main()
