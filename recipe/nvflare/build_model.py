"""Make a job's initial model in a process of its own: ``python -m fedloom.recipe.nvflare.build_model CUSTOM JSON OUT``.

The model's class is the job's own code, and its module's name may be any: it is not imported beside anything else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ...serialization.component import Component
from ...serialization.errors import FedloomError, JobError
from ...serialization.model import FLModel
from ...serialization.payload import encode_model

_TIMEOUT_S = 300.0


def build_model(component: Component, custom: Path, out: Path, where: str) -> None:
    """Write the parameters of a torch module that a component makes.

    Raises:
        JobError: it cannot be made; with the traceback of its own code.
    """
    command = [sys.executable, "-m", "fedloom.recipe.nvflare.build_model"]
    told = json.dumps({"path": component.path, "args": component.args})
    try:
        done = subprocess.run(
            [*command, str(custom), told, str(out)], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise JobError(f"{where}: model {component.path} was not made within {_TIMEOUT_S:g} s") from None
    if done.returncode:
        raise JobError(f"{where}: model {component.path} cannot be made:\n{done.stderr.strip()[-4000:]}")


def main(custom: str, told: str, out: str) -> int:
    """Build and write it; what is wrong goes to stderr."""
    from ..base import torch_params

    sys.path.insert(0, custom)
    data: dict[str, Any] = json.loads(told)
    try:
        model = Component(data["path"], data["args"]).build()
        if not hasattr(model, "state_dict"):
            raise JobError(f"it is a {type(model).__name__}; a torch module has state_dict()")
        encoded = encode_model(FLModel(params=torch_params(model)))
        with Path(out).open("wb") as file:
            encoded.write_to(file)
    except FedloomError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
