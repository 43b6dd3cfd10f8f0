"""Bisection for the most that a budget allows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lsp_deploy.allocation.budget import largest_within_budget


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.floats(0, 12))
def test_finds_the_largest_of_a_growing_cost(steps: list[float], budget: float) -> None:
    costs = [sum(steps[:n]) for n in range(len(steps) + 1)]
    found = largest_within_budget(len(steps), lambda n: costs[n], budget)
    assert found == max(n for n, cost in enumerate(costs) if cost <= budget)


def test_evaluates_few() -> None:
    asked: list[int] = []
    largest_within_budget(48, lambda n: (asked.append(n), float(n))[1], 20.0)
    assert len(asked) <= 7


def test_nothing_to_choose_costs_nothing() -> None:
    def never(n: int) -> float:
        raise AssertionError(n)

    assert largest_within_budget(0, never, 1.0) == 0
