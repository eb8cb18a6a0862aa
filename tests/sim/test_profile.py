"""Where a run's time went: phases that add up, a trace that viewers open, and whole runs with and without."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fedloom.recipe.env import ProdEnv, SimEnv
from fedloom.recipe.overrides import Overrides, applied
from fedloom.recipe.simulate import SimOptions
from fedloom.serialization.errors import JobError
from fedloom.sim.launcher import SimConfig, SimResult, run_simulation
from fedloom.sim.profile.account import STEPS, account
from fedloom.sim.profile.cpu import CpuSeries, cpu_seconds
from fedloom.sim.profile.files import ProcessSpans, Recording, Span
from fedloom.sim.profile.phases import HAND_OVER, WAIT, Segment, segments_of, totals
from fedloom.sim.profile.table import cpu_of, summary_of, table_text
from fedloom.sim.profile.trace import Trace, trace_lines, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st

MakeJob = Callable[..., Path]


# ---------------------------------------------------------------- phases


def test_of_spans_in_one_another_the_innermost_counts() -> None:
    spans = [Span("commit", 0, 10), Span("encode", 2, 4), Span("put", 4, 7), Span("queue", 0, 10)]
    assert segments_of(spans) == [
        Segment(0, 2, "commit"),
        Segment(2, 4, "serialize"),
        Segment(4, 7, "transfer"),
        Segment(7, 10, "commit"),
    ]


def test_of_lanes_side_by_side_the_first_phase_counts() -> None:
    spans = [Span("upload", 0, 6, lane="io"), Span("fold", 2, 4, lane="fold"), Span("upload", 5, 8, lane="io-2")]
    assert segments_of(spans) == [Segment(0, 2, "transfer"), Segment(2, 4, "fold"), Segment(4, 8, "transfer")]
    assert totals(segments_of(spans), 1, 10, WAIT) == {"transfer": 5, "fold": 2, WAIT: 2}


names = st.sampled_from(["train", "after send", "decode", "encode", "write", "fold", "commit", "wait", "queue"])
times = st.integers(0, 200).map(float)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(names, times, times, st.sampled_from("abc")), max_size=30), times, times)
def test_phases_add_up_to_the_wall_time_whatever_overlaps(
    drawn: list[tuple[str, float, float, str]], one: float, other: float
) -> None:
    spans = [Span(name, min(a, b), max(a, b), lane=lane) for name, a, b, lane in drawn]
    start, end = min(one, other), max(one, other)
    segments = segments_of(spans)
    assert all(a.end <= b.start for a, b in pairwise(segments))
    found = totals(segments, start, end, "rest")
    assert sum(found.values()) == end - start
    assert all(seconds > 0 for seconds in found.values())
    # at every instant someone is busy, or nobody is
    busy = {t for s in spans if s.name != "queue" for t in range(int(s.start), int(s.end)) if start <= t < end}
    assert sum(seconds for phase, seconds in found.items() if phase != "rest") == len(busy)


# ---------------------------------------------------------------- a run, by hand


def two_rounds() -> Recording:
    """Two sites that take turns in one slot, two rounds; milliseconds. The second script works on behind its send."""
    agent = ProcessSpans("agent", 20)
    hosts = {site: ProcessSpans(site, 30 + number) for number, site in enumerate(("site-1", "site-2"))}
    job = ProcessSpans("job", 40)
    for number, at in enumerate((1000.0, 1100.0)):
        job.spans += [
            Span("open", at, at + 2, number),
            Span("wait", at + 2, at + 42, number),
            Span("wait", at + 45, at + 82, number),
            Span("finish", at + 85, at + 88),
            Span("encode", at + 88, at + 90),
            Span("commit", at + 90, at + 95, number),
        ]
        for k, (site, host) in enumerate(hosts.items()):
            task, begin = f"t{number}{k}", at + 5 + 40 * k
            agent.spans += [
                Span("queue", at + 4, begin, number, site, task),
                Span("slot", begin, begin + 30, number, site, task, "slot-1"),
                Span("store", begin + 30, begin + 35, -1, site, task),
            ]
            host.spans += [
                Span("decode", begin + 1, begin + 2, number, site, task),
                Span("train", begin + 2, begin + 22, number, site, task),
                Span("encode", begin + 22, begin + 25, number, site, task),
                Span("write", begin + 25, begin + 29, number, site, task),
                Span("after send", begin + 30, begin + 31 + 50 * k, number, site, task),
            ]
            job.spans.append(Span("fold", begin + 37, begin + 40, number, site, task))
    processes = (agent, *hosts.values(), job)
    for process in processes:
        process.spans = [span._replace(lane=span.lane or "MainThread") for span in process.spans]
    return Recording(processes)


def scaled(recording: Recording) -> Recording:
    """In seconds."""
    for process in recording.processes:
        process.spans = [span._replace(start=span.start / 1000, end=span.end / 1000) for span in process.spans]
    return recording


def test_the_account_of_two_rounds() -> None:
    made = account(two_rounds())
    assert [(w.round, w.start, w.end) for w in made.windows] == [(0, 1000, 1100), (1, 1100, 1195)]
    # asked at 4, worked until 75, heard of at 82, folded until 88, durable at 95
    assert made.windows[0].steps == dict(zip(STEPS, (4, 71, 7, 6, 7, 5), strict=True))
    rows = {(row.worker, row.round): row for row in made.rows}
    assert list(dict.fromkeys(row.worker for row in made.rows)) == ["slot-1", "agent", "job"]
    slot = rows["slot-1", 0].phases
    # what a script does behind its send is not the slot's, which another site has by then
    assert slot == {"train": 40, "serialize": 8, "transfer": 8, HAND_OVER: 4, WAIT: 40}
    assert rows["job", 0].phases == {"transfer": 2, WAIT: 77, "fold": 9, "serialize": 2, "commit": 5, "other": 5}
    for row in made.rows:
        assert sum(row.phases.values()) == pytest.approx(row.wall_s)
        assert min(row.phases.values()) > 0
    one = made.sites["site-2"]
    assert one.train_s == {0: 71, 1: 71}  # of all, its own
    assert (one.tasks, one.queue_s, one.store_s, one.serialize_s, one.transfer_s) == (2, 82, 10, 8, 8)


def test_several_tasks_at_hand_of_one_worker() -> None:
    """A worker is given three tasks at once and answers them together: each millisecond counts once."""
    agent = ProcessSpans("agent", 20)
    worker = ProcessSpans("worker-1", 30, [Span("start", 0, 3), Span("partial", 40, 45)])
    for k in range(3):
        site, task, at = f"site-{k}", f"t{k}", 10.0 + 10 * k
        agent.spans.append(Span("slot", 5, 50, 0, site, task, "slot-1"))
        worker.spans += [Span("train", at, at + 8, 0, site, task), Span("fold", at + 8, at + 9, 0, site, task)]
    job = ProcessSpans("job", 40, [Span("open", 0, 1, 0), Span("commit", 59, 60, 0)])
    made = account(Recording((agent, worker, job)))
    [slot] = [row.phases for row in made.rows if row.worker == "slot-1"]
    assert slot == {"start": 3, WAIT: 12, "train": 24, "fold": 8, HAND_OVER: 13}


def test_a_job_that_was_never_seen_is_no_error() -> None:
    recording = Recording((ProcessSpans("site-1", 30, [Span("start", 1, 2)]),))
    made = account(recording)
    assert (made.windows, made.rows) == ((), ())
    assert "no round was seen" in table_text(summary_of(made, recording, {}), whole=True)


# ---------------------------------------------------------------- the files


def check_trace(trace: Trace) -> list[dict[str, Any]]:
    """What the trace event format demands, and what viewers need beside."""
    events: list[dict[str, Any]] = json.loads("".join(trace_lines(trace)))["traceEvents"]
    assert events == list(trace.events)
    named: dict[str, set[Any]] = defaultdict(set)
    last: dict[Any, float] = {}
    open_: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    pairs: dict[Any, list[str]] = defaultdict(list)
    for event in events:
        assert {"name", "ph", "pid", "tid", "ts", "args"} <= event.keys()
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and isinstance(event["name"], str)
        lane = (event["pid"], event["tid"])
        if event["ph"] == "M":
            assert not last, "names come first"
            named[event["name"]].add(event["pid"] if event["name"] == "process_name" else lane)
            assert isinstance(event["args"]["name"], str) and event["args"]["name"]
            continue
        assert event["cat"] and event["ts"] >= max(0, last.get(lane, 0))
        last[lane] = event["ts"]
        assert event["pid"] in named["process_name"]
        match event["ph"]:
            case "X":
                assert event["dur"] >= 0 and lane in named["thread_name"]
                inside = open_[lane]
                end = event["ts"] + event["dur"]
                while inside and inside[-1][1] <= event["ts"] + 1e-6:
                    inside.pop()
                assert not inside or end <= inside[-1][1] + 1e-6, "events of a lane lie in one another, or apart"
                inside.append((event["ts"], end))
            case "b" | "e":
                pairs[event["pid"], event["cat"], event["id"]].append(event["ph"])
            case "C":
                assert all(isinstance(value, int | float) for value in event["args"].values())
            case other:
                raise AssertionError(f"ph {other!r}")
    assert all("".join(found) == "be" * (len(found) // 2) for found in pairs.values())
    return events


def test_the_trace_of_two_rounds() -> None:
    recording = scaled(two_rounds())
    series = {20: CpuSeries("agent", [1.0, 1.1, 1.2], [0.5, 0.55, 0.55]), 7: CpuSeries("broker", [1.0, 1.2], [0, 0.02])}
    events = check_trace(trace_of(recording, account(recording).windows, series, launcher=7000))
    found = [(e["pid"], e["ts"], e["dur"]) for e in events if e["name"] == "train"]
    assert found == [(30, 7000.0, 20000.0), (31, 47000.0, 20000.0), (30, 107000.0, 20000.0), (31, 147000.0, 20000.0)]
    assert [e["args"]["cores"] for e in events if e["ph"] == "C" and e["pid"] == 20] == [0.5, 0.0]
    assert [e["name"] for e in events if e["pid"] == 7000 and e["ph"] == "X"][:3] == ["round 1", "ask", "work"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {7: "broker", 20: "agent", 30: "site-1", 31: "site-2", 40: "job", 7000: "rounds"}


def test_a_trace_keeps_to_its_bound_and_leaves_out_the_shortest() -> None:
    trace = trace_of(scaled(two_rounds()), max_events=6)
    kept = [event for event in check_trace(trace) if event["ph"] != "M"]
    assert trace.left_out == two_rounds().count - 6
    # the longest: a wait in the queue (two events), what is done behind a send, and the job's waiting
    assert {event["name"] for event in kept} == {"queue", "after send", "wait"}


def test_tables_say_milliseconds_and_shares() -> None:
    recording = scaled(two_rounds())
    series = {20: CpuSeries("agent", [1.0, 1.2], [0.5, 0.7]), 40: CpuSeries("", [1.0, 1.2], [0, 0.1])}
    summary = summary_of(account(recording), recording, cpu_of(recording, series), left_out=3)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["slots"]["shares"] == {
        "train": 0.4103,
        "serialize": 0.0821,
        "transfer": 0.0821,
        HAND_OVER: 0.041,
        WAIT: 0.3846,
    }
    assert summary["rounds"][0]["cpu_s"] == {"agent": 0.1, "job": 0.05}
    assert summary["sites"]["site-1"]["train_s"] == {"0": 0.021, "1": 0.021}
    assert summary["total"]["wall_s"] == pytest.approx(3 * 0.195)
    assert {
        "process": "sites",
        "name": "train",
        "count": 4,
        "seconds": 0.08,
        "median_s": 0.02,
        "p90_s": 0.02,
    } in summary["kinds"]
    text = table_text(summary, whole=True)
    assert "  1      100.0  4.00  71.0    7.00    6.00    7.00     5.00\n" in text
    assert "  slot-1  97.5  40.0  41%" in text
    assert "  site-2      2   71.0" in text
    assert "3 of the shortest spans are not in trace.json" in text
    assert len(table_text(summary, whole=False)) < len(text)


def test_cpu_is_read_and_put_in_a_straight_line() -> None:
    used = cpu_seconds(os.getpid())
    assert used is not None and used > 0
    assert cpu_seconds(2**22 + 1) is None
    series = CpuSeries("x")
    for at, seconds in ((10.0, 1.0), (11.0, 2.0), (13.0, 2.0), (14.0, 1.5)):  # another process of that number
        series.add(at, seconds)
    assert series.between(9.0, 10.5) == pytest.approx(0.5)
    assert series.between(10.5, 20.0) == pytest.approx(0.5)
    assert list(series.shares()) == [(10.0, 1.0), (11.0, 0.0), (13.0, 0.0)]
    series.thin()
    assert series.at == [10.0, 13.0]


# ---------------------------------------------------------------- options


def test_wrong_use_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"profile='yes'; True or False: the files go to profile/"):
        SimEnv(profile="yes")  # pyright: ignore[reportArgumentType]
    with pytest.raises(JobError, match=r"extra: unknown 'profile'"):
        _deploy(SimEnv(2, workspace_root=tmp_path / "ws", extra={"profile": True}))
    with applied(Overrides(profile=True)), pytest.raises(JobError, match="--profile is for simulations"):
        _deploy(ProdEnv("tcp://127.0.0.1:9"))


def _deploy(env: Any) -> None:
    from fedloom.recipe import NumpyFedAvgRecipe

    NumpyFedAvgRecipe(name="x", model=[1.0], min_clients=2, train_script=__file__).execute(env)


def test_a_command_line_turns_it_on_and_never_off() -> None:
    assert SimOptions(profile=True).overridden(Overrides()).profile
    assert SimOptions().overridden(Overrides(profile=True)).profile
    assert not SimOptions().overridden(Overrides()).profile


# ---------------------------------------------------------------- whole runs

FUNCTION = """
import numpy as np
from fedloom.executor import FLModel

def train(model, ctx):
    number = int(ctx.site.rpartition("-")[2])
    params = {name: value * 0.7 + number * 0.3 for name, value in model.params.items()}
    return FLModel(params=params, metrics={"accuracy": number / 10}, meta={"NUM_STEPS_CURRENT_ROUND": number})
"""


def run(job: Path, place: Path, sites: int, **more: Any) -> SimResult:
    names = [f"site-{number + 1}" for number in range(sites)]
    return run_simulation(SimConfig(job, place, sites=names, threads=2, show_progress=False, timeout_s=90.0, **more))


@pytest.mark.process
@pytest.mark.parametrize(("kind", "count"), [("script", 3), ("function", 3), ("command", 2)])
def test_a_run_with_a_profile(make_job: MakeJob, tmp_path: Path, kind: str, count: int) -> None:
    if kind == "function":
        job = make_job(FUNCTION, rounds=2, min_clients=count)
        _use_function(job)
    else:
        job = make_job(rounds=2, min_clients=count, executor={"launch_external_process": kind == "command"})
    result = run(job, tmp_path / "with", count, profile=True)
    assert result.completed
    folder = result.result_dir / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["summary.json", "table.txt", "trace.json"]
    summary = json.loads((folder / "summary.json").read_text())
    assert [entry["round"] for entry in summary["rounds"]] == [0, 1]
    sites = [f"site-{number + 1}" for number in range(count)]
    assert list(summary["sites"]) == sites
    for entry in summary["sites"].values():
        assert entry["tasks"] == 2
        assert list(entry["train_s"]) == ["0", "1"]
        assert min(*entry["train_s"].values(), entry["serialize_s"], entry["queue_s"], entry["store_s"]) > 0
    slots = {"slot-1", "slot-2"}
    for entry in summary["rounds"]:
        assert entry["workers"].keys() == slots | {"agent", "job"}
        for phases in entry["workers"].values():
            assert sum(phases.values()) == pytest.approx(entry["wall_s"], abs=1e-4)
        assert sum(entry["steps"].values()) == pytest.approx(entry["wall_s"], abs=1e-4)
        assert {"train", "serialize", HAND_OVER} <= set().union(*(entry["workers"][slot] for slot in slots))
        assert {"fold", "commit", WAIT} <= entry["workers"]["job"].keys()
        assert entry["cpu_s"]["broker"] > 0 and entry["cpu_s"]["agent"] > 0
    assert summary["dropped"] == summary["skipped_files"] == 0
    trace = json.loads((folder / "trace.json").read_text())
    events = check_trace(Trace(tuple(trace["traceEvents"])))
    trained = {(e["args"]["site"], e["args"]["round"]) for e in events if e["name"] == "train"}
    assert trained == {(site, number) for site in sites for number in (0, 1)}
    text = (folder / "table.txt").read_text()
    assert all(word in text for word in ("rounds, ms", "workers, ms", "CPU time", *sites))
    if kind == "script":
        plain = run(job, tmp_path / "without", count)
        assert not (plain.result_dir / "profile").exists()
        model = "model.safetensors"
        assert (plain.result_dir / model).read_bytes() == (result.result_dir / model).read_bytes()


def _use_function(job: Path) -> None:
    for config in job.rglob("config_fed_client.json"):
        text = json.loads(config.read_text())
        for executor in text["executors"]:
            executor["executor"]["path"] = "fedloom.executor.script.FunctionExecutor"
            executor["executor"]["args"]["function"] = "train"
        config.write_text(json.dumps(text))


CLEARS_UP = """
import os, shutil
shutil.rmtree(os.environ["FEDLOOM_SPANS"], ignore_errors=True)
import fedloom.client as flare

flare.init()
while flare.is_running():
    flare.send(flare.FLModel(params=flare.receive().params))
"""


@pytest.mark.process
def test_a_fault_of_the_profile_does_not_hurt_the_run(make_job: MakeJob, tmp_path: Path) -> None:
    """The folder of the spans goes away while the run goes on."""
    result = run(make_job(CLEARS_UP, rounds=2, min_clients=2), tmp_path / "ws", 2, profile=True)
    assert result.completed and len(result.rounds) == 2
    assert not (result.result_dir / "profile").exists()
    assert "profile_ends_here" in (result.result_dir / "logs" / "site-1.log").read_text()
