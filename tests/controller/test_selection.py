"""Which model is the best, and when training stops: options and scores, without a broker."""

from __future__ import annotations

from typing import Any

import pytest
from fedloom.controller.workflows.selection import Scores, Selection, StopCondition
from fedloom.serialization.errors import JobError


def selection(key: str = "accuracy", mode: Any = None, stop: Any = None, patience: Any = None) -> Selection:
    return Selection.of(key, mode, stop, patience)


@pytest.mark.parametrize(
    ("text", "score", "met"),
    [
        ("accuracy >= 80", 80, True),
        ("accuracy >= 80", 79.9, False),
        ("accuracy > 80", 80, False),
        ("loss <= 1e-3", 0.001, True),
        ("loss < .5", 0.5, False),
        ("val/f1 = 1", 1.0, True),
        ("accuracy >= 80", None, False),
    ],
)
def test_conditions(text: str, score: float | None, met: bool) -> None:
    assert StopCondition.parse(text).met(score) is met


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("accuracy>=80", "'METRIC OP NUMBER' with spaces between"),
        ("accuracy >= 80 %", "'METRIC OP NUMBER' with spaces between"),
        ("", "'METRIC OP NUMBER'"),
        (80, "'METRIC OP NUMBER'"),
        ("accuracy => 80", "operator '=>'; one of >=, <=, >, <, ="),
        ("accuracy == 80", "operator '=='"),
        ("accuracy >= high", "'high' is not a finite number"),
        ("accuracy >= nan", "'nan' is not a finite number"),
    ],
)
def test_conditions_of_another_shape(text: Any, said: str) -> None:
    with pytest.raises(JobError) as caught:
        StopCondition.parse(text)
    assert said in str(caught.value)
    assert repr(text) in str(caught.value)


def test_the_direction_comes_from_the_condition_on_the_key_metric_alone() -> None:
    assert selection().mode == "max"
    assert selection("loss", stop="loss <= 0.1").mode == "min"
    assert selection("loss", stop="loss < 0.1").mode == "min"
    assert selection("loss", "min").mode == "min"
    assert selection("accuracy", stop="loss <= 0.1").mode == "max"
    assert selection("accuracy", stop="accuracy = 1").mode == "max"
    assert selection("accuracy", "min", stop="accuracy = 1").mode == "min"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mode": "up"}, "key_metric_mode='up'; 'max', 'min', or None"),
        ({"mode": "max", "key": "loss", "stop": "loss <= 1"}, "give 'min', or no key_metric_mode"),
        ({"patience": 0}, "patience=0"),
        ({"patience": True}, "patience=True"),
        ({"patience": 1.5}, "patience=1.5"),
        ({"key": ""}, "key_metric=''"),
    ],
)
def test_options_that_are_not_allowed(given: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as caught:
        selection(**given)
    assert said in str(caught.value)


def rounds(options: Selection, scores: list[float | None]) -> tuple[list[bool], Scores]:
    memory = Scores()
    best: list[bool] = []
    for number, score in enumerate(scores):
        metrics = {} if score is None else {options.key_metric: score}
        best.append(memory.note(options, metrics, number))
        memory = Scores.of(memory.to_meta())  # as it goes through a commit
        if memory.stopped:
            break
    return best, memory


def test_the_untrained_model_is_never_the_best() -> None:
    best, memory = rounds(selection(), [9.0, 1.0, 3.0, 3.0, 2.0])
    assert best == [False, True, True, False, False]
    assert (memory.best, memory.best_round) == (3.0, 1)  # what round 2 scored is what round 1 committed


def test_smaller_is_better_where_the_mode_says_so() -> None:
    best, memory = rounds(selection("loss", "min"), [9.0, 3.0, 1.0, 2.0])
    assert best == [False, True, True, False]
    assert memory.best_round == 1


def test_patience_counts_rounds_without_a_better_score() -> None:
    best, memory = rounds(selection(patience=2), [0.5, 0.5, 0.6, None, 0.6, 0.4, 0.9])
    assert best == [False, True, True, False, False, False]  # round 5 is the second without; one has no score at all
    assert memory.stopped == "patience 2: no accuracy better than 0.6"
    # the initial model's score counts: a checkpoint that training only spoils is noticed
    assert rounds(selection(patience=1), [0.9, 0.5])[1].stopped == "patience 1: no accuracy better than 0.9"


def test_a_condition_is_about_the_model_that_was_scored() -> None:
    best, memory = rounds(selection(stop="accuracy >= 2"), [0.0, 1.0, 2.0, 3.0])
    assert best == [False, True, True]
    assert memory.stopped == "stop_cond accuracy >= 2: the model of round 1 has accuracy = 2"
    assert memory.best_round == 1
    assert "the initial model" in rounds(selection(stop="accuracy >= 2"), [5.0])[1].stopped


def test_metrics_that_nobody_sends_are_found() -> None:
    assert selection().unknown({}) == []
    assert selection().unknown({"loss": 1.0}) == ["accuracy"]
    assert selection(patience=1).unknown({}) == ["accuracy"]
    assert selection(stop="loss < 1").unknown({"accuracy": 1.0}) == ["loss"]
    assert selection(stop="loss < 1").unknown({"accuracy": 1.0, "loss": 2.0}) == []
