"""Where operators register themselves, and the types they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["HOST_INPUTS", "OPERATORS", "Attributes", "Operator", "Result", "ints", "onnx_dtype", "operator"]

Attributes = Mapping[str, Any]
Result = torch.Tensor | Sequence[torch.Tensor]
Operator = Callable[..., Result]
"""Called as operator(attributes, opset, *inputs), None for an input that is left out."""

OPERATORS: dict[tuple[str, str], Operator] = {}

HOST_INPUTS: dict[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "Expand": (1,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceLogSumExp": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceSum": (1,),
    "ReduceSumSquare": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
}
"""Inputs that say where and how much, by operator: their numbers are read on the CPU."""

_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


def operator(*names: str, domain: str = "") -> Callable[[Operator], Operator]:
    """Register a function as the implementation of the named ONNX operators."""

    def register(function: Operator) -> Operator:
        for name in names:
            OPERATORS[domain, name] = function
        return function

    return register


def onnx_dtype(number: int) -> torch.dtype:
    """Return the torch type of an ONNX element type number.

    Raises:
        ValueError: torch has no such type.
    """
    try:
        return _DTYPES[int(number)]
    except KeyError:
        raise ValueError(f"element type {number} has no torch counterpart") from None


def ints(tensor: torch.Tensor | None) -> list[int]:
    """Return the values of an integer tensor, as shapes, axes and pads are given."""
    return [] if tensor is None else [int(value) for value in tensor.reshape(-1).tolist()]
