"""What a codec costs and saves on real digits: bytes a round, accuracy, and how far the model is from the uncoded one.

    python benchmarks/codecs.py [--rounds 20] [--markdown]

Runs `examples/digits` (eight sites, unevenly split) once for each codec, with FULL and with DIFF results, all from the
same seed. *Bytes* are those of a round's results as they travel, of the uncoded in the same mode; *distance* is the
length of the difference between the final model and the uncoded job's, in parts of how far that one has moved.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from fedloom.recipe import FedAvgRecipe, SimEnv
from safetensors.numpy import load_file

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"
CODECS = (None, "fp16", "bf16", "int8")
SITES = 8


def main() -> None:
    """Print a line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--markdown", action="store_true", help="print a table for the docs")
    options = parser.parse_args()
    sys.path.insert(0, str(DIGITS))
    import torch
    from model import DigitsNet

    torch.manual_seed(0)
    start = {name: value.numpy().copy() for name, value in DigitsNet().state_dict().items()}
    if options.markdown:
        print("| results | codec | bytes a round | of uncoded | final accuracy | best | distance |")
        print("|---|---|---|---|---|---|---|")
    for transfer in ("FULL", "DIFF"):
        plain: dict[str, Any] = {}
        for codec in CODECS:
            case = run(transfer, codec, options.rounds)
            plain = plain or case
            moved = length(plain["model"], start)
            cells = [
                transfer,
                codec or "none",
                f"{case['bytes']:,.0f}",
                f"{case['bytes'] / plain['bytes']:.3f}",
                f"{case['accuracy']:.4f}",
                f"{case['best']:.4f}",
                f"{length(case['model'], plain['model']) / moved:.1e}" if codec else "",
            ]
            print(f"| {' | '.join(cells)} |" if options.markdown else "  ".join(f"{cell:>10}" for cell in cells))
            sys.stdout.flush()


def run(transfer: str, codec: str | None, rounds: int) -> dict[str, Any]:
    """One job: bytes of a round's results, accuracy of the final and the best model, and the final model."""
    import torch
    from data import load
    from model import DigitsNet, accuracy

    torch.manual_seed(0)
    recipe = FedAvgRecipe(
        name="digits",
        initial_model=DigitsNet(),
        min_clients=SITES,
        num_rounds=rounds,
        train_script=str(DIGITS / "client.py"),
        params_transfer_type=transfer,
        codec=codec,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = recipe.execute(SimEnv(num_clients=SITES, workspace_root=folder, show_progress=False))
        if run.get_status() != "FINISHED:COMPLETED":
            raise SystemExit(f"{transfer} {codec}: {run.get_status()}")
        result = Path(folder) / "digits"
        records = [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]
        model = load_file(result / "model.safetensors")
    net = DigitsNet()
    net.load_state_dict({name: torch.from_numpy(value) for name, value in model.items()})
    return {
        "bytes": sum(record["bytes"] for record in records) / len(records),
        "accuracy": accuracy(net, load()[1]),
        "best": max(record["metrics"]["accuracy"] for record in records),
        "model": model,
    }


def length(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The Euclidean length of the difference of two models."""
    return float(np.sqrt(sum(np.sum((a[name].astype(np.float64) - b[name]) ** 2) for name in a)))


if __name__ == "__main__":
    main()
