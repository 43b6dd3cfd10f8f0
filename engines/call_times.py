"""What short calls take, measured in turns: for choosing between ways to run one layer.

`profiler.py` measures whole networks, with statistics for people; this is for dozens of calls of microseconds to
milliseconds, of which only the order matters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

__all__ = ["call_times_us"]

_LEAST_ROUNDS = 3
_ROUNDS_WITHOUT_NEWS = 2
_NEWS = 0.03  # faster by so much
_LEAST_CALLS = 2  # that count, in a block


def call_times_us(
    calls: Mapping[str, Callable[[], None]], *, seconds: float = 2.5, block_seconds: float = 0.01
) -> dict[str, float]:
    """Return what each call takes at the least, µs: whatever disturbs a call makes it slower.

    Every round gives each call one block, in an order that turns from round to round, so that a slow spell of the
    machine does not meet one of them alone. Rounds go on until none of two finds a call faster than it was known to be.

    Args:
        calls: by name.
        seconds: after that no round begins: the machine is busy, and what was found has to do.
        block_seconds: length of a block; it has two calls at least, after one that is not counted.
    """
    least = dict.fromkeys(calls, float("inf"))
    begin, rounds, without_news = time.perf_counter(), 0, 0
    while without_news < _ROUNDS_WITHOUT_NEWS and (rounds < _LEAST_ROUNDS or time.perf_counter() - begin < seconds):
        without_news += 1
        for name in list(calls)[:: 1 if rounds % 2 == 0 else -1]:
            found = _block(calls[name], block_seconds)
            if found < least[name] * (1 - _NEWS):
                without_news = 0
            least[name] = min(least[name], found)
        rounds += 1
    return least


def _block(call: Callable[[], None], seconds: float) -> float:
    """Return the least microseconds of the calls of a block."""
    call()
    least, calls = float("inf"), 0
    begin = now = time.perf_counter()
    while now - begin < seconds or calls < _LEAST_CALLS:
        call()
        before, now = now, time.perf_counter()
        least, calls = min(least, now - before), calls + 1
    return least * 1e6
