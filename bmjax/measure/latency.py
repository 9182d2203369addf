"""Latency of functions beside each other, robust against a noisy machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def interleaved(fns: dict[str, Callable[[], Any]], repeats: int = 15, min_ms: float = 20.0) -> dict[str, dict[str, float]]:
    """Times functions in turn (A B A B ...), so that slow spells of the machine hit all of them.

    A timing is as many calls in a row as last `min_ms`, each waited for. Compilation happens before the first timing.

    Args:
        fns: {name: function without arguments}; what it returns is waited for.
        repeats: rounds.
        min_ms: least length of one timing, in milliseconds.

    Returns:
        {name: {median_ms, low_ms, high_ms, ratio, ratio_low, ratio_high}}: milliseconds a call (median and quartiles), and
        the time relative to the first function's in the same round (median and quartiles; below 1 is faster).

    Raises:
        ValueError: no functions, or repeats below 1.
    """
    if not fns or repeats < 1:
        raise ValueError(f"nothing to time: {len(fns)} functions, {repeats} repeats; expected at least one of each")
    calls = {name: _calls_for(fn, min_ms) for name, fn in fns.items()}
    times = np.array([[_milliseconds(fn, calls[name]) for name, fn in fns.items()] for _ in range(repeats)])
    ratios = times / times[:, :1]
    result = {}
    for column, name in enumerate(fns):
        low, median, high = np.quantile(times[:, column], [0.25, 0.5, 0.75]).tolist()
        ratio_low, ratio, ratio_high = np.quantile(ratios[:, column], [0.25, 0.5, 0.75]).tolist()
        result[name] = {
            "median_ms": median,
            "low_ms": low,
            "high_ms": high,
            "ratio": ratio,
            "ratio_low": ratio_low,
            "ratio_high": ratio_high,
        }
    return result


def _milliseconds(fn: Callable[[], Any], calls: int) -> float:
    """Time of one of `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(fn())
    return (time.perf_counter() - start) * 1e3 / calls


def _calls_for(fn: Callable[[], Any], min_ms: float) -> int:
    """How many calls last `min_ms`; warms the function up."""
    _milliseconds(fn, 1)
    calls = 1
    while (spent := _milliseconds(fn, calls) * calls) < min_ms:
        calls = max(2 * calls, int(calls * min_ms / spent)) if spent > min_ms / 10 else 2 * calls
    return calls
