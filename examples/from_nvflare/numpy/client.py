"""A site's script, written for NVFLARE: it fits a line to the site's own points. fedloom runs it as it is."""

from __future__ import annotations

import argparse

import numpy as np
import nvflare.client as flare
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.np.constants import NPConstants
from nvflare.client.tracking import SummaryWriter


def points_of(site: str) -> tuple[np.ndarray, np.ndarray]:
    """Points on y = 2x - 1; four sites see four stretches of x, and then it begins anew."""
    start = (int(site.rpartition("-")[2]) - 1) % 4 / 2 - 1
    x = np.linspace(start, start + 0.5, 50)
    return np.stack([x, np.ones_like(x)], axis=1), 2 * x - 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--learning_rate", type=float, default=0.1)
    parser.add_argument("--update_type", choices=["full", "diff"], default="full")
    args = parser.parse_args()

    flare.init()
    site = flare.system_info()["site_name"]
    x, y = points_of(site)
    writer = SummaryWriter()

    while flare.is_running():
        received = flare.receive()
        line = received.params[NPConstants.NUMPY_KEY].astype(np.float64)
        error = float(np.mean((x @ line - y) ** 2))
        print(f"site={site}, round={received.current_round}, mean squared error of the received line={error:.6f}")
        writer.add_scalar("mean_squared_error", error, global_step=received.current_round)

        trained = line.copy()
        for _ in range(100):
            trained -= args.learning_rate * 2 * x.T @ (x @ trained - y) / len(y)

        diff = args.update_type == "diff"
        flare.send(
            FLModel(
                params={NPConstants.NUMPY_KEY: (trained - line if diff else trained).astype(np.float32)},
                params_type=ParamsType.DIFF if diff else ParamsType.FULL,
                metrics={"accuracy": 1 / (1 + error)},
                meta={"NUM_STEPS_CURRENT_ROUND": len(y)},
            )
        )


if __name__ == "__main__":
    main()
