"""Ctrl-C and SIGTERM: raised where they may be, remembered where clearing up must not stop half-way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

__all__ = ["Shield", "interruptible"]


class Shield:
    """While it is up, an interrupt is remembered, not raised: clearing up must not stop half-way."""

    def __init__(self) -> None:
        self.up = False
        self.hit = False

    def run(self, step: Callable[[], object]) -> None:
        """Put it up, for good, and take a step of clearing up."""
        self.up = True
        step()


@contextmanager
def interruptible() -> Generator[Shield]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, and are as they were afterwards."""
    shield = Shield()
    if threading.current_thread() is not threading.main_thread():
        yield shield
        return

    def interrupt(number: int, frame: object) -> None:
        if shield.up:
            shield.hit = True
            return
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN and handler is not None:  # None: not Python's to restore
            signal.signal(number, interrupt)
    try:
        yield shield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        if shield.hit:
            raise KeyboardInterrupt
