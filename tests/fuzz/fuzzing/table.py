"""All targets by name."""

from __future__ import annotations

from .folders import ARCHIVE, JOB_FOLDER
from .streams import STREAM
from .target import Target
from .tensors import HEADER, PARTIAL, PAYLOAD
from .wire import CODEC, ENVELOPE

TARGETS: dict[str, Target] = {
    target.name: target for target in (ENVELOPE, CODEC, HEADER, PAYLOAD, STREAM, PARTIAL, JOB_FOLDER, ARCHIVE)
}
