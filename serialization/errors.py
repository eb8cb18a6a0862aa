"""Every error that fedloom raises on purpose, as one tree.

    FedloomError
    ├── WireError               bytes from a peer that cannot be read
    │   ├── EnvelopeError       frame count, magic, version, flags, checksum
    │   ├── CodecError          msgpack that is malformed, oversize, or not the message it claims to be
    │   └── HeaderError         a safetensors header that breaks a rule of the format or one of ours
    ├── PayloadError            a payload that is incomplete, corrupt, or not what its reference says
    │   └── LayoutError         tensors whose names, dtypes or shapes do not match the model
    ├── FoldError               a result that cannot be added into the aggregate
    │   ├── WeightError         a non-positive or absurd weight
    │   │   └── MixedError      results that do not go together: weights in some of them only, FULL among DIFF
    │   └── ValuesError         NaN, Inf, or a value that no scale can hold
    ├── JobError                a job folder, archive, recipe or option that is wrong
    ├── FaultError              the broker refused a request: carries the typed fault
    │   ├── FencedError         another controller holds the job now
    │   └── NondeterministicError   a gather was opened again with another specification
    ├── GatherError             a gather closed without enough results
    ├── TaskError               user code failed: carries the site and its own traceback
    ├── LinkError               the broker cannot be reached, or not any more
    │   └── LinkTimeout         a bounded wait ended
    ├── StorageError            the disk refused: full, failing sync, quota
    └── ProcessError            a process of a simulation could not be started, or ended when it should not have

Each message says what was seen, what is allowed and what to do.
"""

from __future__ import annotations

__all__ = [
    "CodecError",
    "EnvelopeError",
    "FaultError",
    "FedloomError",
    "FencedError",
    "FoldError",
    "GatherError",
    "HeaderError",
    "JobError",
    "LayoutError",
    "LinkError",
    "LinkTimeout",
    "MixedError",
    "NondeterministicError",
    "PayloadError",
    "ProcessError",
    "StorageError",
    "TaskError",
    "ValuesError",
    "WeightError",
    "WireError",
]


class FedloomError(Exception):
    """Base of all errors that fedloom raises on purpose."""


class WireError(FedloomError):
    """Bytes from a peer that cannot be read."""


class EnvelopeError(WireError):
    """Wrong frame count, magic, version, flags or checksum."""


class CodecError(WireError):
    """A msgpack body that is malformed, oversize, or not the message it claims to be."""


class HeaderError(WireError):
    """A safetensors header that breaks a rule of the format or one of ours."""


class PayloadError(FedloomError):
    """A payload that is incomplete, corrupt, or not what its reference says."""


class LayoutError(PayloadError):
    """Tensors whose names, dtypes or shapes do not match the model."""


class FoldError(FedloomError):
    """A result that cannot be added into the aggregate."""


class WeightError(FoldError):
    """A non-positive or absurd weight."""


class MixedError(WeightError):
    """Results of a round that do not go together: no single site's fault, since each is good by itself."""


class ValuesError(FoldError):
    """NaN, Inf, or a value that no scale can hold."""


class JobError(FedloomError):
    """A job folder, archive, recipe or option that is wrong."""


class FaultError(FedloomError):
    """The broker refused a request.

    Attributes:
        code: the fault's short name, such as ``"stale"`` or ``"unknown_job"``.
        bound: the name of the bound that was reached, where it was one (see `broker.bounds`).
    """

    def __init__(self, code: str, text: str, *, bound: str = "") -> None:
        super().__init__(text)
        self.code = code
        self.bound = bound


class FencedError(FaultError):
    """Another controller holds the job now; this process must stop."""


class NondeterministicError(FaultError):
    """A gather was opened again under the same key with another specification."""


class GatherError(FedloomError):
    """A gather closed without enough results."""


class TaskError(FedloomError):
    """User code failed on a site.

    Attributes:
        site: the site on which it failed.
        text: the site's own traceback.
    """

    def __init__(self, site: str, text: str) -> None:
        super().__init__(f"{site}: {text}")
        self.site = site
        self.text = text


class LinkError(FedloomError):
    """The broker cannot be reached, or not any more."""


class LinkTimeout(LinkError):
    """A bounded wait ended."""


class StorageError(FedloomError):
    """The disk refused: full, a failing sync, or a quota."""


class ProcessError(FedloomError):
    """A process of a simulation could not be started, or ended when it should not have."""
