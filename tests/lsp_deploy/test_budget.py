"""The most that a budget allows, by bisection or step by step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lsp_deploy.allocation.budget import best_within_budget, climb_within_budget, largest_within_budget


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


@given(st.integers(0, 40), st.integers(-1, 45))
def test_the_best_is_the_trial_of_the_largest_and_none_is_made_twice(count: int, fits: int) -> None:
    made: list[int] = []

    def trial(number: int) -> str:
        made.append(number)
        return str(number)

    best = best_within_budget(count, trial, float, fits)
    assert best == (str(min(count, fits)) if min(count, fits) > 0 else None)
    assert len(made) == len(set(made))


@given(st.integers(0, 40), st.integers(-1, 45))
def test_climbs_to_the_largest_from_below(count: int, fits: int) -> None:
    made: list[int] = []

    def trial(number: int) -> str:
        made.append(number)
        return str(number)

    within = max(0, min(count, fits))
    assert climb_within_budget(count, trial, float, fits) == (str(within) if within else None)
    assert len(made) == len(set(made)) <= 11
    assert all(number <= max(1, 2 * within) for number in made), "nothing far beyond the budget is tried"
