"""What leaves of a site's log: bounded pieces, in order, and no more than allowed."""

from __future__ import annotations

import pytest
from fedloom.executor import sitelogs
from fedloom.executor.sitelogs import PIECE_BYTES, SiteLogs
from fedloom.serialization.messages import Cancel, Event


class Watcher:
    def __init__(self) -> None:
        self.told: list[tuple[str, str, str]] = []
        self.up = True

    def __call__(self, job: str, site: str, text: str) -> bool:
        if self.up:
            self.told.append((job, site, text))
        return self.up

    def text(self, site: str = "site-1") -> str:
        return "".join(text for _, name, text in self.told if name == site)


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


def test_whole_lines_leave_as_they_come(watcher, tmp_path):
    path = tmp_path / "site-1.log"
    path.write_text("of another life\n")
    logs = SiteLogs(watcher, 10_000)
    logs.watch("job", "site-1", str(path), 0.0)
    with path.open("a") as file:
        file.write("one\ntwo\nthr")
    logs.turn(2.0)
    assert watcher.told == [("job", "site-1", "one\ntwo\n")]
    with path.open("a") as file:
        file.write("ee\nfour")
    logs.turn(4.0)
    assert watcher.text() == "one\ntwo\nthree\n"
    logs.flush("job", 4.1, closed=True)
    logs.turn(4.1)
    assert watcher.text() == "one\ntwo\nthree\nfour" and len(logs) == 0


def test_nothing_is_lost_while_the_link_is_down(watcher, tmp_path):
    path = tmp_path / "site-1.log"
    logs = SiteLogs(watcher, 10_000)
    logs.watch("job", "site-1", str(path), 0.0)
    path.write_text("one\n")
    watcher.up = False
    logs.flush("job", 2.0, closed=True)
    logs.turn(2.0)
    assert not watcher.told and len(logs) == 1
    watcher.up = True
    logs.turn(4.0)
    assert watcher.text() == "one\n" and len(logs) == 0


def test_pieces_are_small_and_cut_between_characters(watcher, tmp_path):
    path = tmp_path / "site-1.log"
    logs = SiteLogs(watcher, 100_000)
    logs.watch("job", "site-1", str(path), 0.0)
    path.write_text("x" + "\u20ac" * 10_000 + "\nlast \U0001f600\n", "utf-8")
    logs.turn(2.0)
    assert watcher.text() == path.read_text("utf-8") and len(watcher.told) == 4
    assert all(len(text.encode()) <= PIECE_BYTES for _, _, text in watcher.told)


def test_what_is_too_much_stays_and_the_log_says_so(watcher, tmp_path):
    path = tmp_path / "site-1.log"
    logs = SiteLogs(watcher, 20_000)
    logs.watch("job", "site-1", str(path), 0.0)
    path.write_text("0123456789abcde\n" * 5000)
    for second in range(1, 20):
        logs.turn(float(second))
    text = watcher.text()
    assert text.startswith("0123456789abcde\n" * 1250) and len(text) < 20_200
    assert text.endswith("[the rest of this log stays at site-1: it is longer than what is sent of one]\n")
    logs.flush("job", 30.0, closed=True)
    logs.turn(30.0)
    assert watcher.text() == text and len(logs) == 0


def test_many_logs_share_a_rate_and_a_steady_one_sends_ever_fewer_pieces(watcher, tmp_path):
    logs = SiteLogs(watcher, 10_000_000)
    paths = [tmp_path / f"site-{i}.log" for i in range(1, 301)]
    for i, path in enumerate(paths, 1):
        logs.watch("job", f"site-{i}", str(path), 0.0)
        path.write_text(f"hello {i}\n")
    logs.turn(2.0)
    assert len(watcher.told) == sitelogs._BURST
    for second in range(3, 9):
        logs.turn(float(second))
    assert len(watcher.told) == 300 and len({site for _, site, _ in watcher.told}) == 300
    watcher.told.clear()
    for second in range(10, 610):
        with paths[0].open("a") as file:
            file.write(f"step {second}\n")
        logs.turn(float(second))
    steady = [text for _, site, text in watcher.told if site == "site-1"]
    assert 80 < len(steady) < 250 and "".join(steady).startswith("step 10\nstep 11\n")


def test_a_log_that_grows_for_ever_is_cut_while_it_is_written_to(watcher, tmp_path):
    path = tmp_path / "site-1.log"
    logs = SiteLogs(None, 0, max_bytes=1000)
    logs.watch("job", "site-1", str(path), 0.0)
    with path.open("ab") as file:  # as a host holds it
        for second in range(0, 400, 40):
            file.write(b"0123456789\n" * 100)
            file.flush()
            logs.turn(float(second))
    assert path.stat().st_size <= 1100 and (tmp_path / "site-1.log.1").stat().st_size <= 1000
    assert not watcher.told


@pytest.mark.process
@pytest.mark.timeout(60)
@pytest.mark.parametrize("share", [True, False])
def test_what_a_script_prints_is_sent_before_the_job_is_forgotten(broker, make_agent, make_job, weights, share):
    script = """
import fedloom.client as flare
flare.init()
while flare.is_running():
    model = flare.receive()
    print("training", model.current_round)
    flare.send(flare.FLModel(params=model.params))
print("the end")
"""
    agent = make_agent(share_logs=share)
    broker.assign(("a", "site-1"), model=weights(1.0), archive=make_job({"client.py": script}))
    broker.done("a")
    broker.say(Cancel("job-1", ended=True))
    if share:
        broker.wait(lambda m, _: isinstance(m, Event) and m.kind == "log" and "the end" in m.text)
        said = [m for m, _ in broker.messages if isinstance(m, Event)]
        assert "".join(m.text for m in said) == "training 0\nthe end\n"
        assert {(m.job, m.site, m.kind) for m in said} == {("job-1", "site-1", "log")}
    agent.stop()
    assert share or not [m for m, _ in broker.messages if isinstance(m, Event)]
