"""Timings of functions whose length is known."""

import time

import pytest

from bmjax.measure import interleaved, latency


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the timed functions move: a busy machine changes nothing."""
    now = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_functions_are_timed_in_turn(clock):
    order = []

    def lasting(name, seconds):
        def run():
            order.append(name)
            clock(seconds)

        return run

    result = interleaved({"big": lasting("big", 0.010), "small": lasting("small", 0.005)}, repeats=5, min_ms=8)
    assert list(result) == ["big", "small"]
    for name, length, ratio in (("big", 10, 1.0), ("small", 5, 0.5)):
        timing = result[name]
        assert [timing[key] for key in ("low_ms", "median_ms", "high_ms")] == pytest.approx([length] * 3)
        assert [timing[key] for key in ("ratio_low", "ratio", "ratio_high")] == pytest.approx([ratio] * 3)
    # One call of big lasts 8 ms, two of small do; the last 5 rounds alternate.
    assert order[-15:] == ["big", "small", "small"] * 5


def test_real_time_is_measured():
    result = interleaved({"f": lambda: time.sleep(0.005)}, repeats=3, min_ms=5)
    assert result["f"]["median_ms"] >= 5


def test_short_functions_are_repeated(clock):
    calls = 0

    def run():
        nonlocal calls
        calls += 1
        clock(0.0002)

    interleaved({"f": run}, repeats=1, min_ms=10)
    assert calls >= 100  # twice 50: once to find out, once to measure


def test_nothing_to_time():
    with pytest.raises(ValueError, match="nothing to time"):
        interleaved({})
