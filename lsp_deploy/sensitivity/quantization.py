"""Scales for symmetric int8, and what rounding to them does to a layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.sensitivity.activations import Histogram

__all__ = ["ActivationGrid", "activation_grid", "fake_quantize", "output_sqnr_db", "round_scale", "weight_scale"]

ComputeType = Literal["fp32", "fp16", "bf16"]

# One in 100,000: what lies above is so rare that clipping it costs less than the coarser grid it would need.
# Measured on DeiT-Tiny, linear-only int8, error of the logits: 99.99 %: 6.6 %; 99.999 %: 1.6 %; the maximum: 3.4 %.
PERCENTILE = 99.999
_SMALLEST_SCALE = 1e-6  # a tensor of zeros still needs a scale, and one that float16 can hold


@dataclass(frozen=True)
class ActivationGrid:
    """The int8 grid of a tensor: x is held as offset + scale · q, q from -127 to 127."""

    scale: float
    offset: float

    def rounded(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `values` as the grid holds them."""
        centered = (values - np.float32(self.offset)).astype(np.float32)
        return np.asarray(fake_quantize(centered, self.scale) + np.float32(self.offset), np.float32)


def activation_grid(histogram: Histogram, compute_type: ComputeType) -> ActivationGrid:
    """Return a tensor's int8 grid: symmetric over the 99.999th percentile of |x|; centered where x is one-sided.

    Engines take symmetric scales only. Where the values lie so far to one side that centering them shrinks the scale
    by a quarter or more, as after GELU, an offset is subtracted first. Scale and offset are values that
    `compute_type` holds exactly, since the file stores them in that type.
    """
    low, high = histogram.extent(PERCENTILE)
    offset = float(_held(np.array([(high - low) / 2], np.float32), compute_type)[0])
    half = max(high - offset, low + offset)
    if half > 0.75 * max(low, high):
        half, offset = histogram.percentile(PERCENTILE), 0.0
    return ActivationGrid(float(round_scale(np.array([half / 127], np.float32), compute_type)[0]), offset)


def weight_scale(weight: NDArray[np.float32], compute_type: ComputeType) -> NDArray[np.float32]:
    """Return symmetric int8 scales [N] of a weight [K, N], one per output column: max|W| / 127."""
    return round_scale(np.abs(weight).max(axis=0) / 127, compute_type)


def round_scale(scale: NDArray[np.float32], compute_type: ComputeType) -> NDArray[np.float32]:
    """Round scales up to the next value that `compute_type` holds, so that the largest value is never clipped."""
    scale = np.maximum(scale, _SMALLEST_SCALE).astype(np.float32)
    held = _held(scale, compute_type)
    dtype = _dtype(compute_type)
    above = np.nextafter(held.astype(dtype), np.array(np.inf, dtype)).astype(np.float32)
    return np.where(held < scale, above, held)


def fake_quantize(values: NDArray[np.float32], scale: NDArray[np.float32] | float) -> NDArray[np.float32]:
    """Round `values` to symmetric int8 with `scale` (broadcast) and back; zero stays zero."""
    quantized = np.clip(np.rint(values / np.float32(scale)), -127, 127)
    return np.asarray(quantized * np.float32(scale), np.float32)


def output_sqnr_db(rows: NDArray[np.float32], weight: NDArray[np.float32], changed: NDArray[np.float32]) -> float:
    """Return the signal to noise ratio, in dB, of `changed` output against rows @ weight.

    Args:
        rows: x [R, K].
        weight: W [K, N].
        changed: the same layer's output [R, N] after the change.
    """
    signal = rows @ weight
    noise = float(np.square(signal - changed, dtype=np.float64).sum())
    power = float(np.square(signal, dtype=np.float64).sum())
    if noise == 0:
        return float("inf") if power else 0.0
    return float(10 * np.log10(max(power, 1e-30) / noise))


def _held(values: NDArray[np.float32], compute_type: ComputeType) -> NDArray[np.float32]:
    """Return the nearest values that `compute_type` holds."""
    return values.astype(_dtype(compute_type)).astype(np.float32)


def _dtype(compute_type: ComputeType) -> np.dtype[Any]:
    import ml_dtypes

    types = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
    dtype: np.dtype[Any] = np.dtype(types[compute_type])
    return dtype
