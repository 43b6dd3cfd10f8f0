"""What short calls take, measured in turns: for choosing between ways to run one layer.

`profiler.py` measures whole networks, with statistics for people; this is for dozens of calls of microseconds to
milliseconds, of which only the order matters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

__all__ = ["call_times_us"]

_LEAST_CALLS = 3  # in a block, the first of which only warms up


def call_times_us(
    calls: Mapping[str, Callable[[], None]], *, rounds: int = 5, block_seconds: float = 0.01
) -> dict[str, float]:
    """Return what each call takes, µs: the least of the medians of its blocks.

    Every round gives each call one block, in an order that turns from round to round, so that a slow spell of the
    machine does not meet one of them alone. The least: whatever disturbs a call makes it slower.

    Args:
        calls: by name.
        rounds: blocks of each.
        block_seconds: length of a block; it has three calls at least, of which the first is not counted.
    """
    medians: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            medians[name].append(_block(calls[name], block_seconds))
    return {name: min(times) for name, times in medians.items()}


def _block(call: Callable[[], None], seconds: float) -> float:
    call()
    times: list[float] = []
    begin = now = time.perf_counter()
    while now - begin < seconds or len(times) < _LEAST_CALLS - 1:
        call()
        before, now = now, time.perf_counter()
        times.append((now - before) * 1e6)
    return float(np.median(times))
