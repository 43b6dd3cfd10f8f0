"""Masks: which weights survive, given a score for each and a pattern."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["activation_score", "block_mask", "block_sums", "magnitude_score", "two_four_mask"]


def magnitude_score(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Score each weight [K, N] by |W|."""
    return np.abs(weight)


def activation_score(weight: NDArray[np.float32], channel_norm: NDArray[np.float32]) -> NDArray[np.float32]:
    """Score each weight [K, N] by |W|·‖x‖, `channel_norm` [K] being the root mean square of its input channel."""
    return np.asarray(np.abs(weight) * channel_norm[:, None], np.float32)


def two_four_mask(score: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Keep the two highest of every four scores along K.

    Args:
        score: [K, N], K a multiple of 4.

    Returns:
        bool [K, N], exactly two of four True along K; of equal scores the lower index survives.
    """
    K, N = score.shape
    groups = score.reshape(K // 4, 4, N)
    order = np.argsort(-groups, axis=1, kind="stable")
    mask = np.zeros_like(groups, bool)
    np.put_along_axis(mask, order[:, :2], True, axis=1)
    return mask.reshape(K, N)


def block_mask(score: NDArray[np.float32], block: tuple[int, int], keep: float) -> NDArray[np.bool_]:
    """Keep the blocks with the highest mean score.

    Args:
        score: [K, N]; ragged edges form smaller blocks.
        block: (block_k, block_n).
        keep: fraction of blocks to keep at most; at least one survives.

    Returns:
        bool [K, N], constant over each block.
    """
    block_k, block_n = block
    K, N = score.shape
    means = block_sums(score, block) / block_sums(np.ones_like(score), block)
    survivors = max(1, int(means.size * keep + 1e-6))
    kept = np.zeros(means.size, bool)
    kept[np.argsort(-means, axis=None, kind="stable")[:survivors]] = True
    return np.repeat(np.repeat(kept.reshape(means.shape), block_k, axis=0), block_n, axis=1)[:K, :N]


def block_sums(values: NDArray[np.float32], block: tuple[int, int]) -> NDArray[np.float64]:
    """Sum `values` [K, N] over each block; returns float64 [ceil(K / block_k), ceil(N / block_n)]."""
    block_k, block_n = block
    K, N = values.shape
    rows = np.add.reduceat(values, np.arange(0, K, block_k), axis=0, dtype=np.float64)
    return np.asarray(np.add.reduceat(rows, np.arange(0, N, block_n), axis=1))
