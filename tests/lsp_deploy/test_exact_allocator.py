"""The allocator of one price against brute force, its budgets, and the choice among patterns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layer_curves import layer_curve

from lsp_deploy.allocation.exact import ExactAllocator, LayerOptions, OptionHulls, choose_options


@st.composite
def problems(draw: st.DrawFn) -> dict[str, LayerOptions]:
    number = st.integers(-20, 40).map(lambda value: value / 4)
    layers = {}
    for index in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 5))
        pair = st.lists(number, min_size=count, max_size=count)
        layers[f"layer{index}"] = LayerOptions(np.array(draw(pair)), np.array(draw(pair)))
    return layers


def everything(options: dict[str, LayerOptions]) -> list[tuple[float, float]]:
    """Return cost and damage of every combination."""
    layers = list(options.values())
    return [
        (
            sum(float(layer.costs[one]) for layer, one in zip(layers, chosen, strict=True)),
            sum(float(layer.damages[one]) for layer, one in zip(layers, chosen, strict=True)),
        )
        for chosen in itertools.product(*(range(len(layer.costs)) for layer in layers))
    ]


@given(problems())
def test_what_a_price_chooses_is_the_best_of_its_cost(options: dict[str, LayerOptions]) -> None:
    hulls, combinations = OptionHulls(options), everything(options)
    for cost, damage in zip(*hulls.frontier, strict=True):
        assert damage == pytest.approx(min(one[1] for one in combinations if one[0] <= cost + 1e-9))
        choice = hulls.within_cost(float(cost))
        assert choice.damage == pytest.approx(float(damage))
        assert choice.cost <= cost


@given(problems(), st.lists(st.floats(-30, 50), min_size=2, max_size=6))
def test_budgets_hold_and_more_budget_never_hurts(options: dict[str, LayerOptions], budgets: list[float]) -> None:
    hulls, combinations = OptionHulls(options), everything(options)
    damages = []
    for budget in sorted(budgets):
        feasible = [damage for cost, damage in combinations if cost <= budget]
        if not feasible:
            with pytest.raises(ValueError, match="cannot be reached"):
                hulls.within_cost(budget)
            continue
        choice = hulls.within_cost(budget)
        assert choice.cost <= budget
        assert choice.damage >= min(feasible) - 1e-9
        total = sum(float(options[name].costs[option]) for name, option in choice.chosen.items())
        assert choice.cost == pytest.approx(total)
        damages.append(choice.damage)
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(damages))


@given(problems(), st.floats(-30, 50))
def test_damage_limits_hold(options: dict[str, LayerOptions], limit: float) -> None:
    hulls = OptionHulls(options)
    feasible = [cost for cost, damage in everything(options) if damage <= limit]
    if not feasible:
        with pytest.raises(ValueError, match="cannot be kept"):
            hulls.within_damage(limit)
        return
    choice = hulls.within_damage(limit)
    assert choice.damage <= limit
    assert choice.cost >= min(feasible) - 1e-9
    worst = min((cost for cost, damage in zip(*hulls.frontier, strict=True) if damage <= limit), default=np.inf)
    assert choice.cost <= worst + 1e-9


def test_the_price_separates_what_was_taken_from_what_was_not() -> None:
    options = {
        "cheap": LayerOptions(np.array([4.0, 2.0, 1.0]), np.array([0.0, 1.0, 4.0])),
        "dear": LayerOptions(np.array([4.0, 2.0]), np.array([0.0, 10.0])),
    }
    choice = choose_options(options, 6.0)
    assert choice.chosen == {"cheap": 1, "dear": 0}
    assert choice.price == 0.5
    assert choice.next_prices == {"cheap": 3.0, "dear": 5.0}
    back = OptionHulls(options).within_damage(1.5)
    assert back.chosen == choice.chosen
    assert 0.5 <= back.price <= 3.0
    assert OptionHulls(options).within_damage(100.0).price == 5.0
    assert choose_options(options, 100.0).price == 0


def test_the_last_step_is_filled_from_inside_a_hull_segment() -> None:
    """A straight curve is one step of the hull; a budget in the middle is met to the block all the same."""
    curves = [layer_curve("a", np.linspace(0, 1, 11)), layer_curve("b", np.linspace(0, 5, 11))]
    block = 2 * 10 * 16
    allocation = ExactAllocator(curves).allocate(13.5 * block)
    assert allocation.removed == {"a": 7, "b": 0}
    assert allocation.flops == pytest.approx(13 / 20)
    assert allocation.cost == 13 * block


def test_each_layer_gets_the_pattern_that_its_budget_buys_best() -> None:
    """Dense, 2:4, or blocks: one price decides for all."""
    labels = ["dense", "2:4", "blocks, 50 %", "blocks, 25 %"]
    costs = np.array([10.0, 7.0, 6.0, 4.0])
    options = {
        "loves 2:4": LayerOptions(costs, np.array([0.0, 0.1, 5.0, 20.0]), labels),
        "loves blocks": LayerOptions(costs, np.array([0.0, 5.0, 0.1, 0.2]), labels),
        "loves nothing": LayerOptions(costs, np.array([0.0, 50.0, 50.0, 90.0]), labels),
    }
    choice = choose_options(options, 21.0)
    assert choice.labels == {"loves 2:4": "2:4", "loves blocks": "blocks, 25 %", "loves nothing": "dense"}
    assert choice.cost == 21.0


def test_costs_damages_and_fixed_costs_of_the_caller() -> None:
    curves = [layer_curve("a", [0, -1, 3, 6, 9]), layer_curve("b", [0, 1, 2, 3, 4])]
    costs = {"a": np.array([9.0, 8, 7, 6, 5]), "b": np.array([9.0, 9, 9, 9, 9])}
    damages = {"a": np.array([0.0, 1, 2, 3, 4]), "b": np.array([0.0, 1, 2, 3, 4])}
    allocator = ExactAllocator(curves, costs=costs, damages=damages, fixed_cost=100, unit="µs")
    assert allocator.dense_cost == 118
    allocation = allocator.allocate(116)
    assert allocation.removed == {"a": 2, "b": 0}
    assert allocation.cost == 116
    assert "of damage per µs" in allocation.reasons["a"]
    assert allocation.reasons["b"].startswith("left dense")
    assert allocator.allocate_damage(3.0).removed == {"a": 3, "b": 0}


def test_the_minimum_density_holds_and_bounds_what_can_be_reached() -> None:
    curves = [layer_curve("a", np.arange(11) * 1.0), layer_curve("b", np.arange(11) * 2.0)]
    allocator = ExactAllocator(curves, min_density={"a": 0.8})
    block = 2 * 10 * 16
    assert allocator.allocate(9 * block).removed == {"a": 2, "b": 9}
    with pytest.raises(ValueError, match="cannot be reached"):
        allocator.allocate(8 * block)
    assert ExactAllocator(curves).allocate(2 * block).removed == {"a": 9, "b": 9}


def test_a_curve_that_falls_is_followed_down_even_without_a_budget() -> None:
    """A negative δ is predicted to help; whoever does not trust the first-order term gives other damages."""
    curve = layer_curve("a", [0, -2, -3, 5, 9])
    assert ExactAllocator([curve]).allocate(np.inf).removed == {"a": 2}


def test_of_equal_damage_the_cheapest_is_taken() -> None:
    options = {name: LayerOptions(np.array([10.0, 8.0, 9.0]), np.array([1.0, 1.0, 1.0])) for name in "ab"}
    assert choose_options(options, 100.0).chosen == {"a": 1, "b": 1}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer"):
        OptionHulls({})
    with pytest.raises(ValueError, match="at least one option"):
        LayerOptions(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="every option or none"):
        LayerOptions(np.zeros(2), np.zeros(2), ["dense"])
    with pytest.raises(ValueError, match="finite"):
        LayerOptions(np.zeros(1), np.array([np.nan]))
    with pytest.raises(ValueError, match="a needs 5 costs"):
        ExactAllocator([layer_curve("a", np.zeros(5))], costs={"a": np.zeros(4)})
