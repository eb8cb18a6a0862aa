"""scikit-learn's handwritten digits over three sites, each of which sees mostly digits of its own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

FEATURES, DIGITS, SITES = 64, 10, 3
#: The share of a site's images that are of its own digits: site-1 has 0, 3, 6 and 9, site-2 has 1, 4 and 7.
OWN = 0.7


class Images(NamedTuple):
    """Pixels (n, 64) from 0 to 1, and which digits they show (n,)."""

    x: np.ndarray
    y: np.ndarray


def site_data(site: str) -> tuple[Images, Images]:
    """A site's images to train on and, a fifth of them, to score models on; always the same ones."""
    number = int(site.rpartition("-")[2]) - 1
    pixels, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    owner = np.where(rng.random(len(labels)) < OWN, labels % SITES, rng.integers(0, SITES, len(labels)))
    mine = rng.permutation(np.flatnonzero(owner == number))
    x, y = (pixels[mine] / 16).astype(np.float32), labels[mine]
    held = len(mine) // 5
    return Images(x[held:], y[held:]), Images(x[:held], y[:held])
