"""The words that messages are made of: ids, bounded field types, and references to tasks and payloads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NewType

from .codec import Limit

JobId = NewType("JobId", str)
Site = NewType("Site", str)
TaskId = NewType("TaskId", str)
GatherId = NewType("GatherId", str)
PayloadId = NewType("PayloadId", str)

#: Results and models up to this size ride in the tail of a control message.
INLINE_BYTES = 32 * 1024
#: One message's inline results together.
INLINE_TOTAL_BYTES = 256 * 1024

Name = Annotated[str, Limit(max_len=256)]
Short = Annotated[str, Limit(max_len=1024)]
Text = Annotated[str, Limit(max_len=16 * 1024)]
Count = Annotated[int, Limit(low=0, high=2**53)]
Seconds = Annotated[float, Limit(low=0, high=10 * 365 * 86400)]
# Ids become the names of files and folders on the other side: none of them may lead elsewhere.
FILE = r"[A-Za-z0-9][A-Za-z0-9._-]*"
FILE_OR_NONE = f"(?:{FILE})?"
FOLDER = r"(?:[^\x00-\x1f\x7f/\\.][^\x00-\x1f\x7f/\\]*)?"
JobKey = Annotated[JobId, Limit(max_len=256, pattern=FOLDER)]
SiteKey = Annotated[Site, Limit(max_len=256, pattern=FOLDER)]
TaskKey = Annotated[TaskId, Limit(max_len=64, pattern=FILE_OR_NONE)]
GatherKey = Annotated[GatherId, Limit(max_len=64, pattern=FILE_OR_NONE)]
PayloadKey = Annotated[PayloadId, Limit(max_len=128, pattern=FILE)]
StreamKey = Annotated[str, Limit(max_len=32, pattern="(?:[0-9a-f]{32})?")]
NO_JOB = JobId("")
NO_SITE = Site("")
NO_TASK = TaskId("")
Role = Literal["executor", "controller", "job", "client"]


@dataclass(frozen=True, slots=True)
class TaskRef:
    """One attempt at one task; the attempt is the fencing token."""

    task: TaskKey
    attempt: Annotated[int, Limit(low=1, high=2**31)]


@dataclass(frozen=True, slots=True)
class PayloadRef:
    """Immutable bytes known by id, size and digest.

    ``digest`` is the hex BLAKE3 root over 4 MiB blocks, or "" where `integrity = "size"` holds or it is not known yet.
    """

    id: PayloadKey
    size: Count
    digest: Annotated[str, Limit(max_len=64)] = ""
    type: Literal["tensors", "blob"] = "tensors"
