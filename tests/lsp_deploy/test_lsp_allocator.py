"""The published allocation: target slopes, the power term's sign, and when it is the exact one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layer_curves import layer_curve

from lsp_deploy.allocation.exact import ExactAllocator
from lsp_deploy.allocation.lsp import LspAllocator, power_slopes
from lsp_deploy.allocation.problem import LayerCurve
from lsp_deploy.sensitivity.curves import slopes

ALPHA = np.linspace(0, 1, 101)


def layers(seed: int, count: int = 4) -> list[LayerCurve]:
    """Return layers of different sizes with curves that rise, fall and are not convex."""
    generator = np.random.default_rng(seed)
    return [
        layer_curve(f"layer{index}", np.concatenate([[0.0], np.cumsum(generator.normal(1, 3, blocks))]), M=M)
        for index, (blocks, M) in enumerate(
            zip(generator.integers(1, 40, count), generator.integers(1, 300, count).tolist(), strict=True)
        )
    ]


@given(
    st.integers(0, 2**31), st.lists(st.floats(0.05, 1.2), min_size=2, max_size=5), st.floats(0, 3), st.floats(0, 0.95)
)
def test_the_target_is_never_exceeded_and_removals_grow(
    seed: int, targets: list[float], weight: float, smoothing: float
) -> None:
    allocator = LspAllocator(layers(seed), power_weight=weight, smoothing=smoothing)
    previous = dict.fromkeys((f"layer{index}" for index in range(4)), 0)
    for target in sorted(targets, reverse=True):
        try:
            allocation = allocator.allocate(target)
        except ValueError as error:
            assert "cannot be reached" in str(error)
            break
        assert allocation.flops <= target
        assert all(allocation.removed[name] >= count for name, count in previous.items())
        previous = allocation.removed


@given(st.integers(0, 2**31), st.floats(0.3, 0.95))
def test_no_other_lambda_comes_closer(seed: int, target: float) -> None:
    curves = layers(seed)
    allocator = LspAllocator(curves, smoothing=0.0)
    terms = allocator.beta * power_slopes(curves, tile_m=64)
    total = sum(float(curve.flops()[0]) for curve in curves)

    def remaining(price: float) -> float:
        left = 0.0
        for curve, term in zip(curves, terms, strict=True):
            low = np.flatnonzero(slopes(curve.delta)[: curve.most_removable() + 1] - term <= price)
            left += float(curve.flops()[low[-1] if low.size else 0])
        return left / total

    try:
        allocation = allocator.allocate(target)
    except ValueError:
        assert remaining(np.inf) > target
        return
    assert allocation.flops == pytest.approx(remaining(allocation.price))
    # Dense ones are what remains at every lower λ: either they meet the target, or each is above it.
    for price in np.linspace(allocation.price - 20, allocation.price, 200, endpoint=False):
        assert allocation.flops == pytest.approx(remaining(price)) or remaining(price) > target


def test_alpha_lies_where_the_slope_meets_the_target() -> None:
    """δ = α³ and δ = 2 α³, of one size, no power term: slopes 3α² and 6α² are equal where α₁ = √2 α₂."""
    curves = [layer_curve("a", ALPHA**3), layer_curve("b", 2 * ALPHA**3)]
    allocation = LspAllocator(curves, power_weight=0, smoothing=0).allocate(0.6)
    assert allocation.removed["a"] == pytest.approx(np.sqrt(2) * allocation.removed["b"], abs=1.5)
    assert allocation.flops == pytest.approx(0.6, abs=0.01)
    assert allocation.price == pytest.approx(3 * (allocation.removed["a"] / 100) ** 2, rel=0.05)


def test_the_largest_alpha_counts_where_a_curve_is_not_convex() -> None:
    """Up, then flat, then up: a λ between takes the flat part with what lies before it."""
    curve = layer_curve("a", np.concatenate([np.linspace(0, 2, 21), np.full(40, 2.0), np.linspace(2, 9, 40)]))
    allocation = LspAllocator([curve], power_weight=0, smoothing=0).allocate(0.99)
    assert 55 < allocation.removed["a"] < 65
    assert "meets the target" in allocation.reasons["a"]


def test_the_power_term_takes_more_from_larger_products() -> None:
    curves = [layer_curve("small", ALPHA**2, M=64), layer_curve("large", ALPHA**2, M=256)]
    without = LspAllocator(curves, power_weight=0, smoothing=0).allocate(0.5).removed
    weights = [LspAllocator(curves, power_weight=weight, smoothing=0).allocate(0.5).removed for weight in (0.3, 1.0)]
    assert without["small"] == without["large"]
    assert without["large"] < weights[0]["large"] < weights[1]["large"]
    assert without["small"] > weights[0]["small"] > weights[1]["small"]


def test_beta_balances_the_terms_and_p_m_cancels() -> None:
    """Eq. 14 with absolute values: Σ max |∂δ/∂α| over Σ |∂L/∂α|."""
    curves = [layer_curve("a", ALPHA**2, M=130), layer_curve("b", -3 * ALPHA**2, M=10)]
    power = power_slopes(curves, tile_m=64, p_m=2.0)
    assert power.tolist() == [2.0 * 3 * 100, 2.0 * 1 * 100]  # M / B_m rounded up
    allocator = LspAllocator(curves, p_m=2.0, smoothing=0)
    steepest = sum(np.abs(slopes(curve.delta)).max() for curve in curves)
    assert allocator.beta * power.sum() == pytest.approx(steepest)
    assert allocator.beta > 0
    other = LspAllocator(curves, p_m=1e-6, smoothing=0)
    assert other.allocate(0.5).removed == allocator.allocate(0.5).removed


def test_p_m_by_layer_moves_the_removals() -> None:
    curves = [layer_curve("a", ALPHA**2), layer_curve("b", ALPHA**2)]
    removed = LspAllocator(curves, p_m={"a": 4.0, "b": 1.0}, smoothing=0).allocate(0.5).removed
    assert removed["a"] > removed["b"]


def test_lambda_may_be_negative() -> None:
    """With the power term a target near the dense FLOPs has no solution at λ ≥ 0."""
    curves = [layer_curve("a", ALPHA**2, M=64), layer_curve("b", ALPHA**2, M=256)]
    allocation = LspAllocator(curves, smoothing=0).allocate(0.95)
    assert allocation.price < 0
    assert 0.94 < allocation.flops <= 0.95


def test_nothing_goes_where_nothing_must() -> None:
    allocation = LspAllocator(layers(3)).allocate(1.0)
    assert set(allocation.removed.values()) == {0}
    assert allocation.flops == 1.0
    assert allocation.damage == 0.0
    assert all(reason.startswith("left dense") for reason in allocation.reasons.values())


def test_density_and_fixed_flops_bound_what_can_be_reached() -> None:
    curves = [layer_curve("a", ALPHA**2), layer_curve("b", ALPHA**2)]
    allocator = LspAllocator(curves, min_density=0.4, fixed_flops=float(curves[0].flops()[0]))
    assert allocator.allocate(0.6).removed == {"a": 60, "b": 60}
    with pytest.raises(ValueError, match=r"60\.0% remain"):
        allocator.allocate(0.59)
    with pytest.raises(ValueError, match="no layer"):
        LspAllocator([])


def agree(first: dict[str, int], second: dict[str, int]) -> bool:
    """Within one block a layer: a slope at j blocks is not the step to j, it lies half a block beside it."""
    return all(abs(first[name] - second[name]) <= 1 for name in first)


@pytest.mark.parametrize("target", [0.9, 0.7, 0.5, 0.3])
def test_equal_layers_without_power_term_get_the_exact_allocation(target: float) -> None:
    """Convex smooth curves, no moving average, power_weight 0, the same FLOPs in every layer: λ is one price."""
    curves = [
        layer_curve(f"layer{index}", a * ALPHA**2 + b * ALPHA**3)
        for index, (a, b) in enumerate(itertools.product((0.5, 1.0, 2.0), (0.0, 1.0)))
    ]
    published = LspAllocator(curves, power_weight=0, smoothing=0).allocate(target)
    exact = ExactAllocator(curves).allocate(target * sum(float(curve.flops()[0]) for curve in curves))
    assert agree(published.removed, exact.removed)
    assert exact.damage <= published.damage * (1 + 1e-9) or exact.flops < published.flops


def test_unequal_layers_without_power_term_do_not() -> None:
    """Eq. 10 drops the derivative of the constraint: the price of a FLOP is then lower in a small layer."""
    curves = [layer_curve("small", ALPHA**2, M=8), layer_curve("large", ALPHA**2, M=64)]
    published = LspAllocator(curves, power_weight=0, smoothing=0).allocate(0.5)
    exact = ExactAllocator(curves).allocate(0.5 * sum(float(curve.flops()[0]) for curve in curves))
    assert not agree(published.removed, exact.removed)
    assert exact.damage < published.damage


def test_the_power_term_alone_is_the_exact_allocation() -> None:
    """λ = 0: target slopes are proportional to FLOPs, so whatever they meet is one price for all FLOPs."""
    curves = [
        layer_curve("small", ALPHA**2, M=64),
        layer_curve("large", 2 * ALPHA**2, M=256),
        layer_curve("cubic", ALPHA**3, M=128),
    ]
    full = LspAllocator(curves, smoothing=0)
    weights = np.linspace(0.05, 0.6, 12)
    prices = weights[:, None] * full.beta * power_slopes(curves, tile_m=64)
    for target_slopes in prices:
        removed = {
            curve.name: int(np.flatnonzero(slopes(curve.delta)[:100] <= slope)[-1])
            for curve, slope in zip(curves, target_slopes, strict=True)
        }
        left = sum(float(curve.flops()[removed[curve.name]]) for curve in curves)
        assert agree(removed, ExactAllocator(curves).allocate(left).removed)


def test_what_is_gone_stays_gone_and_counts() -> None:
    curves = [layer_curve(name, np.linspace(0, steepness, 13)) for name, steepness in (("flat", 1.0), ("steep", 30.0))]
    free = LspAllocator(curves, power_weight=0, smoothing=0).allocate(0.7)
    assert free.removed["steep"] == 0
    allocator = LspAllocator(curves, power_weight=0, smoothing=0, removed={"steep": 5})
    allocation = allocator.allocate(0.7)
    assert allocation.removed["steep"] == 5
    assert "removed before" in allocation.reasons["steep"]
    assert allocation.flops <= 0.7
    assert allocator.allocate(1.0).removed == {"flat": 0, "steep": 5}
