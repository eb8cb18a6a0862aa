"""Strikes and the penalty box: a window, a time, and bounds."""

from __future__ import annotations

from fedloom.broker.strikes import StrikeLimits, Strikes


def test_eight_within_a_minute_and_a_minute_in_the_box() -> None:
    strikes: Strikes[str] = Strikes(StrikeLimits(strikes=8, window_s=60, box_s=60))
    assert [strikes.strike("a", now) for now in range(7)] == [False] * 7
    assert not strikes.strike("b", 7) and not strikes.boxed("a", 7)
    assert strikes.strike("a", 8.0)
    assert strikes.boxed("a", 8.0) == 60 and strikes.boxed("a", 67.9) > 0
    assert strikes.boxed("a", 68.0) == 0 and not len(strikes)
    assert not strikes.strike("a", 69.0), "it begins anew"


def test_strikes_far_apart_are_accidents() -> None:
    strikes: Strikes[str] = Strikes(StrikeLimits(strikes=3, window_s=10))
    assert not any(strikes.strike("a", now) for now in range(0, 600, 6))
    assert [strikes.strike("a", 601.0), strikes.strike("a", 602.0)] == [False, True]


def test_neither_list_grows_without_end() -> None:
    strikes: Strikes[int] = Strikes(StrikeLimits(strikes=2, tracked=100))
    for who in range(1000):
        strikes.strike(who, 1.0)
    for who in range(1000, 2000):
        strikes.box(who, 1.0)
    assert len(strikes) == 100 and len(strikes._struck) == 100
    assert strikes.boxed(1999, 2.0) and not strikes.boxed(1000, 2.0)
