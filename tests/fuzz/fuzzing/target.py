"""What a target is, and how one input is run through it with its memory watched."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MIB = 1024 * 1024


class TooMuchMemory(AssertionError):
    """An input made the target allocate more than its size allows."""


@dataclass(frozen=True, slots=True)
class Target:
    """One entry to the code that reads what strangers send.

    Attributes:
        name: as on the command line and of the folders of corpus, crashes and regressions.
        run: reads the bytes; every exception is an escape but ``allowed``.
        allowed: what the code says it raises on bad input; exactly these classes and their subclasses.
        seeds: real valid inputs, for the corpus.
        words: a dictionary for the mutations.
        max_len: the longest input that is tried.
        constant_bytes: memory that any input may take, whatever its size.
        factor: and how many times its own size beside that.
    """

    name: str
    run: Callable[[bytes], None]
    allowed: tuple[type[Exception], ...]
    seeds: Callable[[], Iterable[bytes]]
    words: tuple[bytes, ...] = ()
    max_len: int = 4096
    constant_bytes: int = 1 * MIB
    factor: int = 128

    def __call__(self, data: bytes) -> bool:
        """Run one input; whether it was accepted. Raises what escaped."""
        try:
            self.run(data)
        except self.allowed:
            return False
        return True

    def watched(self, data: bytes) -> bool:
        """As a call, with the allocations counted.

        Raises:
            TooMuchMemory: the peak was over the bound.
        """
        tracemalloc.start()
        try:
            accepted = self(data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        most = self.constant_bytes + self.factor * len(data)
        if peak > most:
            raise TooMuchMemory(f"{self.name}: an input of {len(data)} bytes took {peak}; at most {most}")
        return accepted


def refuses(run: Callable[[], object], *allowed: type[Exception]) -> bool:
    """Whether a step inside a target is refused with one of these errors; others escape."""
    try:
        run()
    except allowed:
        return True
    return False
