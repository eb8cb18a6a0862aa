"""Right envelopes around wrong bodies: what msgpack lets pass, what no message is, and what leads out of a folder."""

from __future__ import annotations

import secrets
import struct
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from fedloom.serialization.codec import pack
from fedloom.serialization.messages import (
    Accept,
    Ask,
    Chunk,
    Done,
    Event,
    Get,
    Hello,
    OpenGather,
    Ping,
    Pong,
    Progress,
    Put,
    SubmitJob,
)

pytestmark = pytest.mark.process

NAN, INF = b"\xcb\x7f\xf8" + bytes(6), b"\xcb\x7f\xf0" + bytes(6)


def event(data: bytes) -> bytes:
    """An Event whose ``data`` is this msgpack."""
    return b"\x83\xa3job\xa1j\xa4kind\xa1k\xa4data" + data


def nested(depth: int) -> bytes:
    return b"\x81\xa1k" * depth + b"\x01"


MSGPACK: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "malformed msgpack"),
    "cut short": (b"\x82\xa3ref", "malformed msgpack"),
    "trailing bytes": (pack({"ref": 1, "what": "jobs"}) + b"\0", "malformed msgpack: unpack.*extra data"),
    "a list of 4 billion": (b"\xdd\xff\xff\xff\xff", "malformed msgpack"),
    "a map of 4 billion": (b"\xdf\xff\xff\xff\xff", "malformed msgpack"),
    "text of 4 GiB": (b"\x81\xa3ref\xdb\xff\xff\xff\xff", "malformed msgpack"),
    "bytes of 4 GiB": (b"\x81\xa3ref\xc6\xff\xff\xff\xff", "malformed msgpack"),
    "60,000 lists in one another": (b"\x91" * 60_000 + b"\x01", "malformed msgpack"),
    "bad UTF-8": (b"\x81\xa3ref\xa2\xc3\x28", "malformed msgpack: .*utf-8"),
    "a lone surrogate": (b"\x81\xa3ref\xa3\xed\xa0\x80", "malformed msgpack: .*utf-8"),
    "a key twice": (b"\x82\xa3ref\x01\xa3ref\x02", r"map key 'ref' twice"),
    "a key that is a number": (b"\x81\x01\x02", "malformed msgpack|map key 1; only text"),
    "a key that is bytes": (b"\x81\xc4\x03ref\x02", "map key b'ref'; only text is allowed"),
    "an extension type": (b"\x81\xa3ref" + msgpack.packb(msgpack.ExtType(42, b"x")), "extension type 42"),
    "a timestamp": (b"\x81\xa3ref" + msgpack.packb(msgpack.Timestamp(1)), "in a message; allowed are|extension"),
    "a list": (b"\x91\x01", "Ask: list where a map belongs"),
    "a number": (b"\x01", "Ask: int where a map belongs"),
    "nil": (b"\xc0", "Ask: NoneType where a map belongs"),
}
FIELDS: dict[str, tuple[type[Any], dict[str, Any], str]] = {
    "nothing of what it needs": (Ask, {}, "Ask: key 'ref' is missing"),
    "text for a number": (Ask, {"ref": "1", "what": "jobs"}, r"Ask\.ref: str where int belongs"),
    "a bool for a number": (Ask, {"ref": True, "what": "jobs"}, r"Ask\.ref: bool where int belongs"),
    "a float for a number": (Ask, {"ref": 1.0, "what": "jobs"}, r"Ask\.ref: float where int belongs"),
    "a negative number": (Ask, {"ref": -1, "what": "jobs"}, r"Ask\.ref: -1 is outside 0 to"),
    "a number of 64 bits": (Ask, {"ref": 2**64 - 1, "what": "jobs"}, r"Ask\.ref: 18446744073709551615 is outside"),
    "a long name": (Ask, {"ref": 1, "what": "x" * 257}, r"Ask\.what: 257 long; at most 256"),
    "a page of no rows": (Ask, {"ref": 1, "what": "jobs", "limit": 0}, r"Ask\.limit: 0 is outside 1 to 10000"),
    "a role that is none": (Hello, {"node": "n", "role": "admin", "boot": "b"}, "'admin'; one of 'executor'"),
    "an attempt of zero": (Accept, {"tasks": [{"task": "t", "attempt": 0}]}, r"attempt: 0 is outside 1"),
    "513 tasks": (Accept, {"tasks": [{"task": "t", "attempt": 1}] * 513}, "513 items; at most 512"),
    "a task that is a path": (
        Progress,
        {"task": "../../etc/passwd", "attempt": 1},
        r"'../../etc/passwd' is not of the",
    ),
    "a job that is a path": (Event, {"job": "../x", "kind": "k"}, r"Event\.job: '\.\./x' is not of the form"),
    "a site that is a path": (
        Event,
        {"job": "j", "kind": "k", "site": "a/b"},
        r"Event\.site: 'a/b' is not of the form",
    ),
    "a payload that is a path": (
        Get,
        {"stream": "", "payload": "/etc/shadow", "next": 0, "limit": 0},
        r"Get\.payload: '/etc/shadow' is not of the form",
    ),
    "a NUL in a payload's name": (
        Put,
        {"payload": {"id": "b3-\0x", "size": 1}},
        r"payload\.id: 'b3-\\x00x' is not of the form",
    ),
    "a payload of a type of its own": (
        Put,
        {"payload": {"id": "b3-x", "size": 1, "type": "pickle"}},
        "'pickle'; one of 'tensors', 'blob'",
    ),
    "a payload of -1 bytes": (Put, {"payload": {"id": "b3-x", "size": -1}}, "size: -1 is outside 0"),
    "a file outside of incoming": (
        Put,
        {"payload": {"id": "b3-x", "size": 1}, "local": "../journal.db"},
        r"Put\.local: '../journal\.db' is not of the form",
    ),
    "inline bytes without end": (
        Done,
        {"job": "j", "gather": "g", "items": [{"task": "t", "attempt": 1, "site": "s", "inline_bytes": 2**40}]},
        "inline_bytes: 1099511627776 is outside 0 to 32768",
    ),
    "a deadline of a century": (
        OpenGather,
        {"ref": 1, "job": "j", "claim": 1, "round": 0, "step": 0, "name": "t", "rule": {"deadline_s": 1e10}},
        "deadline_s: 10000000000.0 is outside",
    ),
    "an archive that is no reference": (
        SubmitJob,
        {"ref": 1, "token": "t", "name": "n", "archive": "b3-x"},
        "archive: str where a map belongs",
    ),
}


@pytest.mark.parametrize("name", MSGPACK)
def test_msgpack(ground: Any, wire: Callable[..., Any], name: str) -> None:
    body, words = MSGPACK[name]
    peer = wire()
    peer.body(Ask.KIND, body)
    assert not peer.refused("malformed", words).fatal
    peer.send(Ping())
    peer.take(Pong)


@pytest.mark.parametrize("name", FIELDS)
def test_fields(ground: Any, wire: Callable[..., Any], name: str) -> None:
    kind, fields, words = FIELDS[name]
    peer = wire()
    peer.body(kind.KIND, pack(fields))
    peer.refused("malformed", words)
    peer.send(Ping())
    peer.take(Pong)


@pytest.mark.parametrize(
    ("data", "words"),
    [(event(b"\x81\xa1x" + NAN), "nan in a message"), (event(b"\x81\xa1x" + INF), "inf in a message")]
    + [(event(nested(depth)), "nested more than 16 deep") for depth in (16, 500)],
    ids=["NaN", "Inf", "17 deep", "500 deep"],
)
def test_values_that_no_message_holds(ground: Any, wire: Callable[..., Any], data: bytes, words: str) -> None:
    peer = wire()
    peer.body(Event.KIND, data)
    peer.refused("malformed", words)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_struct_of_another_size(ground: Any, wire: Callable[..., Any], size: int) -> None:
    peer = wire().open_data()
    body = bytes(size)
    peer.data.send_multipart([_envelope(Chunk.KIND, body), body])
    peer.refused("malformed", f"Chunk of {size} bytes; it has exactly 32", data=True)


def test_a_struct_of_the_largest_numbers(ground: Any, wire: Callable[..., Any]) -> None:
    """No stream is so named: said once, and no index is ever used to reach into a file."""
    peer = wire().open_data()
    body = struct.pack(">16sQII", secrets.token_bytes(16), 2**64 - 1, 0, 2**32 - 1)
    peer.data.send_multipart([_envelope(Chunk.KIND, body), body])
    peer.put(Ping())
    peer.take_data(Pong)


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        (b"\xc1", "malformed msgpack"),
        (pack(["site-1"]), "the tail has no list 'sites'"),
        (pack({"sites": "site-1"}), "the tail has no list 'sites'"),
        (pack({"sites": [7]}), "sites: 7 is no name"),
        (pack({"sites": [""]}), "sites: '' is no name"),
        (pack({"sites": ["x" * 257]}), "is no name; 1 to 256 characters"),
        (pack({"sites": ["../../home"]}), "sites: '../../home' is no name; .* no '/'"),
        (pack({"sites": ["a\0b"]}), "is no name"),
        (pack({"sites": ["s"], "held": [["t", 0]]}), r"held: \['t', 0\] is no \[task, attempt\]"),
        (pack({"sites": ["s"], "held": [1]}), r"held: 1 is no \[task, attempt\]"),
        (pack({"sites": ["s"], "held": 5}), "held"),
        (pack([1]), "tail"),
    ],
    ids=[
        "no msgpack",
        "a list",
        "text",
        "number",
        "empty",
        "long",
        "path",
        "NUL",
        "attempt 0",
        "odd",
        "no list",
        "map",
    ],
)
def test_the_tail_of_hello(ground: Any, wire: Callable[..., Any], tail: bytes, words: str) -> None:
    """Sites become names of folders, and go on to job processes in fields that would refuse them."""
    peer = wire("executor", join=False)
    peer.send(peer.hello, tail)
    peer.refused("malformed", words)


def _envelope(kind: int, body: bytes) -> bytes:
    from fedloom.serialization.envelope import pack_envelope

    return pack_envelope(kind, 0, body)
