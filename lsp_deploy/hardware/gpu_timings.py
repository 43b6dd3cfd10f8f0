"""What linear layers take on the GPU of this machine: measured times of engines that hold one layer each.

Candidates are named as for a CPU (`cpu_timings.py`): "matmul int8" is what the engine's builder chooses for a dense
layer, "block_sparse int8" the operator of this project. What the builder chooses for a layer with 2:4 zeros stands
apart, since it is for other weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lsp_deploy.hardware.cpu_timings import LayerTimes
from lsp_deploy.hardware.target import ElementType

__all__ = ["GPU_DENSITIES", "GpuTimings", "break_even_zeros"]

GPU_DENSITIES = (1.0, 0.6, 0.4, 0.2)
"""Fractions of surviving blocks that the operator is timed at: fewer than on a CPU, each takes an engine."""


@dataclass(frozen=True)
class GpuTimings:
    """All that was timed for a network."""

    device: str
    """E.g. "NVIDIA A100-SXM4-80GB"."""
    layers: Mapping[str, LayerTimes]
    """By layer name, of the layers that are matrix products."""
    two_four: Mapping[str, Mapping[ElementType, float]] = field(default_factory=dict)
    """Microseconds with 2:4 zeros, by layer name and element type."""

    @property
    def has_operator(self) -> bool:
        """Whether lsp::BlockSparseLinear was timed."""
        return any(name.startswith("block_sparse") for times in self.layers.values() for name in times.curves)

    def at(self, name: str, density: float) -> dict[str, float]:
        """Return the microseconds of every candidate of a layer at a density, "two_four <type>" among them.

        Empty for a layer that was not timed.
        """
        if name not in self.layers:
            return {}
        times = self.layers[name]
        found = {candidate: float(times.at(candidate, density)) for candidate in times.curves}
        return found | {f"two_four {dtype}": time for dtype, time in self.two_four.get(name, {}).items()}


def break_even_zeros(curve: Mapping[float, float], dense_us: float) -> float | None:
    """Return the fraction of zero blocks from which an operator is faster than the dense layer; None where it never is.

    Args:
        curve: its microseconds by density, as they were timed; between them they are interpolated.
        dense_us: of the dense layer.
    """
    densities = np.array(sorted(curve))
    # What has fewer blocks takes no longer: where a time says so, the machine was disturbed.
    times = np.minimum.accumulate(np.array([curve[density] for density in densities])[::-1])[::-1]
    if times[-1] < dense_us:
        return 0.0
    if times[0] >= dense_us:
        return None
    place = int(np.searchsorted(times, dense_us))  # the first time that is not below
    below, above = times[place - 1], times[place]
    share = (dense_us - below) / (above - below)
    return float(1 - (densities[place - 1] + share * (densities[place] - densities[place - 1])))
