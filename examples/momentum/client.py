"""A site that remembers: its optimizer's momentum goes on from round to round, through `flare.state()`.

What is kept there is stored with the result that `send` sends. A site that is killed in the middle of a task starts the
next try from exactly where the first had started, so the model's bits are the same as if nothing had happened; a plain
global variable would have been lost.
"""

from __future__ import annotations

import fedloom.client as flare
import torch
from data import site_data


def main() -> None:
    flare.init()
    x, y = site_data(flare.get_site_name())
    model = torch.nn.Linear(x.shape[1], 1)

    while flare.is_running():
        received = flare.receive()
        model.load_state_dict(received.params)
        with torch.no_grad():  # how the received model does here
            loss = torch.nn.functional.mse_loss(model(x), y).item()

        state = flare.state()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        for _ in range(5):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        state["optimizer"] = optimizer.state_dict()
        state["rounds"] = state.get("rounds", 0) + 1

        print(f"round {received.current_round}: loss {loss:.6f}, {state['rounds']} rounds remembered")
        flare.send(
            flare.FLModel(
                params=model.state_dict(),
                metrics={"loss": loss, "score": 1 - loss / y.var().item(), "rounds_remembered": state["rounds"]},
                meta={"NUM_STEPS_CURRENT_ROUND": 5},
            )
        )


if __name__ == "__main__":
    main()
