"""Whether a result is fit to be averaged, found out while it is written: its bytes are read from memory once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..serialization.dtypes import is_float
from ..serialization.elements import all_finite
from ..serialization.errors import ValuesError
from ..serialization.payload import OPTIMIZER_PREFIX, EncodedModel

#: What is looked at and written at a time: of that size it stays in a core's cache.
_PART_BYTES = 512 * 1024


def looked_at(encoded: EncodedModel, who: object) -> Iterator[memoryview]:
    """The payload in parts, each looked at for NaN and Inf where it is of a float tensor of the params.

    Raises:
        ValuesError: one holds such a value.
    """
    yield encoded.buffers[0]
    tensors = (tensor for tensor in encoded.header.tensors if tensor.stop > tensor.start)
    for tensor, buffer in zip(tensors, encoded.buffers[1:], strict=True):
        if not is_float(tensor.dtype) or tensor.name.startswith(OPTIMIZER_PREFIX):
            yield buffer
            continue
        for first in range(0, len(buffer), _PART_BYTES):
            part = buffer[first : first + _PART_BYTES]
            if not all_finite(np.frombuffer(part, np.uint8), tensor.dtype):
                raise not_finite(tensor.name, who)
            yield part


def not_finite(name: str, who: object) -> ValuesError:
    """What is said of a result that would spoil an aggregate."""
    return ValuesError(
        f"tensor {name!r} of the result of {who} holds NaN or Inf, which would spoil the aggregate:"
        " lower the learning rate, clip gradients, or look at the data"
    )
