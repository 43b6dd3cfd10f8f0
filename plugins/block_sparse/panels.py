"""How the columns of a block-sparse weight are cut into panels, each a dense product with the rows of x it needs."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.plugins.block_sparse.operator import BlockSparseLinear

__all__ = ["Panel", "find_panels"]

# Costs on a row of x, in multiply-adds of ONNX Runtime's MatMul: of a panel as such, of each entry of x gathered for
# it, and of each entry of y concatenated. Fitted to DeiT-Small's layers at 197 rows (docs/operator.md has the figures).
_PANEL, _GATHER, _CONCAT = 2500, 24, 24
# Cuts have to promise at least a tenth less: a gain as small as the fit is good is not worth the nodes.
_WORTH = 0.9


class Panel(NamedTuple):
    """Adjacent block columns that are multiplied together."""

    begin: int
    end: int
    """Block columns `begin` to `end` - 1."""
    rows: tuple[int, ...] | None
    """Block rows that any of its columns needs; None for all of x, which is then read without a copy."""


def find_panels(operator: BlockSparseLinear) -> list[Panel]:
    """Return the panels that cost least, by exact search over all cuts; a single one of all rows is the dense product.

    Neighbours that need the same rows share a panel, and so do neighbours whose union costs less than two panels. There
    is one panel alone unless more of them cost a tenth less.
    """
    columns = operator.grid[1]
    cost, cut = [0.0] + [math.inf] * columns, [0] * (columns + 1)
    for begin in range(columns):
        gathered, whole = _costs_from(operator, begin)
        for end, price in enumerate(np.minimum(gathered, whole).tolist(), begin + 1):
            if cost[begin] + price < cost[end]:
                cost[end], cut[end] = cost[begin] + price, begin
    alone = min(costs[-1] for costs in _costs_from(operator, 0))
    if cost[columns] + _CONCAT * operator.N >= _WORTH * alone:
        return [_panel(operator, 0, columns)]
    panels, end = [], columns
    while end:
        panels.append(_panel(operator, cut[end], end))
        end = cut[end]
    return panels[::-1]


def _costs_from(operator: BlockSparseLinear, begin: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return what panels from `begin` to every later end cost: with the rows they need gathered, and with all of x."""
    needed = np.logical_or.accumulate(operator.mask[:, begin:], axis=1).sum(axis=0)
    widths = np.arange(1, needed.size + 1) * operator.block_n
    return _PANEL + needed * operator.block_k * (_GATHER + widths), _PANEL + operator.K * widths


def _panel(operator: BlockSparseLinear, begin: int, end: int) -> Panel:
    gathered, whole = (costs[end - begin - 1] for costs in _costs_from(operator, begin))
    if whole <= gathered:
        return Panel(begin, end, None)
    needed = operator.mask[:, begin:end].any(axis=1)
    return Panel(begin, end, tuple(np.flatnonzero(needed).tolist()))
