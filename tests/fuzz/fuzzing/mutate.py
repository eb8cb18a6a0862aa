"""Seeded mutations of valid inputs: what the short form tries where atheris is not installed."""

from __future__ import annotations

import random
from collections.abc import Sequence

#: Values at the edges of what a byte, a length or a sign can be.
ODD_BYTES = b'\x00\x01\x7f\x80\xfe\xff\xc1\xdc\xdd{}[]"\\,:-0 '


def mutate(rng: random.Random, seeds: Sequence[bytes], words: Sequence[bytes], max_len: int) -> bytes:
    """One to four changes of one of the seeds."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(data))
        match rng.randrange(8):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at % len(data)] = rng.choice(ODD_BYTES)
            case 2:
                del data[at : at + rng.randint(1, 16)]
            case 3:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
            case 4 if words:
                word = rng.choice(words)
                data[at : at + rng.choice((0, len(word)))] = word
            case 5:
                start = rng.randint(0, len(data))
                data[at:at] = data[start : start + rng.randint(1, 32)]
            case 6:
                other = rng.choice(seeds)
                data[at:] = other[rng.randint(0, len(other)) :]
            case _:
                del data[at:]
    return bytes(data[:max_len])
