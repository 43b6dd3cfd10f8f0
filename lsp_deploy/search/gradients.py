"""Block scores and token weights of the pruned network as it stands, in one pass over the calibration samples."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lsp_deploy import console
from lsp_deploy.cache import cache_folder
from lsp_deploy.sensitivity.block_gradients import block_gradients, collect_block_gradients
from lsp_deploy.sensitivity.feeds import real_samples, tensor_feeds
from lsp_deploy.sensitivity.layer_rows import sample_rows

if TYPE_CHECKING:
    from lsp_deploy.autodiff.module import LayerHook
    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.search.network import Network
    from lsp_deploy.sensitivity.block_gradients import Objective, Observer
    from lsp_deploy.sensitivity.results import BlockGradients

__all__ = [
    "NetworkGradients",
    "TokenEnergies",
    "mean_magnitude",
    "network_gradients",
    "removal_damages",
    "token_weights",
]


@dataclass(frozen=True)
class NetworkGradients:
    """What one pass gathered, by layer name."""

    blocks: Mapping[str, BlockGradients]
    """Contributions of all blocks; empty where they were not asked for."""
    scores: Mapping[str, NDArray[np.float64]]
    """[blocks]: `mean_magnitude` of the contributions."""
    token_weights: Mapping[str, NDArray[np.float64]]
    """[tokens]: mean over samples of the squared gradient at the layer's output, relative to the sample's mean."""


def network_gradients(
    network: Network, objective: Objective, block: tuple[int, int], *, contributions: bool = False
) -> NetworkGradients:
    """Differentiate the pruned network with its present weights, on all samples.

    Args:
        network: whose weights and samples.
        objective: what is differentiated.
        block: (block_k, block_n) on W [K, N].
        contributions: whether A itself is wanted too, which takes samples × blocks of memory.
    """
    energies = TokenEnergies()
    layers = network.current_layers()
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:  # not /tmp, which may be memory
        blocks = _gathered(network, layers, objective, block, Path(folder), observe=energies.add)
        scores = {name: mean_magnitude(one.contributions) for name, one in blocks.items()}
        kept = {
            name: replace(one, contributions=np.array(one.contributions))  # the files go
            for name, one in blocks.items()
            if contributions
        }
    return NetworkGradients(kept, scores, energies.weights())


def removal_damages(network: Network, objective: Objective, masks: Mapping[str, NDArray[np.bool_]]) -> dict[str, float]:
    """Return the mean over samples of |Σ g ∘ W| over what each mask removes, by layer name, layer by layer.

    Args:
        network: the pruned network is differentiated, with its present weights.
        objective: what is differentiated.
        masks: bool [K, N] by layer name, True survives.
    """
    layers = [layer for layer in network.current_layers() if layer.name in masks]
    whole = (max(layer.K for layer in layers), max(layer.N for layer in layers))
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:  # not /tmp, which may be memory
        removed = {layer.name: layer.weight() * ~masks[layer.name] for layer in layers}
        blocks = _gathered(network, layers, objective, whole, Path(folder), weights=removed)
        return {name: float(mean_magnitude(one.contributions).sum()) for name, one in blocks.items()}


def token_weights(network: Network, objective: Objective) -> dict[str, NDArray[np.float64]]:
    """Return the token weights alone, [tokens] by layer name: a pass without any weight's gradient."""
    energies = TokenEnergies()
    module, dataset, batch = network.pruned, network.dataset, network.batch_size

    def watch(layer: LinearLayer, size: int, count: int) -> LayerHook:
        def hook(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if not y.requires_grad:
                y = y.detach().requires_grad_()

            def keep(gradient: torch.Tensor) -> None:
                layout = network.layouts.get(layer.name, "samples first")
                energies.add(layer, sample_rows(layer, x.detach(), gradient, size, layout)[1][:count])

            y.register_hook(keep)  # type: ignore[no-untyped-call]
            return y

        return hook

    started = time.perf_counter()
    try:
        with console.progress("token weights", len(dataset)) as advance:
            for start in range(0, len(dataset), batch):
                indices = np.arange(start, min(start + batch, len(dataset)))
                size = batch if network.fixed_batch else len(indices)
                module.hooks_by_node = {layer.name: watch(layer, size, len(indices)) for layer in network.layers}
                outputs = module(tensor_feeds(dataset, indices, network.device, fill_to=size))
                objective(real_samples(outputs, len(indices), size), indices).backward()  # type: ignore[no-untyped-call]
                advance(len(indices))
    finally:
        module.hooks_by_node = {}
    network.pass_seconds = time.perf_counter() - started
    return energies.weights()


def mean_magnitude(contributions: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the mean over samples of |A[n, b]|, [blocks]: the first-order change when block b goes, its sign ignored.

    The mean of squares (Fisher) listens to the few samples of which the network is unsure; this one to all of them.
    """
    total = np.zeros(contributions.shape[1])
    for start in range(0, len(contributions), 64):
        total += np.abs(contributions[start : start + 64]).sum(axis=0, dtype=np.float64)
    return total / len(contributions)


def _gathered(
    network: Network,
    layers: Sequence[LinearLayer],
    objective: Objective,
    block: tuple[int, int],
    folder: Path,
    *,
    observe: Observer | None = None,
    weights: Mapping[str, NDArray[np.float32]] | None = None,
) -> dict[str, BlockGradients]:
    """Run all samples through the pruned network; what was gathered is read from `folder`, while that is there."""
    files = collect_block_gradients(
        network.pruned,
        layers,
        network.dataset,
        objective,
        block=block,
        batch_size=network.batch_size,
        folder=folder,
        fixed_batch=network.fixed_batch,
        layouts=network.layouts,
        device=network.device,
        observe=observe,
        weights=weights,
    )
    return block_gradients(files, layers, block)


class TokenEnergies:
    """Sums each layer's squared output gradients by token, every sample counting alike."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._samples: dict[str, int] = {}

    def add(self, layer: LinearLayer, gradients: torch.Tensor) -> None:
        """Take the gradients of a batch, [samples, tokens, N]."""
        energy = gradients.double().square().sum(dim=2)
        relative = (energy / energy.mean(dim=1, keepdim=True).clamp_min(1e-300)).sum(dim=0).cpu()
        self._sums[layer.name] = self._sums[layer.name] + relative if layer.name in self._sums else relative
        self._samples[layer.name] = self._samples.get(layer.name, 0) + len(gradients)

    def are_of_all(self, samples: int) -> bool:
        """Whether every layer was shown the gradients of that many samples."""
        return bool(self._samples) and all(count == samples for count in self._samples.values())

    def weights(self) -> dict[str, NDArray[np.float64]]:
        """Return the means, [tokens] by layer name."""
        return {name: (total / self._samples[name]).numpy() for name, total in self._sums.items()}
