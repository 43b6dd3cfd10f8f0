"""δ-curves against the paper's recursion and a brute-force quadratic form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsp_deploy.sensitivity.curves import delta_curve, lower_hull, slopes, smooth

KAPPA = 1e-3


class Layer:
    """A small layer with per-sample gradients, its blocks, and the paper's formulas written out."""

    def __init__(self, seed: int, K: int = 10, N: int = 7, block: tuple[int, int] = (4, 3), samples: int = 6) -> None:
        generator = np.random.default_rng(seed)
        self.weight = generator.standard_normal(K * N)
        self.gradients = generator.standard_normal((samples, K * N))
        rows, columns = np.divmod(np.arange(K * N), N)
        self.block_of = rows // block[0] * -(-N // block[1]) + columns // block[1]
        self.blocks = int(self.block_of.max()) + 1
        self.order = generator.permutation(self.blocks)
        self.hessian = KAPPA * np.eye(K * N) + self.gradients.T @ self.gradients / samples
        self.mean = self.gradients.mean(axis=0)

    @property
    def contributions(self) -> np.ndarray:
        members = self.block_of[None, :] == np.arange(self.blocks)[:, None]
        return (self.gradients * self.weight) @ members.T

    @property
    def square_norms(self) -> np.ndarray:
        return np.bincount(self.block_of, self.weight**2)

    def removed(self, count: int) -> np.ndarray:
        return np.where(np.isin(self.block_of, self.order[:count]), -self.weight, 0.0)

    def curve(self) -> np.ndarray:
        return delta_curve(self.contributions, self.square_norms, self.order, kappa=KAPPA)


@given(st.integers(0, 2**31))
def test_equals_a_brute_force_quadratic_form(seed: int) -> None:
    layer = Layer(seed)
    expected = []
    for count in range(layer.blocks + 1):
        change = layer.removed(count)
        expected.append(layer.mean @ change + 0.5 * change @ layer.hessian @ change)
    np.testing.assert_allclose(layer.curve(), expected, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 2**31))
def test_equals_the_recursion_of_equation_13(seed: int) -> None:
    layer = Layer(seed)
    expected, previous = [0.0], np.zeros_like(layer.weight)
    for count in range(1, layer.blocks + 1):
        step = layer.removed(count) - previous
        expected.append(expected[-1] + layer.mean @ step + (0.5 * step + previous) @ layer.hessian @ step)
        previous = previous + step
    np.testing.assert_allclose(layer.curve(), expected, rtol=1e-9, atol=1e-12)


def test_reads_mapped_contributions_in_chunks(tmp_path) -> None:
    A = np.random.default_rng(0).standard_normal((1000, 12)).astype(np.float32)
    mapped = np.memmap(tmp_path / "A", np.float32, "w+", shape=A.shape)
    mapped[:] = A
    order, norms = np.arange(12)[::-1], np.ones(12)
    np.testing.assert_array_equal(delta_curve(mapped, norms, order, kappa=0.1), delta_curve(A, norms, order, kappa=0.1))


def test_slopes_are_exact_for_cubics_inside() -> None:
    alpha = np.linspace(0, 1, 21)
    np.testing.assert_allclose(slopes(alpha**3)[2:-2], 3 * alpha[2:-2] ** 2, rtol=1e-9)


def test_smoothing_keeps_a_constant_and_factor_zero_keeps_all() -> None:
    curve = np.random.default_rng(1).random(30)
    np.testing.assert_array_equal(smooth(curve, 0.0), curve)
    np.testing.assert_allclose(smooth(np.full(9, 2.5)), 2.5)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40))
def test_hull_is_convex_and_below(values: list[float]) -> None:
    curve = np.array(values)
    hull = lower_hull(curve)
    assert hull[0] == 0
    assert hull[-1] == len(curve) - 1
    interpolated = np.interp(np.arange(len(curve)), hull, curve[hull])
    assert (interpolated <= curve + 1e-9).all()
    if len(hull) > 2:
        assert (np.diff(np.diff(curve[hull]) / np.diff(hull)) >= -1e-9).all()


def test_single_block() -> None:
    assert delta_curve(np.array([[2.0]]), np.array([3.0]), np.array([0]), kappa=1.0) == pytest.approx([0, -2 + 3.5])
