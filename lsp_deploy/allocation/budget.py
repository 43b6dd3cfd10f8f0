"""As much compression as a budget allows, found with few real evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

__all__ = ["best_within_budget", "climb_within_budget", "largest_within_budget"]

_Trial = TypeVar("_Trial")


def best_within_budget(
    count: int, trial: Callable[[int], _Trial], cost: Callable[[_Trial], float], budget: float
) -> _Trial | None:
    """Return the trial that was made for `largest_within_budget`: no trial is made twice.

    Args:
        count: the largest number to try.
        trial: makes what is tried.
        cost: measures it.
        budget: what it may cost.

    Returns:
        None where nothing above 0 is within the budget.
    """
    best: list[_Trial] = []

    def measured(number: int) -> float:
        made = trial(number)
        found = cost(made)
        if found <= budget:
            best[:] = [made]  # bisection only goes up from what is within the budget
        return found

    largest_within_budget(count, measured, budget)
    return best[0] if best else None


def climb_within_budget(
    count: int, trial: Callable[[int], _Trial], cost: Callable[[_Trial], float], budget: float
) -> _Trial | None:
    """Return the trial of the largest number within the budget, tried from 1 upwards: 1, 2, 4 ..., then by bisection.

    For trials that build on smaller ones, so that large numbers are dear: bisection alone would start with them.

    Args:
        count: the largest number to try.
        trial: makes what is tried.
        cost: measures it; taken as growing.
        budget: what it may cost.

    Returns:
        None where nothing above 0 is within the budget.
    """
    best, within, over = None, 0, count + 1
    while over - within > 1:
        number = min(max(1, 2 * within), count) if over > count else (within + over) // 2
        made = trial(number)
        if cost(made) <= budget:
            best, within = made, number
        else:
            over = number
    return best


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
