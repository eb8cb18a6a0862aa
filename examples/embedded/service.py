"""A web service that has measurements, goes on answering requests, and takes part in federated training meanwhile.

    uvicorn service:app --port 8000          with FEDLOOM_BROKER and FEDLOOM_SITE in its environment

The executor runs in a thread of the service's own process. It installs no signal handlers and touches no globals; the
function below sees the same live objects as the request handlers do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import gettempdir

import numpy as np
from fedloom.executor import Executor, FLModel, TaskContext
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from train import fit, measurements

SITE = os.environ.get("FEDLOOM_SITE", "site-1")
BROKER = os.environ.get("FEDLOOM_BROKER", "tcp://127.0.0.1:7600")
WORKSPACE = Path(os.environ.get("FEDLOOM_WORKSPACE", Path(gettempdir()) / f"fedloom-{SITE}"))


class Line:
    """The service's own state: its measurements, and the line it predicts with."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.x, self.y = measurements(SITE)
        self.weights = np.zeros(2, np.float32)
        self.rounds = 0

    def add(self, x: float, y: float) -> int:
        with self.lock:
            self.x, self.y = np.append(self.x, x), np.append(self.y, y)
            return len(self.x)

    def snapshot(self) -> tuple[np.ndarray, np.ndarray]:
        with self.lock:
            return self.x.copy(), self.y.copy()


line = Line()
executor = Executor(BROKER, site=SITE, workspace=WORKSPACE)


@executor.task("train")
def train(model: FLModel, ctx: TaskContext) -> FLModel:
    """One round: fit the received line to what this service has measured until now."""
    x, y = line.snapshot()
    weights, loss = fit(model.params["line"], x, y)
    line.weights = model.params["line"].copy()  # predict with the global line from now on
    line.rounds += 1
    return FLModel(params={"line": weights}, metrics={"loss": loss}, meta={"NUM_STEPS_CURRENT_ROUND": len(x)})


async def predict(request: Request) -> JSONResponse:
    """GET /predict?x=1.5"""
    x = float(request.query_params["x"])
    return JSONResponse({"x": x, "y": float(line.weights[0] * x + line.weights[1]), "rounds": line.rounds})


async def measure(request: Request) -> JSONResponse:
    """POST /measure {"x": 1.5, "y": 2.0}: the next round trains on it."""
    body = await request.json()
    return JSONResponse({"measurements": line.add(float(body["x"]), float(body["y"]))})


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """The executor lives as long as the service."""
    async with executor:
        yield


app = Starlette(
    routes=[Route("/predict", predict), Route("/measure", measure, methods=["POST"])],
    lifespan=lifespan,
)
