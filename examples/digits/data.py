"""scikit-learn's 1,797 handwritten digits, split over the sites as unevenly as real institutions would have them."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

NUM_SITES = 8


@cache
def load() -> tuple[TensorDataset, TensorDataset]:
    """1,442 images to train on, and a fifth of each digit, 355, held out; always the same ones. Pixels are 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    held = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        where = rng.permutation(np.flatnonzero(labels == digit))
        held[where[: len(where) // 5]] = True
    x = (images / 16.0).astype(np.float32)
    return dataset(x[~held], labels[~held]), dataset(x[held], labels[held])


def site_split(site: str, alpha: float = 0.5) -> TensorDataset:
    """The training images that belong to `site-1` ... `site-8`.

    For each digit the sites' shares are drawn from Dirichlet(alpha): with 0.5 a site has plenty of some digits and
    next to none of others.
    """
    number = int(site.rsplit("-", 1)[1]) - 1
    if not 0 <= number < NUM_SITES:
        raise ValueError(f"{site}: the digits are split over site-1 to site-{NUM_SITES}")
    x, y = (tensor.numpy() for tensor in load()[0].tensors)
    rng = np.random.default_rng(0)
    mine: list[np.ndarray] = []
    for digit in range(10):
        where = np.flatnonzero(y == digit)
        cuts = (np.cumsum(rng.dirichlet([alpha] * NUM_SITES))[:-1] * len(where)).astype(int)
        mine.append(np.split(where, cuts)[number])
    picked = np.concatenate(mine)
    return dataset(x[picked], y[picked])


def dataset(x: np.ndarray, y: np.ndarray) -> TensorDataset:
    """Images and labels as torch wants them."""
    return TensorDataset(torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)))
