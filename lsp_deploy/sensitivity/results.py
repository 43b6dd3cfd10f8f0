"""What the analysis of a model gives: for every layer an order of its blocks and what removing them does.

Nothing here needs torch: results are read where it is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.sensitivity.curves import delta_curve

__all__ = ["BlockGradients", "LayerSensitivity", "Sensitivity"]


@dataclass(frozen=True)
class BlockGradients:
    """What one layer's blocks contribute; blocks are numbered row-major over [ceil(K/block_k), ceil(N/block_n)].

    For sample n and block b, A[n, b] = Σ_{ij ∈ b} g_n,ij · W_ij with g_n the gradient of that sample's objective.
    """

    contributions: NDArray[np.float32]
    """A [samples, blocks]; mapped from disk."""
    taylor: NDArray[np.float64]
    """[blocks]: mean over samples and over the entries that a block has of |W ∘ ∇_W f| (LSP section 3.1)."""
    square_norms: NDArray[np.float64]
    """[blocks]: ‖W_b‖²."""

    @cached_property
    def fisher(self) -> NDArray[np.float64]:
        """[blocks]: mean over samples of A[n, b]², twice the second-order damage of removing that block alone."""
        total = np.zeros(self.contributions.shape[1])
        for start in range(0, len(self.contributions), 64):
            total += np.square(self.contributions[start : start + 64], dtype=np.float64).sum(axis=0)
        return total / len(self.contributions)


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer's order of blocks and its δ-curve."""

    name: str
    """Of the node."""
    K: int
    N: int
    block: tuple[int, int]
    """(block_k, block_n) on W [K, N]."""
    gradients: BlockGradients
    kappa: float
    """κ of the empirical Fisher, the same for all layers."""

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """[blocks]: block indices, least important first by Taylor score (LSP section 3.1), ties by index."""
        return np.argsort(self.gradients.taylor, kind="stable").astype(np.int64)

    @cached_property
    def delta(self) -> NDArray[np.float64]:
        """[blocks + 1]: δ of Eq. 11 after removing the first j blocks of `order`, raw: neither smoothed nor squared."""
        return self.curve()

    def curve(self, order: NDArray[np.integer] | None = None, *, first_order: bool = True) -> NDArray[np.float64]:
        """Return the curve for another order of blocks, or without the first-order term g·ΔW.

        Args:
            order: block indices, the first to go first; the Taylor order if None.
            first_order: whether g·ΔW is part of it; without it the curve never falls below 0.

        Returns:
            float64 [len(order) + 1], starting at 0.
        """
        return delta_curve(
            self.gradients.contributions,
            self.gradients.square_norms,
            self.order if order is None else order,
            kappa=self.kappa,
            first_order=first_order,
        )


@dataclass(frozen=True)
class Sensitivity:
    """The analysis of a model."""

    layers: Mapping[str, LayerSensitivity]
    """By layer name, in graph order."""
    block: tuple[int, int]
    objective: str
    samples: int
    kappa: float
    seed: int
