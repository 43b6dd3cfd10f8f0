"""What lsp::Attention computes, in numpy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lsp_deploy.plugins.attention.operator import Attention

__all__ = ["attention"]


def attention(
    operator: Attention, *operands: NDArray[np.float32], bias: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return softmax(scale · q kᵀ + bias) v for each head, float32 [B, S, H·D], summed in float64.

    A row of scores that is -inf throughout gives NaN, as ONNX's Softmax does.

    Args:
        operator: the attributes.
        *operands: qkv float32 [B, S, 3·H·D], or q [B, S, H·D], k and v [B, T, H·D].
        bias: float32 [P, H or 1, S, T]; B is a multiple of P, along which the bias repeats.
    """
    parts = np.split(operands[0], 3, axis=-1) if operator.packed_qkv else operands
    q, k, v = (_heads(_rounded(operator, x), operator.num_heads) for x in parts)
    scores = operator.scale * (q @ k.swapaxes(-1, -2))
    if bias is not None:
        scores += np.tile(bias, (len(scores) // len(bias), 1, 1, 1))
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = (_rounded(operator, weights) @ v) / weights.sum(-1, keepdims=True)
    return np.ascontiguousarray(y.swapaxes(1, 2)).reshape(y.shape[0], y.shape[2], -1).astype(np.float32)


def _heads(x: NDArray[np.float64], heads: int) -> NDArray[np.float64]:
    """Return [B, S, H·D] as [B, H, S, D]."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _rounded(operator: Attention, x: NDArray[Any]) -> NDArray[np.float64]:
    if operator.compute == "bfloat16":
        x = x.astype(ml_dtypes.bfloat16)
    return x.astype(np.float64)
