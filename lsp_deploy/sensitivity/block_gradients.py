"""One pass over the calibration set: what every block of every layer contributes to the objective, sample by sample.

For sample n and block b of a layer, A[n, b] = Σ_{ij ∈ b} g_n,ij · W_ij with g_n the gradient of the objective of that
sample alone. Scores, gradients and curvature of the whole block-pruning problem follow from A.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lsp_deploy import console

if TYPE_CHECKING:
    from lsp_deploy.autodiff.module import OnnxModule
    from lsp_deploy.data import Dataset
    from lsp_deploy.linear_layers import LinearLayer

__all__ = ["BlockGradients", "Objective", "collect_block_gradients"]

Objective = Callable[[Mapping[str, torch.Tensor], NDArray[np.int64]], torch.Tensor]
"""Given a batch's outputs and its sample indices: the sum over the batch of one scalar a sample."""


@dataclass
class BlockGradients:
    """What one layer's blocks contribute; blocks are numbered row-major over [ceil(K/block_k), ceil(N/block_n)]."""

    contributions: NDArray[np.float32]
    """A [N, blocks]; mapped from disk."""
    taylor: NDArray[np.float64]
    """[blocks]: mean over samples and entries of |W ∘ ∇_W f| (LSP section 3.1)."""
    square_norms: NDArray[np.float64]
    """[blocks]: ‖W_b‖²."""

    @property
    def fisher(self) -> NDArray[np.float64]:
        """[blocks]: mean over samples of A[n, b]², the second-order damage of removing one block."""
        return np.asarray(np.square(self.contributions, dtype=np.float64).mean(axis=0))


def collect_block_gradients(
    module: OnnxModule,
    layers: Sequence[LinearLayer],
    dataset: Dataset,
    objective: Objective,
    *,
    block: tuple[int, int],
    batch_size: int,
    scratch: Path,
    device: str = "cpu",
) -> dict[str, BlockGradients]:
    """Run every sample forward and backward once and gather A and the Taylor scores of all layers.

    Memory holds one batch's per-sample weight gradients of one layer at a time; A goes to files in `scratch`.

    Args:
        module: the model in torch.
        layers: the linear layers to look at.
        dataset: calibration data; every sample is used.
        objective: what is differentiated.
        block: (block_k, block_n) on W [K, N]; ragged edges form smaller blocks.
        batch_size: samples a pass.
        scratch: folder for the memory maps.
        device: torch device.

    Returns:
        By layer name.
    """
    collectors = {layer.name: _Collector(layer, block, len(dataset), scratch, device) for layer in layers}
    module.requires_grad_(False)
    module.to(device)
    done = 0
    with console.progress("gradients", len(dataset)) as advance:
        for feeds in dataset.batches(batch_size):
            size = min(batch_size, len(dataset) - done)
            for name, collector in collectors.items():
                module.hooks_by_node[name] = collector.hook(done, size)
            outputs = module({name: torch.from_numpy(value).to(device) for name, value in feeds.items()})
            objective(outputs, np.arange(done, done + size)).backward()  # type: ignore[no-untyped-call]
            done += size
            advance(size)
    module.hooks_by_node.clear()
    return {name: collector.result() for name, collector in collectors.items()}


class _Collector:
    """Gathers one layer's contributions from its input and the gradient at its output."""

    def __init__(self, layer: LinearLayer, block: tuple[int, int], samples: int, scratch: Path, device: str) -> None:
        self.layer = layer
        self.block = block
        self.weight = torch.from_numpy(layer.weight()).to(device)
        K, N = self.weight.shape
        self.shape = (-(-K // block[0]), -(-N // block[1]))
        blocks = self.shape[0] * self.shape[1]
        file = scratch / f"{layer.name.strip('/').replace('/', '.')}.contributions"
        self.contributions: NDArray[np.float32] = np.memmap(file, np.float32, "w+", shape=(samples, blocks))
        self.taylor = torch.zeros(blocks, dtype=torch.float64, device=device)

    def hook(self, start: int, size: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Return the hook for a batch whose first sample is `start`."""

        def watch(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if not y.requires_grad:
                y = y.detach().requires_grad_()  # everything before the first layer needs no gradient
            rows = x.detach()
            y.register_hook(lambda gradient: self._add(start, size, rows, gradient))  # type: ignore[no-untyped-call]
            return y

        return watch

    def result(self) -> BlockGradients:
        """Return what was gathered."""
        entries = self._block_sums(torch.ones_like(self.weight)[None])[0].double()
        samples = len(self.contributions)
        return BlockGradients(
            contributions=self.contributions,
            taylor=(self.taylor / samples / entries).cpu().numpy(),
            square_norms=self._block_sums(self.weight.double().square()[None])[0].cpu().numpy(),
        )

    def _add(self, start: int, size: int, x: torch.Tensor, gradient: torch.Tensor) -> None:
        rows, gradients = self._rows(x, gradient, size)
        product = torch.bmm(rows.transpose(1, 2), gradients).mul_(self.weight)  # [samples, K, N]: W ∘ g_n
        sums = self._block_sums(product)
        self.contributions[start : start + size] = sums.cpu().numpy()
        self.taylor += self._block_sums(product.abs_()).double().sum(dim=0)

    def _rows(self, x: torch.Tensor, gradient: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input and output gradient as [samples, tokens, K] and [samples, tokens, N]."""
        if self.layer.node.op_type == "Conv":
            kernel = tuple(self.layer.node.attributes.get_ints("kernel_shape"))
            x = torch.nn.functional.unfold(x, kernel, stride=kernel).transpose(1, 2)
            gradient = gradient.flatten(2).transpose(1, 2)
        elif self.layer.node.op_type == "Gemm" and self.layer.node.attributes.get_int("transA", False):
            x = x.T
        K, N = self.weight.shape
        return x.reshape(size, -1, K).float(), gradient.reshape(size, -1, N).float()

    def _block_sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sum [samples, K, N] over blocks: [samples, blocks]; ragged edges are padded with zeros."""
        samples, K, N = values.shape
        block_k, block_n = self.block
        pad_k, pad_n = self.shape[0] * block_k - K, self.shape[1] * block_n - N
        if pad_k or pad_n:
            values = torch.nn.functional.pad(values, (0, pad_n, 0, pad_k))
        tiles = values.reshape(samples, self.shape[0], block_k, self.shape[1], block_n)
        return tiles.sum(dim=(2, 4)).reshape(samples, -1)
