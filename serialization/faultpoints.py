"""Named places where a test may kill this process, to prove that nothing is lost there.

``FEDLOOM_FAULT="control.after_commit_before_send:3"`` kills the process with SIGKILL the third time it passes that
point (several, separated by commas). Each kill first appends the point's name to the file in ``FEDLOOM_FAULT_LOG``, so
that a test can assert that the point was reached at all. Without the variable a point costs one truth test.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

__all__ = ["arm", "fault_point"]

_armed: dict[str, int] = {}


def arm(spec: str) -> None:
    """Arm the points of ``"point:n,point:n"``, in place of those armed before; "" disarms all.

    Raises:
        ValueError: a part is not a name, a colon and a positive number.
    """
    _armed.clear()
    for part in filter(None, (p.strip() for p in spec.split(","))):
        name, _, count = part.rpartition(":")
        if not name or not count.isdigit() or int(count) < 1:
            raise ValueError(
                f"FEDLOOM_FAULT part {part!r}; it is point:n with n from 1, such as control.before_commit:2"
            )
        _armed[name] = int(count)


def fault_point(name: str) -> None:
    """Die here if this point is armed and its count is used up."""
    if not _armed:
        return
    left = _armed.get(name)
    if left is None:
        return
    if left > 1:
        _armed[name] = left - 1
        return
    log_path = os.environ.get("FEDLOOM_FAULT_LOG")
    if log_path:
        with Path(log_path).open("a") as log:
            log.write(name + "\n")
            log.flush()
            os.fsync(log.fileno())
    os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get("FEDLOOM_FAULT", ""))
