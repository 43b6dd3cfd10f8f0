"""Made-up δ-curves for tests of the allocators."""

from __future__ import annotations

import numpy as np

from lsp_deploy.allocation.problem import LayerCurve

__all__ = ["layer_curve"]


def layer_curve(
    name: str, delta: object, *, M: int = 10, K: int | None = None, N: int = 4, block: tuple[int, int] = (4, 4)
) -> LayerCurve:
    """Return a layer with this curve; by default one column of whole blocks."""
    delta = np.asarray(delta, np.float64)
    K = block[0] * (len(delta) - 1) if K is None else K
    rows = np.minimum(block[0], K - np.arange(0, K, block[0]))
    columns = np.minimum(block[1], N - np.arange(0, N, block[1]))
    sizes = np.outer(rows, columns).ravel()
    order = np.random.default_rng(len(name)).permutation(len(sizes))
    return LayerCurve(name, "fc1", M, K, N, block, order, delta, sizes[order])
