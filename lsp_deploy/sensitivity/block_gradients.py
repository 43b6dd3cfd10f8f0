"""One pass over the calibration set: what every block of every layer contributes to the objective, sample by sample.

For sample n and block b of a layer, A[n, b] = Σ_{ij ∈ b} g_n,ij · W_ij with g_n the gradient of the objective of that
sample alone. Scores, gradients and curvature of the whole block-pruning problem follow from A.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lsp_deploy import console
from lsp_deploy.errors import UserError
from lsp_deploy.sensitivity.feeds import real_samples, tensor_feeds
from lsp_deploy.sensitivity.gradient_files import GradientFiles
from lsp_deploy.sensitivity.layer_rows import Layout, sample_rows
from lsp_deploy.sensitivity.results import BlockGradients

if TYPE_CHECKING:
    from lsp_deploy.autodiff.module import OnnxModule
    from lsp_deploy.data import Dataset
    from lsp_deploy.linear_layers import LinearLayer

__all__ = ["Objective", "Observer", "block_count", "block_gradients", "collect_block_gradients", "weight_groups"]

Objective = Callable[[Mapping[str, torch.Tensor], NDArray[np.int64]], torch.Tensor]
"""Given a batch's outputs and its sample indices: the sum over the batch of one scalar a sample."""

Observer = Callable[["LinearLayer", torch.Tensor], None]
"""Called with a layer and the gradients at its output [samples, tokens, N] of a batch."""

# Bytes of W ∘ g at a time. On a CPU what stays in the cache is read again for nothing; a GPU wants large pieces.
_CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
_SAVE_SECONDS = 20.0


def block_count(layer: LinearLayer, block: tuple[int, int]) -> int:
    """Return how many blocks cover a layer's W [K, N], ragged edges included."""
    return -(-layer.K // block[0]) * -(-layer.N // block[1])


def weight_groups(layers: Sequence[LinearLayer]) -> list[list[LinearLayer]]:
    """Return the layers, those that share one weight together: their gradients add up, as that weight's do.

    Layers that read one tensor as different matrices (one of them transposed, say) are apart.
    """
    groups: dict[tuple[object, ...], list[LinearLayer]] = {}
    for layer in layers:
        node = layer.node
        reading = (node.op_type, node.attributes.get_int("transB", 0), node.attributes.get_float("alpha", 1.0))
        groups.setdefault((str(layer.weight_value.name), layer.K, layer.N, *reading), []).append(layer)
    return list(groups.values())


def collect_block_gradients(
    module: OnnxModule,
    layers: Sequence[LinearLayer],
    dataset: Dataset,
    objective: Objective,
    *,
    block: tuple[int, int],
    batch_size: int,
    folder: Path,
    samples: range | None = None,
    fixed_batch: bool = False,
    layouts: Mapping[str, Layout] | None = None,
    device: str = "cpu",
    show_progress: bool = True,
    observe: Observer | None = None,
    weights: Mapping[str, NDArray[np.float32]] | None = None,
) -> GradientFiles:
    """Run every sample forward and backward once and gather A and the Taylor scores of all layers.

    Memory holds one batch's activations and a few MB of one layer's per-sample weight gradients; A goes to `folder`.
    A pass that was interrupted goes on where its folder was last saved.

    Args:
        module: the model in torch; its parameters no longer require gradients afterwards.
        layers: the linear layers to look at.
        dataset: calibration data.
        objective: what is differentiated.
        block: (block_k, block_n) on W [K, N]; ragged edges form smaller blocks.
        batch_size: samples a pass.
        folder: for the results of this pass alone.
        samples: which of the dataset; every one if None.
        fixed_batch: whether the model takes `batch_size` samples and no fewer; a smaller batch is filled up.
        layouts: how the rows of a layer hold the samples; one after the other where it is not said.
        device: torch device.
        show_progress: whether the user is shown how far it is.
        weights: what takes W's place in A, [K, N] by layer name, where that is not the layer's weight: the part of it
            that a mask removes, say. The module runs with its own.
        observe: also shown the gradients at every layer's output; not called for what the folder already holds.

    Returns:
        The files, complete; one tensor for each of `weight_groups(layers)`.

    Raises:
        UserError: no layer influences the objective, a gradient is not finite, or the folder cannot be written to.
    """
    samples = range(len(dataset)) if samples is None else samples
    groups = weight_groups(layers)
    files = GradientFiles(folder, len(samples), [block_count(group[0], block) for group in groups])
    if files.complete:
        return files
    collectors = [
        _Collector(group, block, files, index, layouts or {}, device, observe, (weights or {}).get(group[0].name))
        for index, group in enumerate(groups)
    ]
    module.requires_grad_(False)
    module.to(device)
    saved = time.monotonic()
    try:
        with console.progress("gradients", len(samples)) if show_progress else nullcontext(_ignore) as advance:
            advance(files.done)
            for start in range(files.done, len(samples), batch_size):
                indices = np.asarray(samples[start : start + batch_size], np.int64)
                for collector in collectors:
                    collector.begin(module, len(indices), batch_size if fixed_batch else len(indices))
                feeds = tensor_feeds(dataset, indices, device, fill_to=batch_size if fixed_batch else 0)
                _run(module, feeds, objective, indices)
                for collector in collectors:
                    collector.end()
                advance(len(indices))
                if time.monotonic() - saved > _SAVE_SECONDS:
                    files.save(start + len(indices))
                    saved = time.monotonic()
        files.save(len(samples))
    finally:
        module.hooks_by_node = {}
        files.close()
    return files


def block_gradients(
    files: GradientFiles, layers: Sequence[LinearLayer], block: tuple[int, int]
) -> dict[str, BlockGradients]:
    """Return what a complete pass gathered, by layer name; layers that share a weight share it."""
    result = {}
    for index, group in enumerate(weight_groups(layers)):
        weight = torch.from_numpy(group[0].weight())
        entries = _block_sums(torch.ones_like(weight)[None], block).reshape(-1).numpy()
        gathered = BlockGradients(
            contributions=files.contributions(index),
            taylor=files.taylor[index] / files.samples / entries,
            square_norms=_block_sums(weight.double().square()[None], block).reshape(-1).numpy(),
        )
        result.update({layer.name: gathered for layer in group})
    return {layer.name: result[layer.name] for layer in layers}


def _ignore(count: int) -> None:
    """Show no progress."""


def _run(module: OnnxModule, feeds: dict[str, torch.Tensor], objective: Objective, indices: NDArray[np.int64]) -> None:
    with torch.enable_grad():
        outputs = module(feeds)
        size = len(next(iter(feeds.values())))
        value = objective(real_samples(outputs, len(indices), size), indices)
        if not value.requires_grad:
            raise UserError("no linear layer influences the outputs that the objective looks at; choose another one")
        value.backward()  # type: ignore[no-untyped-call]


class _Collector:
    """Gathers the contributions of one weight from the inputs and output gradients of the layers that use it."""

    def __init__(
        self,
        layers: list[LinearLayer],
        block: tuple[int, int],
        files: GradientFiles,
        index: int,
        layouts: Mapping[str, Layout],
        device: str,
        observe: Observer | None,
        weight: NDArray[np.float32] | None,
    ) -> None:
        self.observe = observe
        self.layers = layers
        self.block = block
        self.files = files
        self.index = index
        self.layouts = layouts
        self.weight = torch.from_numpy(layers[0].weight() if weight is None else weight).to(device)
        self.chunk_bytes = _CHUNK_BYTES.get(torch.device(device).type, _CHUNK_BYTES["cuda"])
        self.uses: list[tuple[torch.Tensor, torch.Tensor]] = []

    def begin(self, module: OnnxModule, count: int, size: int) -> None:
        """Watch a batch of `count` samples that is filled up to `size`."""
        self.count = count
        self.done = False
        self.uses = []
        for layer in self.layers:
            module.hooks_by_node[layer.name] = self._hook(layer, size)

    def end(self) -> None:
        """Add what has not been added: a layer that does not influence the objective gets no gradient."""
        if self.done:
            return
        if self.uses:
            self._add()
            return
        blocks = len(self.files.taylor[self.index])
        self.files.append(self.index, np.zeros((self.count, blocks), np.float32), np.zeros(blocks))

    def _hook(self, layer: LinearLayer, size: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def watch(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if not y.requires_grad:
                y = y.detach().requires_grad_()  # everything before the first layer needs no gradient
            inputs = x.detach()

            def keep(gradient: torch.Tensor) -> None:
                layout = self.layouts.get(layer.name, "samples first")
                rows, gradients = sample_rows(layer, inputs, gradient, size, layout)
                if self.observe is not None:
                    self.observe(layer, gradients[: self.count])
                self.uses.append((rows[: self.count].to(self.weight), gradients[: self.count].to(self.weight)))
                if len(self.uses) == len(self.layers):
                    self._add()

            y.register_hook(keep)  # type: ignore[no-untyped-call]
            return y

        return watch

    @torch.no_grad()
    def _add(self) -> None:
        # Rows of all uses of the weight side by side: one product sums over tokens and uses.
        rows, gradients = (
            torch.cat(parts, 1) if len(parts) > 1 else parts[0] for parts in zip(*self.uses, strict=True)
        )
        K, N = self.weight.shape
        samples = max(1, self.chunk_bytes // (4 * K * N))
        height = max(1, self.chunk_bytes // (4 * N) // self.block[0]) * self.block[0]
        contributions, absolute = [], []
        for start in range(0, self.count, samples):
            x, g = rows[start : start + samples].transpose(1, 2), gradients[start : start + samples]
            parts, absolute_parts = [], []
            for k in range(0, K, height):
                product = torch.bmm(x[:, k : k + height], g).mul_(self.weight[k : k + height])  # W ∘ g_n
                parts.append(_block_sums(product, self.block))
                absolute_parts.append(_block_sums(product.abs_(), self.block).sum(dim=0))
            contributions.append(torch.cat(parts, 1))
            absolute.append(torch.cat(absolute_parts))
        total = torch.stack(absolute).sum(dim=0)
        if not bool(torch.isfinite(total).all()):
            raise UserError(f"the gradient at {self.layers[0].name} is NaN or infinite; check the model and its inputs")
        self.files.append(
            self.index,
            torch.cat(contributions).reshape(self.count, -1).float().cpu().numpy(),
            total.reshape(-1).cpu().numpy(),
        )
        self.uses, self.done = [], True


def _block_sums(values: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Sum [samples, K, N] over blocks: float64 [samples, ceil(K / block_k), ceil(N / block_n)].

    Rows first: whole rows of N are added at once, and what is left to add is block_k times smaller.
    """
    samples, K, N = values.shape
    block_k, block_n = block
    whole = K // block_k * block_k
    sums = values[:, :whole].reshape(samples, K // block_k, block_k, N).sum(dim=2)
    if whole < K:
        sums = torch.cat([sums, values[:, whole:].sum(dim=1, keepdim=True)], dim=1)
    sums = torch.nn.functional.pad(sums.double(), (0, -N % block_n))
    return sums.reshape(samples, sums.shape[1], -(-N // block_n), block_n).sum(dim=3)
