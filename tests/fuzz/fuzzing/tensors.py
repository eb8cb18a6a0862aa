"""Safetensors files of strangers: the header, a model, and a partial that is merged into a fold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from fedloom.serialization.codec import check_plain, pack
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.errors import (
    FoldError,
    HeaderError,
    LayoutError,
    PayloadError,
)
from fedloom.serialization.fold import Fold, Good
from fedloom.serialization.foldpartial import METADATA_KEY
from fedloom.serialization.foldplan import FoldPlan
from fedloom.serialization.header import METADATA, Header, build_header, read_header
from fedloom.serialization.model import FLModel, flatten
from fedloom.serialization.payload import decode_model, encode_model
from safetensors import SafetensorError, deserialize

from .target import MIB, Target

STEPS = "NUM_STEPS_CURRENT_ROUND"
#: A header may promise more data than the input has; up to so much it is filled with zeros.
MAX_FILL = 64 * 1024


def as_file(data: bytes) -> bytes:
    """A file out of bytes: itself, or (after an odd first byte) two bytes of the header's length, header, data.

    In the second form the length in front is right whatever a mutation did to the header, and what data is missing at
    the end is filled with zeros.
    """
    if not data or data[0] % 2 == 0:
        return data[1:]
    size = int.from_bytes(data[1:3], "little")
    head, body = data[3 : 3 + size], data[3 + size :]
    file = len(head).to_bytes(8, "little") + head + body
    try:
        wanted = read_header(file).total_bytes
    except HeaderError:
        return file
    return file.ljust(wanted, b"\0") if wanted <= MAX_FILL else file


def of_file(file: bytes) -> bytes:
    """The reverse of `as_file`, in its second form."""
    size = int.from_bytes(file[:8], "little")
    return b"\x01" + size.to_bytes(2, "little") + file[8:]


# ---------------------------------------------------------------- header


def header(data: bytes) -> None:
    """The header alone. What is accepted here, the safetensors library accepts too, and reads the same."""
    file = as_file(data)
    found = read_header(file)
    _consistent(found)
    rebuilt, text = build_header([(t.name, t.dtype, t.shape) for t in found.tensors], found.metadata)
    again = read_header(text)
    assert again == rebuilt
    assert {t.name: (t.dtype, t.shape) for t in again.tensors} == {t.name: (t.dtype, t.shape) for t in found.tensors}
    assert again.metadata == found.metadata
    if found.total_bytes <= len(file) + MAX_FILL:
        whole = file[: found.total_bytes].ljust(found.total_bytes, b"\0")
        assert read_header(whole, len(whole)) == found
        _as_the_library(found, whole)


def _consistent(found: Header) -> None:
    end = 0
    for tensor in found.tensors:
        assert tensor.start == end
        end = tensor.stop
    assert end == found.data_bytes
    assert len(found.layout_id) == 64


def _as_the_library(found: Header, whole: bytes) -> None:
    try:
        theirs = deserialize(whole)
    except SafetensorError as error:
        raise AssertionError(f"accepted here and refused by the safetensors library: {error}") from None
    ours = {
        t.name: (t.dtype, list(t.shape), whole[found.data_start + t.start : found.data_start + t.stop])
        for t in found.tensors
    }
    assert {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in theirs} == ours


def header_seeds() -> Iterable[bytes]:
    """Headers of every dtype, none, scalars, empty tensors, metadata; and hand-made odd ones."""
    files = [encode_model(model).tobytes() for model in models()]
    files.append(build_header([])[1])
    files.append(build_header([], {"a": "b"})[1])
    odd = [
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[],"data_offsets":[8,9]}}',
        b'{"a":{"dtype":"F64","shape":[0,4294967296],"data_offsets":[0,0]}}  ',
        b'{"a":{"dtype":"BF16","shape":[1,2,3],"data_offsets":[0,12]},"a":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}}',
        b'{"__metadata__":{"format":"pt"},"x":{"shape":[1],"data_offsets":[0,1],"dtype":"F8_E4M3"}}',
        b'{"\\u00e9\\ud83d\\ude00":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
    ]
    seeds = [of_file(file) for file in files] + [b"\0" + file for file in files[:4]]
    return [*seeds, *(of_file(len(text).to_bytes(8, "little") + text) for text in odd)]


# ---------------------------------------------------------------- payload


def models() -> list[FLModel]:
    """Models that are valid, one for each way to nest and describe."""
    rng = np.random.default_rng(0)
    kinds = [
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
        np.int64,
        np.uint8,
    ]
    flat = {f"t{i}.w": rng.integers(0, 9, (2, i % 3)).astype(kind) for i, kind in enumerate(kinds)}
    return [
        FLModel(params=flat | {"flag": np.array([True, False])}, meta={STEPS: 3}),
        FLModel(params={"z": np.ones(2, np.float32), "a": np.zeros((), np.int32)}, params_type="DIFF", current_round=2),
        FLModel(params={"layer": {"w": np.ones(3), 1: [np.zeros(1), (np.ones(1, np.int8),)]}}, metrics={"loss": 0.5}),
        FLModel(metrics={"loss": float("nan"), "acc": 1}, meta={"note": "é", "list": [1, None, {"x": True}]}),
        FLModel(
            params=[np.ones(1)], optimizer_params={"state": {0: {"step": 3, "m": np.ones(2)}}, "groups": ["a", None]}
        ),
        FLModel(params={}, start_round=1, total_rounds=4),
    ]


def payload(data: bytes) -> None:
    """A whole model. What decodes encodes to something that decodes equal."""
    file = as_file(data)
    model = decode_model(file)
    model.validate()
    repr(model)
    try:
        first = encode_model(model)
    except (LayoutError, PayloadError, HeaderError):
        return  # names that clash once they are paths, or a plain side that grew over its size
    again = decode_model(first.tobytes())
    _equal(model, again)
    assert encode_model(again).tobytes() == first.tobytes()


def _equal(a: FLModel, b: FLModel) -> None:
    for name in ("params_type", "start_round", "current_round", "total_rounds"):
        assert getattr(a, name) == getattr(b, name) or name == "start_round", name
    assert repr(a.meta) == repr(b.meta)
    assert repr(a.metrics) == repr(b.metrics)
    for ours, theirs, plain in ((a.params, b.params, False), (a.optimizer_params, b.optimizer_params, True)):
        if ours is None or theirs is None:
            assert ours is theirs
            continue
        (left, spec), (right, other) = flatten(ours, plain=plain), flatten(theirs, plain=plain)
        assert repr(spec) == repr(other)
        assert list(left) == list(right)
        for name in left:
            assert left[name].dtype == right[name].dtype and left[name].shape == right[name].shape
            assert left[name].tobytes() == right[name].tobytes()


def payload_seeds() -> Iterable[bytes]:
    """The models, and a file of another tool."""
    files = [encode_model(model).tobytes() for model in models()]
    theirs, head = build_header([("w", "F32", (2, 2))], {"format": "pt"})
    return [
        *(of_file(file) for file in files),
        *(b"\0" + file for file in files),
        of_file(head + bytes(theirs.data_bytes)),
    ]


# ---------------------------------------------------------------- partial

BASE: dict[str, Any] = {
    "b": np.array([0.5, -0.25], np.float32),
    "f16": np.array([1.5], np.float16),
    "n": np.array([3, -4], np.int64),
    "small": np.array([7], np.int8),
    "flag": np.array([True]),
}
PLAN = FoldPlan.first(BASE, tasks=8, aggregation_weights={"site-2": 0.5}, exclude="^none")
_PLACES = {t.name: t for t in PLAN.tensors}


def results(kind: str, count: int) -> list[FLModel]:
    """A few results of this kind."""
    rng = np.random.default_rng(count)
    out: list[FLModel] = []
    for index in range(count):
        params = {
            name: (value + rng.standard_normal(value.shape)).astype(value.dtype)
            for name, value in BASE.items()
            if value.dtype != bool and (name != "n" or index % 2 == 0)
        }
        out.append(FLModel(params=params, params_type=kind, metrics={"loss": index + 0.5}, meta={STEPS: index + 1.5}))
    return out


def a_fold(kind: str, count: int) -> Fold:
    """A fold of some results."""
    fold = Fold(PLAN)
    for index, result in enumerate(results(kind, count)):
        fold.add(encode_model(result), site=f"site-{index}")
    return fold


@cache
def a_partial(kind: str, count: int) -> bytes:
    """The same as a partial."""
    return b"".join(a_fold(kind, count).to_partial()[0])


def bits(fold: Fold) -> str:
    """A fold's state."""
    buffers, _ = fold.to_partial()
    state = json.loads(json.loads(bytes(buffers[0][8:]))[METADATA][METADATA_KEY])
    del state["sites"]  # the few that errors show
    return digest_buffers([json.dumps(state).encode(), *buffers[1:]])


def partial_file(data: bytes) -> bytes:
    """A partial out of bytes: a file as `as_file` has it, or (first byte >= 128) its state as JSON and the sums.

    In the second form a byte says which tensors are there and one how many limbs integers have; the header is built.
    """
    if not data or data[0] < 128:
        return as_file(data)
    size = int.from_bytes(data[1:3], "little")
    present, limbs = data[3:4] or b"\xff", data[4:5] or b"\3"
    state, body = data[5 : 5 + size], data[5 + size :]
    specs = [
        (name, "I64", (limbs[0] % 16, t.items) if t.dtype.startswith("I") else t.shape)
        for place, (name, t) in enumerate(_PLACES.items())
        if present[0] >> place & 1
    ]
    try:
        built, text = build_header(specs, {METADATA_KEY: state.decode("utf-8", "surrogatepass")})
    except (HeaderError, UnicodeDecodeError):
        return b""
    return text + body[: built.data_bytes].ljust(built.data_bytes, b"\0")


def of_partial(file: bytes, present: int, limbs: int) -> bytes:
    """The reverse of `partial_file`, in its second form."""
    found = read_header(file, len(file))
    state = found.metadata[METADATA_KEY].encode()
    return b"\xff" + len(state).to_bytes(2, "little") + bytes([present, limbs]) + state + file[found.data_start :]


def partial(data: bytes) -> None:
    """A foreign partial into a fold: refused without a trace, or in, out again without a trace, and finished."""
    file = partial_file(data)
    fold = Fold(PLAN)
    if len(data) % 2:
        fold.merge(a_partial("FULL", 2))
    before = bits(fold)
    try:
        fold.merge(file)
    except (FoldError, PayloadError, HeaderError):
        assert bits(fold) == before, "a refused partial left a trace"
        raise
    merged = bits(fold)
    again = Fold(PLAN)
    again.merge(b"".join(fold.to_partial()[0]))
    assert bits(again) == merged
    _close(fold)
    assert bits(fold) == merged, "to finish changed the sums"
    fold.unmerge(file)
    assert bits(fold) == before, "a partial that was taken out left a trace"


def _close(fold: Fold) -> None:
    check_plain(fold.metrics)
    pack(fold.metrics)  # they travel in the round's record
    assert fold.weight_sum >= 0
    match fold.check():
        case Good() if fold.count:
            try:
                model = fold.finish(BASE)
            except (FoldError, LayoutError):
                return
            for name, value in model.params.items():
                assert value.dtype == BASE[name].dtype and value.shape == BASE[name].shape
                assert np.isfinite(value.astype(np.float64)).all()
            fold.next_plan()
        case Good():
            pass
        case rescale:
            FoldPlan.from_bytes(rescale.plan.to_bytes())


def partial_seeds() -> Iterable[bytes]:
    """Partials of no, one and several results, FULL and DIFF."""
    seeds: list[bytes] = []
    for kind, count in (("FULL", 0), ("FULL", 1), ("FULL", 3), ("DIFF", 2)):
        file = a_partial(kind, count)
        found = read_header(file)
        places = list(_PLACES)
        present = sum(1 << places.index(t.name) for t in found.tensors)
        limbs = max((t.shape[0] for t in found.tensors if PLAN.tensors[places.index(t.name)].dtype == "I64"), default=0)
        seeds.append(of_file(file))
        seeds.append(of_partial(file, present, limbs))
    return seeds


JSON_WORDS = (
    b'"dtype":"F32"',
    b'"shape":[',
    b'"data_offsets":[',
    b'"__metadata__":{',
    b'"fedloom":"{',
    b'"order":[',
    b'"structure":',
    b'{"$":"',
    b'{"$map":[[',
    b'{"$tuple":[',
    b'{"$plain":',
    b'"optimizer":',
    b'\\"params_type\\":\\"DIFF\\"',
    b"null",
    b"true",
    b"-0",
    b"1e999",
    b"NaN",
    b"\\ud800",
    b"\\u0000",
    b"9007199254740993",
    b"18446744073709551616",
    b"[[[[[[[[",
    b"__optimizer__.",
    b'"F8_E4M3"',
    b'"BF16"',
    b'"BOOL"',
    b'"I64"',
)
PARTIAL_WORDS = (
    b'"format":"fedloom-partial/1"',
    b'"plan":',
    PLAN.digest.encode(),
    b'"kind":"DIFF"',
    b'"weighted":false',
    b'"count":',
    b'"weight":"',
    b'"sizes":[[',
    b'"metrics":[["',
    b'"tensors":[[',
    b'"sites":[',
    b"p9999",
    b"-1",
    b"\\ud800",
    b"null",
    b"true",
    b"ffffffffffffffff",
)

HEADER = Target("header", header, (HeaderError,), header_seeds, JSON_WORDS, constant_bytes=2 * MIB)
PAYLOAD = Target("payload", payload, (HeaderError, PayloadError), payload_seeds, JSON_WORDS, constant_bytes=2 * MIB)
PARTIAL = Target(
    "partial", partial, (FoldError, PayloadError, HeaderError), partial_seeds, PARTIAL_WORDS, constant_bytes=8 * MIB
)
