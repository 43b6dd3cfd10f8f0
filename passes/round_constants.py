"""float32 constants rounded to 16 bit, checked for what that loses."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.errors import UserError

__all__ = ["round_constant"]

# Readers to which a large number only says "nothing": attention masks, and bounds that are never met.
_MASKING = frozenset({"Add", "Clip", "Concat", "Expand", "Max", "Min", "Mul", "Where"})
_BOUNDING = frozenset({"Clip", "Max", "Min"})
_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_MAX_SCALE_ERROR = 0.01


def round_constant(
    array: NDArray[np.float32], dtype: ir.DataType, name: str | None, uses: Collection[tuple[ir.Node, int]]
) -> NDArray[Any]:
    """Return `array` rounded to `dtype`, FLOAT16 or BFLOAT16; infinities stay.

    Finite values outside the range become the largest finite value where they are attention masks or bounds.

    Args:
        array: the constant's values.
        dtype: the type to round to.
        name: of the constant, for errors.
        uses: its readers, as (node, input index).

    Raises:
        UserError: any other value is outside the range, or a scale of Q/DQ moves by more than 1 %.
    """
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype.numpy())
    exact = rounded.astype(np.float32)
    outside = np.isfinite(array) & ~np.isfinite(exact)
    if outside.any():
        readers = {node.op_type for node, _ in uses}
        bounding, masking = readers <= _BOUNDING, readers <= _MASKING
        if not (bounding or (masking and (array[outside] < 0).all())):
            raise UserError(
                f"constant {name} holds {float(array[outside].flat[0]):g}, which {_label(dtype)} cannot hold; "
                "compress with --precision bf16 or fp32"
            )
        limit = ml_dtypes.finfo(dtype.numpy()).max  # type: ignore[no-untyped-call]
        rounded = np.where(outside, np.copysign(limit, array).astype(dtype.numpy()), rounded)
    layer = next((node.name for node, index in uses if node.op_type in _QDQ and index == 1), None)
    if layer is not None and (np.abs(exact - array) > _MAX_SCALE_ERROR * np.abs(array)).any():
        worst = float(array.flat[np.argmax(np.abs(exact - array) / np.abs(array))])
        raise UserError(
            f"scale {name} of {layer} is {worst:g}, which {_label(dtype)} cannot hold to 1 %; "
            "leave that layer out of int8 or take another compute type"
        )
    return rounded


def _label(dtype: ir.DataType) -> str:
    return "fp16" if dtype == ir.DataType.FLOAT16 else "bf16"
