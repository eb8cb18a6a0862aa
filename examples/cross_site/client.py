"""A site with three kinds of tasks: train, give its own model, score somebody's model on its own data."""

from __future__ import annotations

import fedloom.client as flare
from data import site_data
from model import score, train

STEPS = 20


def main() -> None:
    flare.init()
    training, held_out = site_data(flare.get_site_name())

    while flare.is_running():
        received = flare.receive()
        if flare.is_submit_model():  # first: this task comes without params
            flare.send(flare.FLModel(params=flare.state()["model"]))
            continue
        metrics = score(received.params, held_out)
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics=metrics))
            continue
        params = train(received.params, training, STEPS)
        flare.state()["model"] = params  # what this site knows, before it is averaged with the others'
        print(f"round {received.current_round}: accuracy {metrics['accuracy']:.3f}")
        flare.send(flare.FLModel(params=params, metrics=metrics, meta={"NUM_STEPS_CURRENT_ROUND": STEPS}))


if __name__ == "__main__":
    main()
