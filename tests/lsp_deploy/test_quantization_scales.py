"""Histograms that do not depend on batching, and scales that every compute type holds exactly."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsp_deploy.sensitivity.activations import Histogram
from lsp_deploy.sensitivity.quantization import (
    activation_grid,
    fake_quantize,
    output_sqnr_db,
    round_scale,
    weight_scale,
)


def histogram_of(*batches: np.ndarray) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
    return histogram


@given(st.integers(1, 9), st.integers(0, 2**31))
def test_histogram_does_not_depend_on_batches_or_their_order(pieces: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(1000).astype(np.float32)
    whole = histogram_of(values)
    split = histogram_of(*reversed(np.array_split(values, pieces)))
    np.testing.assert_array_equal(whole.counts, split.counts)
    assert (whole.largest == split.largest).all()


def test_percentile_is_within_a_bin_of_numpy() -> None:
    values = np.random.default_rng(1).standard_normal(50_000).astype(np.float32)
    histogram = histogram_of(values)
    for percent in (50.0, 90.0, 99.0, 99.9):
        assert histogram.percentile(percent) == pytest.approx(np.percentile(np.abs(values), percent), rel=0.005)
    assert histogram.percentile(100) == np.abs(values).max()


def test_an_outlier_does_not_coarsen_the_grid() -> None:
    values = np.random.default_rng(2).uniform(-1, 1, 1_000_000).astype(np.float32)
    clean = activation_grid(histogram_of(values), "fp32")
    values[:5] = 60.0
    assert activation_grid(histogram_of(values), "fp32").scale == pytest.approx(clean.scale, rel=0.02)
    assert clean.offset == 0


def test_extent_is_within_a_bin_of_numpy_on_both_sides() -> None:
    values = np.random.default_rng(5).standard_normal(100_000).astype(np.float32) + 1.5
    low, high = histogram_of(values).extent(99.9)
    assert low == pytest.approx(-np.percentile(values, 0.1), rel=0.01)
    assert high == pytest.approx(np.percentile(values, 99.9), rel=0.01)


@pytest.mark.parametrize("compute_type", ["fp32", "fp16", "bf16"])
def test_one_sided_values_are_centered_and_lose_less(compute_type) -> None:
    x = np.random.default_rng(6).standard_normal(200_000).astype(np.float32)
    gelu = x * (x > 0) + 0.1 * np.tanh(x) * (x < 0)
    grid = activation_grid(histogram_of(gelu), compute_type)
    assert grid.offset > 0
    symmetric = fake_quantize(gelu, float(np.abs(gelu).max() / 127))
    error, symmetric_error = (np.mean((y - gelu) ** 2) for y in (grid.rounded(gelu), symmetric))
    assert error < 0.4 * symmetric_error


def test_symmetric_values_are_not_shifted() -> None:
    x = np.random.default_rng(7).standard_normal(50_000).astype(np.float32)
    assert activation_grid(histogram_of(x), "fp16").offset == 0


def test_a_tensor_of_zeros_has_a_grid() -> None:
    grid = activation_grid(histogram_of(np.zeros(100, np.float32)), "fp16")
    assert grid.scale > 0
    assert (grid.rounded(np.zeros(3, np.float32)) == 0).all()


@given(st.floats(1e-9, 1e4), st.sampled_from(["fp32", "fp16", "bf16"]))
def test_scales_are_held_exactly_and_never_clip(scale: float, compute_type: str) -> None:
    dtype = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[compute_type]
    rounded = round_scale(np.array([scale], np.float32), compute_type)  # type: ignore[arg-type]
    assert rounded.astype(dtype).astype(np.float32) == rounded
    assert rounded[0] >= np.float32(scale)


def test_weight_scale_is_per_column_and_zeros_stay_zero() -> None:
    weight = np.random.default_rng(4).standard_normal((64, 8)).astype(np.float32)
    weight[:, 3] = 0
    weight[::2] = 0
    scale = weight_scale(weight, "fp16")
    assert scale.shape == (8,)
    quantized = fake_quantize(weight, scale)
    assert (quantized[weight == 0] == 0).all()
    assert (np.abs(quantized - weight) <= scale / 2 * 1.0001).all()


def test_sqnr() -> None:
    rows, weight = np.eye(4, dtype=np.float32), np.full((4, 4), 10.0, np.float32)
    assert output_sqnr_db(rows, weight, rows @ weight + 1) == pytest.approx(20.0)
    assert output_sqnr_db(rows, weight, rows @ weight) == float("inf")
