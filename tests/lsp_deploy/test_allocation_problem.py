"""A layer counts its FLOPs block by block, ragged edges included, and refuses what does not fit it."""

from __future__ import annotations

import numpy as np
import pytest
from layer_curves import layer_curve

from lsp_deploy.allocation.problem import LayerCurve, remaining_flops


def test_flops_are_exact_with_ragged_edges() -> None:
    curve = layer_curve("head", np.zeros(7), M=3, K=10, N=5)
    mask = np.ones((10, 5), bool)
    expected = [2 * 3 * 50]
    for block in curve.order:
        row, column = divmod(int(block), 2)
        mask[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = False
        expected.append(2 * 3 * int(mask.sum()))
    assert curve.blocks == 6
    assert curve.flops().tolist() == expected


def test_remaining_flops_count_what_is_fixed_on_both_sides() -> None:
    curves = [layer_curve("a", np.zeros(5)), layer_curve("b", np.zeros(11))]
    block = 2 * 10 * 16
    assert remaining_flops(curves, {"a": 2, "b": 0}) == pytest.approx(12 / 14)
    assert remaining_flops(curves, {"a": 2, "b": 10}, fixed_flops=5 * block) == pytest.approx(7 / 19)


@pytest.mark.parametrize(
    ("least", "most"), [(0.0, 9), (0.1, 9), (0.25, 7), (0.3, 7), (0.31, 6), (1.0, 0), ({"a": 0.5}, 5), ({"b": 0.5}, 9)]
)
def test_one_block_and_the_minimum_density_stay(least: object, most: int) -> None:
    assert layer_curve("a", np.zeros(11)).most_removable(least) == most


def test_what_does_not_fit_is_refused() -> None:
    good = layer_curve("a", np.zeros(5))
    with pytest.raises(ValueError, match="a has 4 blocks"):
        LayerCurve("a", "fc1", 10, 16, 4, (4, 4), good.order, np.zeros(4), good.sizes)
    with pytest.raises(ValueError, match="entries, not 16 × 3"):
        LayerCurve("a", "fc1", 10, 16, 3, (4, 4), good.order, good.delta, good.sizes)
    with pytest.raises(ValueError, match="not finite"):
        LayerCurve("a", "fc1", 10, 16, 4, (4, 4), good.order, np.full(5, np.nan), good.sizes)
