"""As much compression as a budget allows, found with few real evaluations."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["largest_within_budget"]


def largest_within_budget(count: int, cost: Callable[[int], float], budget: float) -> int:
    """Return the largest n in 0..count whose measured cost(n) is within `budget`, by bisection.

    Costs are taken as growing with n; noise can make the answer smaller than the best, never over budget, because
    every n that is returned above 0 was itself evaluated. cost(0) is not evaluated: n = 0 adds nothing.
    """
    if count == 0 or cost(count) <= budget:
        return count
    within, over = 0, count
    while over - within > 1:
        middle = (within + over) // 2
        if cost(middle) <= budget:
            within = middle
        else:
            over = middle
    return within
