"""Which two of four weights survive where the others are fitted anew: SparseGPT's mask (Frantar and Alistarh, 2023)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["two_four_support"]

_ROWS = 128  # rows whose updates are kept back until all of them are decided


def two_four_support(weight: torch.Tensor, hessian: torch.Tensor) -> NDArray[np.bool_]:
    """Return the 2:4 mask along K that costs least under a quadratic error, later rows making up for earlier ones.

    Rows are decided in fours, from the first on. Of each four the two with the smallest w² / [H⁻¹]_kk² go, and the rows
    below take over what they did, as optimal brain surgery prescribes.

    Args:
        weight: [K, N] float64, the minimum of the error without a mask; K a multiple of 4.
        hessian: [K, K] float64, positive definite.

    Returns:
        bool [K, N], two of four True along K.
    """
    K, N = weight.shape
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    w = weight.T.clone()  # [N, K]: a column of the layer is a row here
    mask = torch.ones_like(w, dtype=torch.bool)
    for start in range(0, K, _ROWS):
        end = min(start + _ROWS, K)
        errors = torch.zeros(N, end - start, dtype=w.dtype, device=w.device)
        for k in range(start, end):
            if k % 4 == 0:
                score = (w[:, k : k + 4] / factor.diagonal()[k : k + 4]).square()
                lowest = score.argsort(dim=1, stable=True)[:, :2]
                mask[:, k : k + 4] = mask[:, k : k + 4].scatter(1, lowest, False)
            error = torch.where(mask[:, k], 0.0, w[:, k]) / factor[k, k]
            w[:, k:end] -= error.unsqueeze(1) * factor[k, k:end]
            errors[:, k - start] = error
        w[:, end:] -= errors @ factor[start:end, end:]
    return np.ascontiguousarray(mask.T.cpu().numpy())
