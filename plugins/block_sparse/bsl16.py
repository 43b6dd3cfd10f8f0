"""The layout bsl16.v1: a weight in the order in which tensor cores of NVIDIA GPUs read it.

The unit is the sub-block, 512 bytes: a slice of 32 bytes of K (16 rows of 16-bit entries, 32 of int8) by 16 columns, as
the B operands of two `mma.sync` instructions, 16 bytes for each of 32 threads. docs/operator.md has the index formulas.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.plugins.block_sparse.operator import BSL16_BLOCKS, BlockSparseLinear
from lsp_deploy.plugins.block_sparse.packing import Blocks, pack, unpack

__all__ = ["bsl16_shape", "from_bsl16", "sub_blocks", "to_bsl16"]

_SUB_BLOCK_BYTES, _SLICE_BYTES, _COLUMNS = 512, 32, 16


def to_bsl16(operator: BlockSparseLinear, values: NDArray[Any]) -> NDArray[Any]:
    """Return canonical values as sub-blocks, [sub-blocks, 512 / item size], in the same element type.

    Raises:
        ValueError: an element type or block shape that the layout does not have.
    """
    exists = sub_blocks(operator, values.dtype.itemsize)
    if not exists.any():
        return np.zeros(bsl16_shape(operator, values.dtype.itemsize), values.dtype)
    shape = exists.shape[1] * _SLICE_BYTES // values.dtype.itemsize, exists.shape[0] * _COLUMNS
    matrix = np.zeros(shape, values.dtype)
    rows, columns = _padded_shape(operator)
    matrix[:rows, :columns] = unpack(Blocks(values, operator.col_ptr, operator.k_idx), (rows, columns))
    return np.ascontiguousarray(_ordered(matrix)[exists])


def from_bsl16(operator: BlockSparseLinear, values: NDArray[Any]) -> NDArray[Any]:
    """Return sub-blocks as canonical values, [max(blocks, 1), block_k, block_n], in the same element type.

    Raises:
        ValueError: an element type or block shape that the layout does not have.
    """
    exists = sub_blocks(operator, values.dtype.itemsize)
    ordered = np.zeros((*exists.shape, values.shape[1]), values.dtype)
    ordered[exists] = values[: np.count_nonzero(exists)]
    rows, columns = _padded_shape(operator)
    survives = operator.mask.repeat(operator.block_k, axis=0).repeat(operator.block_n, axis=1)
    return pack(_plain(ordered)[:rows, :columns], survives, (operator.block_k, operator.block_n)).values


def sub_blocks(operator: BlockSparseLinear, itemsize: int) -> NDArray[np.bool_]:
    """Return which sub-blocks exist, bool [groups of 16 columns, slices of K]; they are stored in this order.

    Raises:
        ValueError: an item size or block shape that the layout does not have.
    """
    if itemsize not in (1, 2):
        raise ValueError("bsl16.v1 holds float16, bfloat16 or int8 only")
    if not {operator.block_k, operator.block_n} <= set(BSL16_BLOCKS):
        raise ValueError(f"bsl16.v1 has no blocks of {operator.block_k}x{operator.block_n}")
    tiles = operator.mask.repeat(operator.block_k // 16, axis=0).repeat(operator.block_n // 16, axis=1)
    # A slice of int8 is two tiles of 16 rows, of which one may have survived alone.
    per_slice = _SLICE_BYTES // itemsize // 16
    tiles = np.pad(tiles, ((0, -tiles.shape[0] % per_slice), (0, 0)))
    return np.asarray(tiles.reshape(-1, per_slice, tiles.shape[1]).any(axis=1)).T


def bsl16_shape(operator: BlockSparseLinear, itemsize: int) -> tuple[int, int]:
    """Return the shape of `values`; without any surviving block they are one sub-block of zeros.

    Raises:
        ValueError: an item size or block shape that the layout does not have.
    """
    return max(int(np.count_nonzero(sub_blocks(operator, itemsize))), 1), _SUB_BLOCK_BYTES // itemsize


def _ordered(matrix: NDArray[Any]) -> NDArray[Any]:
    """Return a matrix of whole sub-blocks as [groups, slices, entries in the order they are stored]."""
    # Rows are (slice, half, quad, entry), columns (group, eighth, tile, low); a thread is (eighth, low, quad), its four
    # registers are (tile, half), and a register holds the entries.
    entry = 4 // matrix.dtype.itemsize
    axes = matrix.reshape(-1, 2, 4, entry, matrix.shape[1] // _COLUMNS, 4, 2, 2)
    stored = axes.transpose(4, 0, 5, 7, 2, 6, 1, 3)
    return stored.reshape(*stored.shape[:2], -1)


def _plain(ordered: NDArray[Any]) -> NDArray[Any]:
    """Undo `_ordered`."""
    groups, slices, entries = ordered.shape
    axes = ordered.reshape(groups, slices, 4, 2, 4, 2, 2, 4 // ordered.dtype.itemsize)
    matrix = axes.transpose(1, 6, 4, 7, 0, 2, 5, 3)
    return matrix.reshape(slices * entries // _COLUMNS, groups * _COLUMNS)


def _padded_shape(operator: BlockSparseLinear) -> tuple[int, int]:
    return operator.grid[0] * operator.block_k, operator.grid[1] * operator.block_n
