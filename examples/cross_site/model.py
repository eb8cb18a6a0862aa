"""Softmax regression in numpy: one layer of weights, trained by plain gradient descent."""

from __future__ import annotations

import numpy as np
from data import DIGITS, FEATURES, Images

Params = dict[str, np.ndarray]


def initial() -> Params:
    """All zeros."""
    return {"w": np.zeros((FEATURES, DIGITS), np.float32), "b": np.zeros(DIGITS, np.float32)}


def probabilities(params: Params, x: np.ndarray) -> np.ndarray:
    """(n, 10), each row's sum is 1."""
    logits = x @ params["w"] + params["b"]
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def train(params: Params, images: Images, steps: int = 20, rate: float = 0.5) -> Params:
    """The parameters after some steps on all images at once."""
    w, b = params["w"].copy(), params["b"].copy()
    truth = np.eye(DIGITS, dtype=np.float32)[images.y]
    for _ in range(steps):
        error = (probabilities({"w": w, "b": b}, images.x) - truth) / len(images.y)
        w -= rate * (images.x.T @ error).astype(np.float32)
        b -= rate * error.sum(axis=0).astype(np.float32)
    return {"w": w, "b": b}


def score(params: Params, images: Images) -> dict[str, float]:
    """The share of digits that are recognized, and the cross entropy."""
    found = probabilities(params, images.x)
    right = found[np.arange(len(images.y)), images.y]
    return {
        "accuracy": float(np.mean(found.argmax(axis=1) == images.y)),
        "loss": float(-np.mean(np.log(np.maximum(right, 1e-12)))),
    }
