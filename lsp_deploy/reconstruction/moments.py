"""The sums over tokens that a layer's least-squares fit needs, and the error of any weights under them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Moments"]


class Moments:
    """Σ w x xᵀ, Σ w x yᵀ and Σ w yᵀy over weighted tokens, in float64; x has a column of ones where there is a bias."""

    def __init__(self, K: int, N: int, *, bias: bool, device: str = "cpu") -> None:
        """Start at zero for inputs of K and targets of N features."""
        size = K + bias
        self.bias = bias
        self.xx = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.xy = torch.zeros(size, N, dtype=torch.float64, device=device)
        self.yy_by_column = torch.zeros(N, dtype=torch.float64, device=device)

    @property
    def yy(self) -> float:
        """Σ w ‖y‖²; 0 where nothing was added."""
        return float(self.yy_by_column.sum())

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        """Add tokens: x [tokens, K], y [tokens, N], weight [tokens] ≥ 0; float32."""
        root = weight.sqrt().unsqueeze(1)
        if self.bias:
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x, y = x * root, y * root
        # A batch is summed in float32, batches in float64.
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy_by_column += y.double().square().sum(dim=0)

    @property
    def input_energy(self) -> float:
        """The mean of Σ w x² over the K input features: the unit that ridges are given in; 1 where all x are zero."""
        features = len(self.xx) - self.bias
        # Behind a layer that is gone nothing arrives: any ridge keeps the weights as they are, none has no solution.
        return float(self.xx.diagonal()[:features].mean()) or 1.0

    def error(self, theta: torch.Tensor) -> float:
        """Return Σ w ‖x θ - y‖² / Σ w ‖y‖² of weights θ [K (+ 1), N] (the bias in the last row), float64."""
        if self.yy == 0:
            return 0.0
        squared = (theta * (self.xx @ theta - 2 * self.xy)).sum() + self.yy
        return max(float(squared), 0.0) / self.yy

    def plus(self, other: Moments) -> Moments:
        """Return the sums over both sets of tokens."""
        both = Moments(len(self.xx) - self.bias, self.xy.shape[1], bias=self.bias, device=str(self.xx.device))
        both.xx, both.xy = self.xx + other.xx, self.xy + other.xy
        both.yy_by_column = self.yy_by_column + other.yy_by_column
        return both

    def columns(self, chosen: NDArray[np.int64]) -> Moments:
        """Return the sums for some of the targets' features alone."""
        some = Moments(len(self.xx) - self.bias, len(chosen), bias=self.bias, device=str(self.xx.device))
        at = torch.from_numpy(chosen).to(self.xx.device)
        some.xx, some.xy, some.yy_by_column = self.xx, self.xy[:, at], self.yy_by_column[at]
        return some
