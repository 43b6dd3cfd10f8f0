"""What a graph value holds, where that is constant."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["constant_array", "constant_scalar"]


def constant_array(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the array that a constant value holds; None for any other value.

    Initializers are constant; the output of a Constant node is once it is lifted to an initializer. 16-bit, 8-bit and
    4-bit types come as ml_dtypes.
    """
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    array: NDArray[Any] = value.const_value.numpy()
    return array


def constant_scalar(value: ir.Value | None) -> float | None:
    """Return the number that a constant of one element holds; None for any other value."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    array = constant_array(value)
    return None if array is None or value.const_value.dtype == ir.DataType.STRING else float(array.item())
