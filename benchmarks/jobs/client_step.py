"""A client whose first task is one training step."""

from __future__ import annotations

import fedloom.client as flare
from step import step


def main() -> None:
    flare.init()
    while flare.is_running():
        received = flare.receive()
        step()
        flare.send(flare.FLModel(params=received.params))


if __name__ == "__main__":
    main()
