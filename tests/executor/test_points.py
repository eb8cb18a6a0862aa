"""Points on their way out: the sender in user code's process, the flow of an executor."""

from __future__ import annotations

import queue
import threading
import time

import numpy as np
import pytest
from fedloom.executor.pointflow import MAX_WAITING_BYTES, PointFlow, PointFlows
from fedloom.executor.points import BATCH_BYTES, PointSender, make_point
from fedloom.recipe.points import PointReader
from fedloom.serialization.codec import check_plain, pack
from fedloom.serialization.errors import CodecError, LinkError


def numbered(count, start=0):
    return [{"key": "loss", "value": float(n), "type": "SCALAR", "at": 0.0} for n in range(start, start + count)]


def read(reader, events):
    return [
        point["value"] for site, data in events for point in reader.read({"kind": "metric", "site": site, "data": data})
    ]


# ---------------------------------------------------------------- a point


def test_a_point_holds_plain_finite_data():
    point = make_point("loss", np.float32(0.5), "SCALAR", 3, {"global_step": np.int64(7), "phase": "warm"})
    at = point.pop("at")
    assert abs(at - time.time()) < 60
    assert point == {"key": "loss", "value": 0.5, "type": "SCALAR", "global_step": 7, "round": 3, "phase": "warm"}
    values = {"a": float("nan"), "b": np.float64("inf"), "c": -np.inf, "d": True}
    point = make_point("m", values, "METRICS", None, {"walltime": 12.5})
    assert point["value"] == {"a": "nan", "b": "inf", "c": "-inf", "d": True}
    assert point["at"] == 12.5 and "round" not in point
    check_plain(point)
    for bad in (object(), np.zeros(2), {"x": [object()]}, "x" * 17_000):
        with pytest.raises(CodecError):
            make_point("bad", bad, "SCALAR", None, {})


def test_a_torch_number_is_a_number():
    torch = pytest.importorskip("torch")
    assert make_point("l", torch.tensor(0.25, requires_grad=True), "SCALAR", None, {})["value"] == 0.25


# ---------------------------------------------------------------- the sender


def test_the_first_point_leaves_at_once_and_the_others_together():
    sent: queue.Queue = queue.Queue()
    sender = PointSender(sent.put, pause_s=0.2)
    started = time.monotonic()
    for point in numbered(100):
        sender.add(point)
    assert [point["value"] for point in sent.get_nowait()] == [0.0]
    rest = sent.get(timeout=10)  # by itself, though nobody logs or flushes
    assert time.monotonic() - started >= 0.2
    assert [point["value"] for point in rest] == [float(n) for n in range(1, 100)]
    sender.add(numbered(1)[0])
    sender.close()
    assert len(sent.get_nowait()) == 1 and sent.empty()
    assert not [thread for thread in threading.enumerate() if thread.name == "fedloom-points"]


def test_a_batch_has_a_size_and_flush_does_not_wait():
    sent = []
    sender = PointSender(sent.append, pause_s=3600.0)
    for point in numbered(2000):
        sender.add(point)
    assert len(sent) > 2
    assert all(len(pack(points)) <= BATCH_BYTES + 16 for points in sent)
    sender.flush()
    assert [point["value"] for points in sent for point in points] == [float(n) for n in range(2000)]
    sender.close()


def test_an_agent_that_is_gone_ends_the_senders_thread_and_is_told_to_who_logs():
    def gone(points):
        raise LinkError("gone")

    sender = PointSender(gone, pause_s=0.01)
    with pytest.raises(LinkError):
        sender.add(numbered(1)[0])
    sender.add(numbered(1)[0])
    assert sender._thread is not None
    sender._thread.join(10)
    assert not sender._thread.is_alive()


# ---------------------------------------------------------------- the flow


def test_all_sites_share_an_event_and_the_reader_gets_each_point_once_in_order():
    flow, reader = PointFlow(), PointReader()
    flow.add("a", numbered(3))
    flow.add("b", numbered(2))
    flow.add("a", numbered(2, start=3))
    assert flow.due_s(0.0) == 0.0  # the first leaves at once
    ((site, data),) = flow.take(0.0)
    assert site == "" and data["first"] == 0 and data["count"] == 7
    points = reader.read({"kind": "metric", "site": site, "data": data})
    assert [p["value"] for p in points if p["site"] == "a"] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [p["step"] for p in points if p["site"] == "b"] == [0, 1]
    assert flow.take(0.0) == [] and flow.due_s(0.1) == float("inf")
    assert read(reader, flow.again()) == [] and (reader.count, reader.lost) == (7, 0)


def test_events_have_a_size_whatever_is_logged():
    flow, reader = PointFlow(), PointReader()
    for number in range(300):
        flow.add(f"site-with-a-long-name-{number:0100}", numbered(10))
    flow.add("text", [{"key": "t", "value": "x" * 15_000, "type": "TEXT", "at": 0.0}] * 3)
    events = flow.take(0.0)
    assert all(len(pack(data)) < 30 * 1024 for _, data in events) and len(events) > 5
    assert len(read(reader, events)) == 3003 and reader.lost == 0


def test_the_pause_grows_and_a_result_does_not_wait_for_it():
    flow, now, taken = PointFlow(), 0.0, 0
    while now < 3600.0:
        flow.add("a", numbered(1))
        taken += len(flow.take(now))
        now += 0.25
    assert 300 < taken < 500
    flow.take(now, everything=True)
    flow.add("a", numbered(1))
    assert 15.0 < flow.due_s(now) < 25.0
    flow.hurry()
    assert flow.due_s(now) == 0.0 and len(flow.take(now)) == 1


def test_what_waits_for_a_broker_is_bounded_and_the_reader_knows_what_is_missing():
    flow, reader = PointFlow(), PointReader()
    assert len(read(reader, _taken(flow, numbered(10)))) == 10
    text = {"key": "t", "value": "x" * 10_000, "type": "TEXT", "at": 0.0}
    count = 2 * MAX_WAITING_BYTES // 10_000
    for _ in range(count):
        flow.add("a", [text])
    assert flow._bytes <= MAX_WAITING_BYTES
    got = len(read(reader, flow.take(100.0)))
    assert 0 < got < count and reader.lost == count - got and reader.count == 10 + got


def _taken(flow, points):
    flow.add("a", points)
    return flow.take(0.0, everything=True)


def test_an_event_that_was_lost_shows_and_one_that_is_repeated_does_not():
    flow, reader = PointFlow(), PointReader()
    events = [event for n in range(4) for event in _taken(flow, numbered(5, start=5 * n))]
    assert len(read(reader, [events[0], events[2], events[2], events[1], events[3]])) == 15
    assert reader.lost == 5
    assert PointReader().read({"kind": "metric", "data": {"sites": {"a": [7, ["x", {}], None]}, "count": "no"}}) == []


def test_flows_hold_back_while_the_link_is_down_and_go_with_their_job():
    told = []
    flows = PointFlows(lambda job, site, data: told.append((job, data["count"])))
    flows.add("j", "a", numbered(2))
    flows.turn(1.0, up=False)
    assert told == [] and flows.next_due_s(1.0) == float("inf")
    flows.again()  # the link is back: nothing was told yet
    flows.turn(2.0, up=True)
    assert told == [("j", 2)]
    flows.add("j", "a", numbered(1))
    flows.again()
    assert told == [("j", 2)] * 2 and 0 < flows.next_due_s(2.0) <= 0.5
    flows.turn(2.0, up=True, ended={"j"})
    assert told[2:] == [("j", 1)] and flows.jobs == []
