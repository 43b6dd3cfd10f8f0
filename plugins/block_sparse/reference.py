"""What lsp::BlockSparseLinear computes, in numpy: slow, exact, and what every kernel is tested against."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.plugins.block_sparse.operator import Activation, BlockSparseLinear
from lsp_deploy.plugins.block_sparse.weights import dense_weight

__all__ = ["activate", "block_sparse_linear", "quantize"]


def block_sparse_linear(
    operator: BlockSparseLinear,
    x: NDArray[Any],
    values: NDArray[Any],
    bias: NDArray[np.float32],
    scale: NDArray[np.float32],
    residual: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return y [..., N] in the operator's out_type.

    Products are summed in float64 where the values are floats, and exactly where they are int8; what follows the sum
    is float64. Only the roundings that define the operator are made: of x to the type of the values, of y to out_type.

    Args:
        operator: the attributes.
        x: [..., K], float, or int8 where the values are.
        values: float32, float16, bfloat16 or int8, in the operator's layout.
        bias: [N].
        scale: [N]; read where the values are int8.
        residual: [..., N], or None.
    """
    weight = dense_weight(operator, values)
    if weight.dtype == np.int8:
        q = x if x.dtype == np.int8 else quantize(x, operator.x_scale, operator.x_offset)
        exact = q.astype(np.int64) @ weight.astype(np.int64)
        product = exact.astype(np.float64) * scale.astype(np.float64)
    else:
        product = x.astype(weight.dtype).astype(np.float64) @ weight.astype(np.float64)
    y = activate(product + bias.astype(np.float64), operator.activation)
    if residual is not None:
        y = y + residual.astype(np.float64)
    if operator.out_type == ir.DataType.INT8:
        return quantize(y, operator.out_scale, operator.out_offset)
    return y.astype(np.float32).astype(operator.out_type.numpy())


def quantize(x: NDArray[Any], scale: float, offset: float) -> NDArray[np.int8]:
    """Return clip(rint((x - offset) · (1 / scale)), -128, 127), computed in float32 as the operator defines it."""
    inverse = np.float32(1) / np.float32(scale)
    steps = np.rint((x.astype(np.float32) - np.float32(offset)) * inverse)
    return np.asarray(np.clip(steps, -128, 127), np.int8)


def activate(y: NDArray[np.float64], activation: Activation) -> NDArray[np.float64]:
    """Apply an activation in float64."""
    if activation == "relu":
        return np.asarray(np.maximum(y, 0))
    if activation == "gelu":
        erf = np.vectorize(math.erf, otypes=[np.float64])
        return np.asarray(0.5 * y * (1 + erf(y / math.sqrt(2))))
    if activation == "gelu_tanh":
        return np.asarray(0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))))
    return y
