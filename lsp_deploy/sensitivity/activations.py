"""What flows into every linear layer, gathered in one pass over the calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lsp_deploy import console
from lsp_deploy.engines.batches import run_batches, without_padding
from lsp_deploy.errors import UserError

if TYPE_CHECKING:
    from lsp_deploy.data import Dataset
    from lsp_deploy.engines.protocol import Engine
    from lsp_deploy.linear_layers import LinearLayer

__all__ = ["ActivationStatistics", "Histogram", "collect_activations"]

# x is binned by the upper bits of its float32 pattern: sign, 8 bits of exponent, 8 of mantissa. Bins are fixed
# (0.4 % wide), so the histogram does not depend on the order or the size of the batches, and no range is needed.
_DROPPED_BITS = 15
_BINS = 0x7F800000 >> _DROPPED_BITS  # of each sign; every finite pattern lies below that of infinity


@dataclass
class Histogram:
    """Counts of x over fixed, logarithmic bins, by sign; the same whatever the batch size."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, _BINS), np.int64))
    """[2, bins]: of values from 0 up, and of values below."""
    largest: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    """[2]: the largest magnitude of each sign."""

    def add(self, values: NDArray[np.float32]) -> None:
        """Count every entry of `values` (any shape)."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        patterns = flat.view(np.uint32)
        counts = np.bincount(patterns >> np.uint32(_DROPPED_BITS), minlength=1 << (32 - _DROPPED_BITS))
        self.counts += counts.reshape(2, -1)[:, :_BINS]
        extremes = [flat.max(initial=0.0), -flat.min(initial=0.0)]
        self.largest = np.maximum(self.largest, extremes)

    @property
    def maximum(self) -> float:
        """The largest |x|."""
        return float(self.largest.max())

    def percentile(self, percent: float) -> float:
        """Return the |x| that `percent` of all values do not exceed; the exact maximum at 100."""
        return self._exceeded_by(self.counts.sum(axis=0), 1 - percent / 100, self.maximum)

    def extent(self, percent: float) -> tuple[float, float]:
        """Return (low, high): all but 100 - `percent` of the values are above -low, and all but as many below high."""
        above, below = self.counts
        share = 1 - percent / 100
        return (
            self._exceeded_by(below, share, float(self.largest[1])),
            self._exceeded_by(above, share, float(self.largest[0])),
        )

    def _exceeded_by(self, counts: NDArray[np.int64], share: float, largest: float) -> float:
        """Return the magnitude that no more than `share` of all values exceed, among `counts`."""
        allowed = np.floor(self.counts.sum() * share)
        over = np.cumsum(counts[::-1])[::-1]  # how many lie in a bin or above it
        index = int(np.searchsorted(-over, -allowed))
        if index == 0:
            return 0.0
        return largest if allowed == 0 else min(float(_centres()[index - 1]), largest)


@dataclass
class ActivationStatistics:
    """Statistics of one tensor x [rows, K] that feeds one or more linear layers."""

    histogram: Histogram
    square_sum: NDArray[np.float64]
    """[K]: sum of x² over all rows, per input channel."""
    rows: NDArray[np.float32]
    """[R, K]: rows evenly spread over the calibration data, to measure a layer's error on."""
    count: int = 0

    @property
    def channel_norm(self) -> NDArray[np.float32]:
        """[K]: root mean square of each input channel, the ‖x‖ of |W|·‖x‖."""
        return np.sqrt(self.square_sum / max(self.count, 1)).astype(np.float32)


def collect_activations(
    engine: Engine,
    layers: Sequence[LinearLayer],
    dataset: Dataset,
    *,
    batch_size: int,
    rows: int = 256,
) -> dict[str, ActivationStatistics]:
    """Run `dataset` through `engine` and gather statistics of every layer's input.

    Args:
        engine: gives each layer's `x` (by value name) as an output.
        layers: the linear layers; those that read the same tensor share one entry.
        dataset: calibration data.
        batch_size: samples a run; an engine of a fixed batch runs at that.
        rows: sampled rows to keep of each input.

    Returns:
        Statistics by the name of the input value (`layer.x.name`).

    Raises:
        UserError: an input of a layer is NaN or infinite.
    """
    by_input = {str(layer.x.name): layer for layer in layers}
    result: dict[str, ActivationStatistics] = {}
    with console.progress("calibrating", len(dataset)) as advance:
        done = 0
        for count, size, outputs in run_batches(engine, dataset, batch_size):
            for name, layer in by_input.items():
                x = without_padding(as_rows(outputs[name], layer), count, size)
                _add(result, name, x, count, len(dataset), done, rows)
            done += count
            advance(count)
    return result


def as_rows(value: NDArray[Any], layer: LinearLayer) -> NDArray[np.float32]:
    """Return a layer's input as rows x [M, K]; the patches of a patch-embedding Conv become rows."""
    if layer.node.op_type == "Conv":
        return _patches(value, layer)
    if layer.node.op_type == "Gemm" and layer.node.attributes.get_int("transA", False):
        value = value.T
    return np.ascontiguousarray(value, np.float32).reshape(-1, layer.K)


def _add(
    result: dict[str, ActivationStatistics],
    name: str,
    x: NDArray[np.float32],
    samples: int,
    total_samples: int,
    done: int,
    rows: int,
) -> None:
    if not np.isfinite(x).all():
        raise UserError(f"calibration gives NaN or infinity in {name}; check the images, --preprocess and the model")
    if name not in result:
        result[name] = ActivationStatistics(Histogram(), np.zeros(x.shape[1]), np.empty((0, x.shape[1]), np.float32))
    entry = result[name]
    entry.histogram.add(x)
    entry.square_sum += np.einsum("ij,ij->j", x, x, dtype=np.float64)
    entry.count += len(x)
    # The share of rows that this batch contributes, so that the sample is spread evenly and bounded.
    wanted = (done + samples) * rows // total_samples - len(entry.rows)
    if wanted > 0:
        picked = np.linspace(0, len(x) - 1, min(wanted, len(x))).round().astype(int)
        entry.rows = np.concatenate([entry.rows, x[picked]])


def _patches(image: NDArray[Any], layer: LinearLayer) -> NDArray[np.float32]:
    batch, channels, height, width = image.shape
    kernel_h, kernel_w = layer.node.attributes.get_ints("kernel_shape")
    image = image[:, :, : height // kernel_h * kernel_h, : width // kernel_w * kernel_w]
    tiles = image.reshape(batch, channels, height // kernel_h, kernel_h, width // kernel_w, kernel_w)
    return np.ascontiguousarray(tiles.transpose(0, 2, 4, 1, 3, 5), np.float32).reshape(-1, layer.K)


def _centres() -> NDArray[np.float64]:
    patterns = (np.arange(_BINS, dtype=np.uint32) << np.uint32(_DROPPED_BITS)) + np.uint32(1 << (_DROPPED_BITS - 1))
    patterns[0] = 0
    return patterns.view(np.float32).astype(np.float64)
