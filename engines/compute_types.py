"""What a node computes in, told from the element types of its operands."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["compute_type"]

# Of operands of several types the first of these is what is computed in: narrower ones are converted to it.
_WIDEST_FIRST = ("fp64", "fp32", "bf16", "fp16", "fp8", "fp4", "int8", "uint8", "int4", "uint4")


def compute_type(operand_types: Iterable[str]) -> str:
    """Return the type that a node with operands of these types computes in; "none" where there is no operand."""
    given = list(operand_types)
    return next((name for name in _WIDEST_FIRST if name in given), given[0] if given else "none")
