"""Allocation over blocks: from scores or δ-curves and what is already gone to which blocks go next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.allocation.problem import LayerCurve

if TYPE_CHECKING:
    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.plan import LayerPlan

__all__ = ["additive_curve", "block_mask_of", "block_sizes", "layer_curve"]


def block_sizes(layer: LinearLayer | LayerPlan, block: tuple[int, int]) -> NDArray[np.int64]:
    """Return the entries of each block of a layer's W [K, N], row-major, [blocks]; edges make some smaller."""
    rows = np.diff(np.append(np.arange(0, layer.K, block[0]), layer.K))
    columns = np.diff(np.append(np.arange(0, layer.N, block[1]), layer.N))
    return np.outer(rows, columns).reshape(-1).astype(np.int64)


def layer_curve(
    layer: LinearLayer, block: tuple[int, int], order: NDArray[np.int64], delta: NDArray[np.float64]
) -> LayerCurve:
    """Return what an allocator is given of a layer: the order in which its blocks go, and what that does."""
    sizes = block_sizes(layer, block)[order]
    return LayerCurve(layer.name, layer.role, layer.M, layer.K, layer.N, block, order, delta, sizes)


def additive_curve(
    layer: LinearLayer, block: tuple[int, int], scores: NDArray[np.float64], gone: NDArray[np.bool_]
) -> LayerCurve:
    """Return the curve on which every block does the damage of its own score; blocks that are gone do none.

    Args:
        layer: the layer.
        block: (block_k, block_n).
        scores: [blocks], not negative.
        gone: bool [blocks], True where a block was removed before: those come first.
    """
    damage = np.where(gone, 0.0, scores)
    # Blocks that are gone stand first even where others do no damage either.
    order = np.lexsort((np.arange(len(damage)), damage, ~gone)).astype(np.int64)
    return layer_curve(layer, block, order, np.concatenate([[0.0], np.cumsum(damage[order])]))


def block_mask_of(layer: LinearLayer, block: tuple[int, int], gone: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the mask of a layer, bool [K, N], True where the weight survives, from which blocks are gone [blocks]."""
    grid = ~gone.reshape(-(-layer.K // block[0]), -(-layer.N // block[1]))
    return np.repeat(np.repeat(grid, block[0], axis=0), block[1], axis=1)[: layer.K, : layer.N]


def removed_blocks(curves: Sequence[LayerCurve], removed: Mapping[str, int]) -> dict[str, NDArray[np.bool_]]:
    """Return by layer name which blocks are gone, bool [blocks], when the first of each order are."""
    gone = {}
    for curve in curves:
        flags = np.zeros(curve.blocks, bool)
        flags[curve.order[: removed[curve.name]]] = True
        gone[curve.name] = flags
    return gone
