"""Exact ridge solves under a mask."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from lsp_deploy.reconstruction.moments import Moments

__all__ = ["solve_ridge"]

_BATCH_BYTES = 1 << 27  # of the matrices that are factored at a time


def solve_ridge(moments: Moments, prior: torch.Tensor, mask: NDArray[np.bool_], strength: float) -> torch.Tensor:
    """Return the weights that fit the moments best where the mask lets them live, pulled towards `prior`.

    Each column n has its support I: the rows that its mask keeps, and the bias. It becomes
    θ_I = (XX_II + ρ I)⁻¹ (XY_I + ρ prior_I), ρ = strength · mean diagonal of XX; zero outside. Columns of one support,
    as those of a block column are, share one Cholesky factor.

    Args:
        moments: of the layer's inputs and targets.
        prior: [K (+ 1), N] float64, the weights before, the bias in the last row.
        mask: bool [K, N], True survives.
        strength: of the pull, in mean input energies.

    Returns:
        [K (+ 1), N] float64.
    """
    if moments.bias:
        mask = np.concatenate([mask, np.ones((1, mask.shape[1]), bool)])
    ridge = strength * moments.input_energy
    result = torch.zeros_like(prior)
    for support, columns in _supports(mask):
        rows = torch.from_numpy(support).to(prior.device)  # [groups, size]
        if rows.shape[1] == 0:
            continue
        gram = moments.xx[rows.unsqueeze(2), rows.unsqueeze(1)]
        gram.diagonal(dim1=1, dim2=2).add_(ridge)
        picked = torch.from_numpy(columns).to(prior.device)  # [groups, width]
        at = rows.unsqueeze(2), picked.unsqueeze(1)
        result[at] = torch.cholesky_solve(moments.xy[at] + ridge * prior[at], torch.linalg.cholesky(gram))
    return result


def _supports(mask: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield batches of column groups with one support each: rows [groups, size] and columns [groups, width]."""
    packed = np.packbits(mask, axis=0).T
    _, group_of = np.unique(packed, axis=0, return_inverse=True)
    group_of = group_of.reshape(-1)
    order = np.argsort(group_of, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(group_of))[:-1])
    alike: dict[tuple[int, int], list[NDArray[np.int64]]] = {}
    for columns in groups:
        alike.setdefault((int(mask[:, columns[0]].sum()), len(columns)), []).append(columns)
    for (size, _), members in sorted(alike.items()):
        at_a_time = max(1, _BATCH_BYTES // max(1, size * size * 8))
        for start in range(0, len(members), at_a_time):
            some = members[start : start + at_a_time]
            yield np.stack([np.flatnonzero(mask[:, columns[0]]) for columns in some]), np.stack(some)
