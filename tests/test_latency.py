"""Timings of sleeps, whose length is known."""

import time

import pytest

from bmjax.measure import interleaved


def test_sleeps_are_timed_in_turn():
    order = []

    def sleeper(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    result = interleaved({"big": sleeper("big", 0.010), "small": sleeper("small", 0.005)}, repeats=5, min_ms=8)
    assert list(result) == ["big", "small"]
    assert 10 <= result["big"]["median_ms"] < 15
    assert 5 <= result["small"]["median_ms"] < 9
    assert result["big"]["ratio"] == 1.0
    assert 0.4 < result["small"]["ratio"] < 0.75
    for timing in result.values():
        assert timing["low_ms"] <= timing["median_ms"] <= timing["high_ms"]
        assert timing["ratio_low"] <= timing["ratio"] <= timing["ratio_high"]
    # One call of big lasts 8 ms, two of small do; the last 5 rounds alternate.
    assert order[-15:] == ["big", "small", "small"] * 5


def test_short_functions_are_repeated():
    calls = 0

    def run():
        nonlocal calls
        calls += 1
        time.sleep(0.0002)

    interleaved({"f": run}, repeats=1, min_ms=10)
    assert calls >= 20


def test_nothing_to_time():
    with pytest.raises(ValueError, match="nothing to time"):
        interleaved({})
