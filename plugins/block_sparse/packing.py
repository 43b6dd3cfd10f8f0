"""A weight [K, N] as its surviving blocks, and back: the canonical layout."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Blocks", "pack", "unpack"]


class Blocks(NamedTuple):
    """The surviving blocks of a weight, block column major, block rows ascending."""

    values: NDArray[Any]
    """[max(blocks, 1), block_k, block_n], padded with zeros at the edges; one block of zeros where none survives."""
    col_ptr: tuple[int, ...]
    """[block columns + 1]"""
    k_idx: tuple[int, ...]
    """[blocks]"""


def pack(weight: NDArray[Any], mask: NDArray[np.bool_] | None, block_shape: tuple[int, int]) -> Blocks:
    """Return the surviving blocks of `weight`, in its element type.

    Args:
        weight: [K, N].
        mask: bool [K, N], False where the weight counts as zero; None for the weight as it is. A block survives if any
            of its entries does: with a mask those it keeps, else those that are not zero.
        block_shape: block_k, block_n; K and N need not be multiples.
    """
    kept = weight if mask is None else np.where(mask, weight, np.zeros((), weight.dtype))
    tiles = _tiles(kept, block_shape)
    survives = (tiles if mask is None else _tiles(mask, block_shape)).astype(bool).any(axis=(2, 3))
    n_idx, k_idx = np.nonzero(survives.T)
    values = tiles[k_idx, n_idx] if k_idx.size else np.zeros((1, *block_shape), weight.dtype)
    col_ptr = np.concatenate([[0], np.cumsum(survives.sum(axis=0))])
    return Blocks(np.ascontiguousarray(values), tuple(col_ptr.tolist()), tuple(k_idx.tolist()))


def unpack(blocks: Blocks, shape: tuple[int, int]) -> NDArray[Any]:
    """Return the weight [K, N] of `shape` that holds these blocks and zeros elsewhere."""
    block_k, block_n = blocks.values.shape[1:]
    tiles = np.zeros((-(-shape[0] // block_k), len(blocks.col_ptr) - 1, block_k, block_n), blocks.values.dtype)
    n_idx = np.repeat(np.arange(tiles.shape[1]), np.diff(blocks.col_ptr))
    tiles[np.asarray(blocks.k_idx, np.int64), n_idx] = blocks.values[: n_idx.size]
    padded = tiles.transpose(0, 2, 1, 3).reshape(tiles.shape[0] * block_k, tiles.shape[1] * block_n)
    return np.ascontiguousarray(padded[: shape[0], : shape[1]])


def _tiles(matrix: NDArray[Any], block_shape: tuple[int, int]) -> NDArray[Any]:
    """Return `matrix`, zero-padded to whole blocks, as [block rows, block columns, block_k, block_n]."""
    block_k, block_n = block_shape
    rows, columns = -(-matrix.shape[0] // block_k), -(-matrix.shape[1] // block_n)
    padded = np.zeros((rows * block_k, columns * block_n), matrix.dtype)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded.reshape(rows, block_k, columns, block_n).transpose(0, 2, 1, 3)
