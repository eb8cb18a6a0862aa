"""A site's training: a line through its own points, with the loss of every step logged."""

from __future__ import annotations

import fedloom.client as flare
import numpy as np
from fedloom.client.tracking import SummaryWriter

STEPS = 20


def main() -> None:
    flare.init()
    x, y = data(flare.get_site_name())
    writer = SummaryWriter()
    while flare.is_running():
        model = flare.receive()
        w = model.params["w"].astype(np.float64)
        before = loss(w, x, y)
        for step in range(STEPS):
            w -= 0.1 * gradient(w, x, y)
            writer.add_scalar("train/loss", loss(w, x, y), global_step=model.current_round * STEPS + step)
        writer.add_scalars("weights", {"slope": w[0], "offset": w[1]}, global_step=model.current_round)
        writer.add_text("note", f"{len(x)} points", global_step=model.current_round)
        flare.send(
            flare.FLModel(
                params={"w": w.astype(np.float32)},
                metrics={"loss": before},  # of the model that was received
                meta={"NUM_STEPS_CURRENT_ROUND": STEPS},
            )
        )


def data(site: str) -> tuple[np.ndarray, np.ndarray]:
    """Points near y = 3x - 1, of this site alone."""
    rng = np.random.default_rng(sum(site.encode()))
    x = rng.uniform(-1, 1, 64)
    return x, 3 * x - 1 + rng.normal(0, 0.1, 64)


def loss(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean((w[0] * x + w[1] - y) ** 2))


def gradient(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    error = w[0] * x + w[1] - y
    return np.array([2 * np.mean(error * x), 2 * np.mean(error)])


if __name__ == "__main__":
    main()
