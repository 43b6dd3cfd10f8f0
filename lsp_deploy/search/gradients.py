"""Block scores and token weights of the pruned network as it stands, in one pass over the calibration samples."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lsp_deploy.sensitivity.block_gradients import block_gradients, collect_block_gradients

if TYPE_CHECKING:
    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.search.network import Network
    from lsp_deploy.sensitivity.block_gradients import Objective
    from lsp_deploy.sensitivity.results import BlockGradients

__all__ = ["NetworkGradients", "network_gradients"]


@dataclass(frozen=True)
class NetworkGradients:
    """What one pass gathered, by layer name."""

    blocks: Mapping[str, BlockGradients]
    """Contributions of all blocks; read from files that may be gone: take `scores` where they suffice."""
    scores: Mapping[str, NDArray[np.float64]]
    """[blocks]: mean over samples of |A[n, b]|, the expected first-order change when block b goes, its sign ignored."""
    token_weights: Mapping[str, NDArray[np.float64]]
    """[tokens]: mean over samples of the squared gradient at the layer's output, relative to the sample's mean."""


def network_gradients(
    network: Network, objective: Objective, block: tuple[int, int], folder: Path | None = None
) -> NetworkGradients:
    """Differentiate the pruned network with its present weights.

    Args:
        network: whose samples are all used.
        objective: what is differentiated.
        block: (block_k, block_n) on W [K, N].
        folder: where A is kept and found again; a temporary one if None.
    """
    energies: dict[str, torch.Tensor] = {}

    def observe(layer: LinearLayer, gradients: torch.Tensor) -> None:
        energy = gradients.double().square().sum(dim=2)
        relative = (energy / energy.mean(dim=1, keepdim=True).clamp_min(1e-300)).sum(dim=0).cpu()
        known = energies.get(layer.name)
        energies[layer.name] = relative if known is None else known + relative

    with tempfile.TemporaryDirectory() as temporary:
        layers = network.current_layers()
        files = collect_block_gradients(
            network.pruned,
            layers,
            network.dataset,
            objective,
            block=block,
            batch_size=network.batch_size,
            folder=folder or Path(temporary),
            fixed_batch=network.fixed_batch,
            layouts=network.layouts,
            device=network.device,
            observe=observe,
        )
        blocks = block_gradients(files, layers, block)
        scores = {name: mean_magnitude(one.contributions) for name, one in blocks.items()}
    return NetworkGradients(
        blocks,
        scores,
        {name: energy.numpy() / len(network.dataset) for name, energy in energies.items()},
    )


def mean_magnitude(contributions: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the mean over samples of |A[n, b]|, [blocks] float64."""
    total = np.zeros(contributions.shape[1])
    for start in range(0, len(contributions), 64):
        total += np.abs(contributions[start : start + 64]).sum(axis=0, dtype=np.float64)
    return total / len(contributions)
