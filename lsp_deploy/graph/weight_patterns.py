"""Which pattern the zeros of a weight follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK_SHAPES", "WeightPattern", "find_pattern"]

BLOCK_SHAPES = ((64, 64), (64, 32), (32, 64), (32, 32), (32, 16), (16, 32), (16, 16))
"""block_k × block_n, largest first."""

_BLOCKS_HOLD = 0.9  # of all zeros: the rest are weights that happen to be zero, or were rounded to it


@dataclass(frozen=True)
class WeightPattern:
    """Where a weight's zeros are."""

    zeros: float
    """Fraction of entries."""
    pattern: Literal["dense", "2:4", "block", "unstructured"]
    block: tuple[int, int] | None = None
    """block_k × block_n, where the pattern is block."""
    zero_blocks: float | None = None
    """Fraction of blocks that are all zero."""


def find_pattern(weight: NDArray[np.float32], *, dense_below: float = 0.05) -> WeightPattern:
    """Return the pattern of the zeros of W [K, N].

    2:4 means at most two of every four along K are not zero. Blocks are of the largest shape whose zero blocks hold
    nine tenths of all zeros.

    Args:
        weight: W [K, N].
        dense_below: fraction of zeros that needs no explanation, for rounding to integers makes some.
    """
    nonzero = weight != 0
    zeros = float(1 - nonzero.mean())
    if zeros < dense_below:
        return WeightPattern(zeros, "dense")
    K, N = weight.shape
    if K % 4 == 0 and bool((nonzero.reshape(K // 4, 4, N).sum(axis=1) <= 2).all()):
        return WeightPattern(zeros, "2:4")
    for block in BLOCK_SHAPES:
        empty, sizes = _empty_blocks(nonzero, block)
        if sizes[empty].sum() >= _BLOCKS_HOLD * zeros * weight.size:
            return WeightPattern(zeros, "block", block, float(empty.mean()))
    return WeightPattern(zeros, "unstructured")


def _empty_blocks(nonzero: NDArray[np.bool_], block: tuple[int, int]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return which blocks are all zero, and how many entries each has; blocks at ragged edges are smaller."""
    starts = [np.arange(0, size, step) for size, step in zip(nonzero.shape, block, strict=True)]
    lengths = [np.diff(start, append=size) for start, size in zip(starts, nonzero.shape, strict=True)]
    rows = np.logical_or.reduceat(nonzero, starts[0], axis=0)
    return ~np.logical_or.reduceat(rows, starts[1], axis=1), np.outer(*lengths)
