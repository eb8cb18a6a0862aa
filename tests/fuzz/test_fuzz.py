"""The short form of the fuzzing: corpus and regressions again, and a bounded number of seeded mutations a target.

The long form is `make fuzz`, which needs atheris. A crasher of it that was fixed becomes a file in
`regressions/TARGET/`, named for what it is.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from fedloom.serialization.errors import CodecError, FedloomError
from fuzzing.mutate import mutate
from fuzzing.table import TARGETS
from fuzzing.target import Target, TooMuchMemory
from fuzzing.wire import join_frames, split_frames
from siblings import load

HERE = Path(__file__).resolve().parent
REGRESSIONS = HERE / "regressions"
#: Mutations a target, by what one takes: about a second each in all.
TRIES = {
    "envelope": 12_000,
    "codec": 12_000,
    "header": 8_000,
    "payload": 6_000,
    "stream": 3_000,
    "partial": 600,
    "job_folder": 1_500,
    "archive": 900,
}
#: One in so many has its allocations counted, which takes several times as long.
WATCH_EVERY = 16


def try_all(target: Target, tries: int, seed: int) -> int:
    """Run mutations of the target's seeds; how many it accepted. An escape shows its input."""
    rng = random.Random(f"{target.name} {seed}")
    seeds = list(target.seeds())
    accepted = 0
    for number in range(tries):
        data = mutate(rng, seeds, target.words, target.max_len)
        try:
            accepted += (target if number % WATCH_EVERY else target.watched)(data)
        except Exception as error:
            raise AssertionError(f"{target.name}: mutation {number} escaped: {error!r} of {data!r}") from error
    return accepted


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_valid_and_hold(name: str) -> None:
    """Every seed runs within its memory, and most are accepted, or mutations would never get past the first check."""
    target = TARGETS[name]
    seeds = list(target.seeds())
    assert all(len(seed) <= target.max_len for seed in seeds)
    accepted = sum([target.watched(seed) for seed in seeds])
    assert accepted >= 0.4 * len(seeds)
    assert list(target.seeds()) == seeds


@pytest.mark.parametrize("name", TARGETS)
def test_seeded_mutations_do_not_escape(name: str) -> None:
    target = TARGETS[name]
    accepted = try_all(target, TRIES[name], seed=3)
    if target.allowed:
        assert 0 < accepted < TRIES[name]  # both ways are taken


@pytest.mark.parametrize("path", sorted(REGRESSIONS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_regressions_stay_fixed(path: Path) -> None:
    """What escaped once is refused, or accepted as the target's promises want it."""
    TARGETS[path.parent.name].watched(path.read_bytes())


def test_every_target_allows_only_the_projects_errors() -> None:
    for target in TARGETS.values():
        assert all(issubclass(error, FedloomError) and error is not FedloomError for error in target.allowed)
    assert {path.parent.name for path in REGRESSIONS.glob("*/*")} <= TARGETS.keys()


def test_an_escape_is_seen() -> None:
    """The short form can fail: an error of another class, a promise that is broken, an input that takes memory."""

    def planted(data: bytes) -> None:
        if data[:1] == b"!":
            raise KeyError("planted")
        if len(data) > 20:
            raise CodecError("allowed")

    def hungry_one(data: bytes) -> None:
        data.ljust(4_000_000)

    found = Target("planted", planted, (CodecError,), lambda: [b"!bad" + bytes(20), b"good"])
    with pytest.raises(AssertionError, match=r"mutation \d+ escaped: KeyError\('planted'\)"):
        try_all(found, 50, seed=0)
    hungry = Target("hungry", hungry_one, (), lambda: [b"x"])
    with pytest.raises(TooMuchMemory, match="an input of 1 bytes took 4"):
        hungry.watched(b"x")


def test_frames_are_split_as_they_were_joined() -> None:
    for frames in ([], [b""], [b"ab", b"", b"c" * 300]):
        assert split_frames(join_frames(frames)) == frames


# ---------------------------------------------------------------- the runner, without atheris


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    return load(__file__, "run")


def test_the_runner_knows_every_target(runner: ModuleType) -> None:
    assert list(TARGETS) == list(runner.NAMES)


def test_the_runner_fails_for_an_escape_and_for_nothing_done(runner: ModuleType) -> None:
    good = runner.Outcome("codec", 60.0, 1000, 50, 200, 900, 80, (), 0)
    assert not good.bad
    assert replace(good, escapes=("crash-1",), code=77).bad
    assert replace(good, executions=0).bad
    assert replace(good, code=1).bad  # it died without an input to show
    lines = runner.table([good, replace(good, code=1)]).splitlines()
    assert lines[0].split()[:3] == ["target", "seconds", "executions"]
    assert lines[1].split() == ["codec", "60", "1,000", "17", "50", "200", "900", "80", "0"]
    assert lines[2].endswith("exit 1")


def test_the_runner_reads_libfuzzers_report(runner: ModuleType) -> None:
    log = "#100\tNEW    cov: 12 ft: 30 corp: 4/1Kb rss: 70Mb\n#250\tDONE   cov: 13 ft: 31 corp: 5/1Kb rss: 71Mb\n"
    assert runner.last(log, r"\bcov: (\d+)") == 13
    assert runner.last(log, r"^#(\d+)\t") == 250
    assert runner.last("", r"\bcov: (\d+)") == 0
