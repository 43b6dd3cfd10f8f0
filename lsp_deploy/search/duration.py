"""How long reconstruction is going to take on this machine, told beforehand: an estimate."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

from lsp_deploy.reconstruction.network import TRIED_COLUMNS, TRIED_RIDGES

if TYPE_CHECKING:
    from lsp_deploy.linear_layers import LinearLayer

__all__ = ["in_words", "reconstruction_seconds"]

_SIZE = 768  # of the trial products: small enough to be done in a moment


def reconstruction_seconds(
    layers: Sequence[LinearLayer],
    two_four: Collection[str],
    *,
    samples: int,
    batch: int,
    pass_seconds: float,
    device: str = "cpu",
) -> float:
    """Estimate the seconds of one reconstruction from its arithmetic and how fast this machine does such arithmetic.

    Args:
        layers: those that are solved.
        two_four: names of those with a 2:4 mask, which need one solve a column; others share solves in block columns.
        samples: calibration samples.
        batch: the batch that the layers' M is counted at.
        pass_seconds: what a pass forward and backward over the samples took.
        device: torch device.
    """
    tokens = sum(2.0 * layer.M / batch * samples * layer.K * (layer.K + layer.N) for layer in layers)
    solves = 0.0
    for layer in layers:
        if layer.name in two_four:
            columns = 2.0 * layer.N + min(layer.N, TRIED_COLUMNS) * TRIED_RIDGES
            solves += columns * (layer.K / 2) ** 3 / 3 + 2 * layer.K**3
        else:
            columns = 2 * layer.N / 32 + TRIED_RIDGES
            solves += columns * layer.K**3 / 3
    product, factor = _rates(device)
    return 0.7 * pass_seconds + tokens / product + solves / factor


def in_words(seconds: float) -> str:
    """Return a duration as a person says it."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _rates(device: str) -> tuple[float, float]:
    """Return FLOP/s of float32 products, and of float64 Cholesky factors, of a size as layers have."""
    matrix = torch.rand(_SIZE, _SIZE, device=device)
    gram = (matrix @ matrix.T).double() + torch.eye(_SIZE, device=device, dtype=torch.float64)
    rates = []
    for work, flops in ((lambda: matrix @ matrix, 2.0 * _SIZE**3), (lambda: torch.linalg.cholesky(gram), _SIZE**3 / 3)):
        work()
        start = time.perf_counter()
        for _ in range(3):
            float(work()[0, 0])  # waits for the device
        rates.append(3 * flops / (time.perf_counter() - start))
    return rates[0], rates[1]
