"""The weight of an operator in another layout, or whole."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from lsp_deploy.plugins.block_sparse.bsl16 import from_bsl16, to_bsl16
from lsp_deploy.plugins.block_sparse.operator import BlockSparseLinear, Layout
from lsp_deploy.plugins.block_sparse.packing import Blocks, unpack

__all__ = ["dense_weight", "values_in_layout"]


def values_in_layout(operator: BlockSparseLinear, values: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """Return the values of `operator`, which are in its own layout, in `layout`.

    Raises:
        ValueError: an element type or block shape that bsl16.v1 does not have.
    """
    if operator.layout == layout:
        return values
    return to_bsl16(operator, values) if layout == "bsl16.v1" else from_bsl16(operator, values)


def dense_weight(operator: BlockSparseLinear, values: NDArray[Any]) -> NDArray[Any]:
    """Return the weight [K, N] in the element type of the values, which are in the operator's layout."""
    canonical = values_in_layout(operator, values, "canonical")
    return unpack(Blocks(canonical, operator.col_ptr, operator.k_idx), (operator.K, operator.N))
