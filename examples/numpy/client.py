"""A site's training: add one to everything, and send the whole back.

Whether the whole or the difference travels is the job's affair: with DIFF the difference is taken in `send`.
"""

from __future__ import annotations

import fedloom.client as flare


def main() -> None:
    flare.init()
    while flare.is_running():
        model = flare.receive()
        trained = {name: array + 1 for name, array in model.params.items()}
        print(f"{flare.get_site_name()} round {model.current_round}: {sorted(trained)}")
        flare.send(flare.FLModel(params=trained))


if __name__ == "__main__":
    main()
