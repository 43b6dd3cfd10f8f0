"""How the columns of a block-sparse weight are cut into panels, each a dense product with the rows of x it needs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lsp_deploy.plugins.block_sparse.operator import BlockSparseLinear

__all__ = ["Panel", "find_panels"]

# Costs on a row of x, in multiply-adds of ONNX Runtime's MatMul: of a panel as such, of each entry of x gathered for
# it, and of each entry of y concatenated. Fitted to DeiT-Small's layers at 197 rows (docs/operator.md has the figures).
_PANEL, _GATHER, _CONCAT = 2500, 24, 24


class Panel(NamedTuple):
    """Adjacent block columns that are multiplied together."""

    begin: int
    end: int
    """Block columns `begin` to `end` - 1."""
    rows: tuple[int, ...] | None
    """Block rows that any of its columns needs; None for all of x, which is then read without a copy."""


def find_panels(operator: BlockSparseLinear) -> list[Panel]:
    """Return the panels that cost least, by exact search over all cuts; a single one of all rows is the dense product.

    Neighbours that need the same rows share a panel, and so do neighbours whose union costs less than two panels.
    """
    mask = operator.mask
    columns = mask.shape[1]
    cost = [0.0] + [np.inf] * columns
    cut = [0] * (columns + 1)
    for begin in range(columns):
        # For every end at once: how many rows the columns from `begin` on need.
        needed = np.logical_or.accumulate(mask[:, begin:], axis=1).sum(axis=0)
        widths = np.arange(1, columns - begin + 1) * operator.block_n
        gathered = _PANEL + needed * operator.block_k * (_GATHER + widths)
        whole = _PANEL + operator.K * widths
        for end, price in enumerate(np.minimum(gathered, whole), begin + 1):
            if cost[begin] + price < cost[end]:
                cost[end], cut[end] = cost[begin] + price, begin
    if cost[columns] + _CONCAT * operator.N >= _PANEL + operator.K * operator.N:
        return [Panel(0, columns, None)]
    panels, end = [], columns
    while end:
        needed_rows = tuple(np.flatnonzero(mask[:, cut[end] : end].any(axis=1)).tolist())
        width = (end - cut[end]) * operator.block_n
        gathers = len(needed_rows) * operator.block_k * (_GATHER + width) < operator.K * width
        panels.append(Panel(cut[end], end, needed_rows if gathers else None))
        end = cut[end]
    return panels[::-1]
