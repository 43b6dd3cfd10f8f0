"""What a choice of bases needs to know of the activations, from one pass forward and backward over the samples."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lsp_deploy import console
from lsp_deploy.sensitivity.feeds import real_samples, tensor_feeds
from lsp_deploy.sensitivity.layer_rows import sample_rows

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.search.network import Network
    from lsp_deploy.sensitivity.block_gradients import Objective

__all__ = ["ActivationProfile", "profile_activations"]


@dataclass
class ActivationProfile:
    """Sums over all samples and tokens."""

    inputs: dict[str, torch.Tensor]
    """By layer name: the second moment of the layer's input, a column of ones appended, [K + 1, K + 1] float64."""
    channels: dict[str, torch.Tensor]
    """By layer name: the mean over samples of |Σ_t x_ti ∂f/∂x_ti|, [K] float64: what losing input channel i changes."""
    normalized: dict[str, torch.Tensor]
    """By LayerNormalization node: the second moment of what it normalizes, before γ and β, [channels, channels]."""


def profile_activations(
    network: Network,
    objective: Objective,
    *,
    inputs: Collection[LinearLayer],
    channels: Collection[LinearLayer],
    norms: Collection[ir.Node],
) -> ActivationProfile:
    """Run all samples through the dense network, forward and backward.

    Args:
        network: the network; its hooks are replaced.
        objective: what is differentiated.
        inputs: layers whose input moments are wanted.
        channels: layers whose input channels are to be scored.
        norms: LayerNormalization nodes.
    """
    profile = ActivationProfile({}, {}, {})
    module, dataset = network.dense, network.dataset
    weights = {layer.name: network.dense_theta(layer.name)[: layer.K].float() for layer in channels}
    wanted, scored = {layer.name for layer in inputs}, {layer.name for layer in channels}
    layers = {layer.name: layer for layer in (*inputs, *channels)}
    batch = network.batch_size

    def watch_layer(layer: LinearLayer, size: int, count: int) -> None:
        def hook(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            rows, _ = sample_rows(layer, x.detach(), y.detach(), size, network.layouts.get(layer.name, "samples first"))
            rows = rows[:count]
            if layer.name in wanted:
                _add(
                    profile.inputs, layer.name, _moment(torch.nn.functional.pad(rows.flatten(0, 1), (0, 1), value=1.0))
                )
            if layer.name not in scored:
                return y
            if not y.requires_grad:
                y = y.detach().requires_grad_()

            def score(gradient: torch.Tensor) -> None:
                layout = network.layouts.get(layer.name, "samples first")
                back = sample_rows(layer, x.detach(), gradient, size, layout)[1][:count] @ weights[layer.name].T
                _add(profile.channels, layer.name, (rows * back).sum(dim=1).abs().sum(dim=0).double() / len(dataset))

            y.register_hook(score)  # type: ignore[no-untyped-call]
            return y

        module.hooks_by_node[layer.name] = hook

    def watch_norm(node: ir.Node) -> None:
        def hook(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            plain = torch.nn.functional.layer_norm(
                x.detach(), x.shape[-1:], eps=node.attributes.get_float("epsilon", 1e-5)
            )
            _add(profile.normalized, str(node.name), _moment(plain.flatten(0, -2)))
            return y

        module.hooks_by_node[str(node.name)] = hook

    started = time.perf_counter()
    try:
        with console.progress("looking for better bases", len(dataset)) as advance:
            for start in range(0, len(dataset), batch):
                indices = np.arange(start, min(start + batch, len(dataset)))
                size = batch if network.fixed_batch else len(indices)
                for layer in layers.values():
                    watch_layer(layer, size, len(indices))
                for node in norms:
                    watch_norm(node)
                outputs = module(tensor_feeds(dataset, indices, network.device, fill_to=size))
                if scored:
                    objective(real_samples(outputs, len(indices), size), indices).backward()  # type: ignore[no-untyped-call]
                advance(len(indices))
    finally:
        module.hooks_by_node = {}
    network.pass_seconds = time.perf_counter() - started
    return profile


def _moment(rows: torch.Tensor) -> torch.Tensor:
    return (rows.T @ rows).double()


def _add(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
