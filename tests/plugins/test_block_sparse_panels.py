"""The cuts of the gather form are the cheapest that there are, where they are worth it."""

from itertools import combinations, pairwise

import numpy as np
from block_sparse_cases import case
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_deploy.plugins.block_sparse.panels import find_panels


def cost(operator, cuts):
    """The price of docs/operator.md for panels between these cuts."""
    total = 24 * operator.N if len(cuts) > 2 else 0
    for begin, end in pairwise(cuts):
        width = (end - begin) * operator.block_n
        rows = operator.mask[:, begin:end].any(axis=1).sum() * operator.block_k
        total += min(2500 + rows * (24 + width), 2500 + operator.K * width)
    return total


@settings(max_examples=40)
@given(
    columns=st.integers(1, 7),
    rows=st.sampled_from([2, 12, 40]),
    block=st.sampled_from([(16, 16), (32, 64), (64, 64)]),
    zeros=st.sampled_from([0.2, 0.7, 0.95, 1.0]),
    seed=st.integers(0, 99),
)
def test_no_other_cuts_cost_less(columns, rows, block, zeros, seed):
    operator = case(K=rows * block[0], N=columns * block[1], block=block, zeros=zeros, seed=seed).operator
    panels = find_panels(operator)
    assert [panel.begin for panel in panels] == [0, *(panel.end for panel in panels[:-1])]
    assert panels[-1].end == columns
    for panel in panels:
        needed = np.flatnonzero(operator.mask[:, panel.begin : panel.end].any(axis=1)).tolist()
        assert panel.rows is None or list(panel.rows) == needed
    every = [(0, *cuts, columns) for count in range(columns) for cuts in combinations(range(1, columns), count)]
    chosen = (0, *(panel.end for panel in panels))
    alone, least = cost(operator, (0, columns)), min(cost(operator, cuts) for cuts in every)
    assert cost(operator, chosen) == (least if least < 0.9 * alone else alone)
