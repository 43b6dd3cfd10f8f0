"""A layer's input and output gradient, cut into the rows of each sample of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from lsp_deploy.graph.constants import evaluate

if TYPE_CHECKING:
    from lsp_deploy.autodiff.module import LayerHook, OnnxModule
    from lsp_deploy.linear_layers import LinearLayer

__all__ = ["Layout", "find_layouts", "sample_rows", "samples_are_separate"]

Layout = Literal["samples first", "samples inside", "mixed"]
"""How the rows [M, K] of a layer's input hold the samples: one after the other (row = sample · tokens + token), taking
turns (row = token · samples + sample), or in no order that is known."""

_CHANGED = 1e-4  # of the largest |x|: far above rounding, far below what another input changes


def sample_rows(
    layer: LinearLayer, x: torch.Tensor, gradient: torch.Tensor, samples: int, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's input and the gradient at its output as [samples, tokens, K] and [samples, tokens, N].

    Args:
        layer: the layer.
        x: its first input, as the node takes it.
        gradient: of its output, as the node gives it.
        samples: in the batch.
        layout: of the rows.
    """
    rows, gradients = _rows(layer, x), gradient
    if layer.node.op_type == "Conv":
        gradients = gradients.flatten(2).transpose(1, 2)
    gradients = gradients.reshape(-1, layer.N)
    if layout == "samples inside":
        return (
            rows.reshape(-1, samples, layer.K).transpose(0, 1),
            gradients.reshape(-1, samples, layer.N).transpose(0, 1),
        )
    return rows.reshape(samples, -1, layer.K), gradients.reshape(samples, -1, layer.N)


@torch.no_grad()
def find_layouts(
    module: OnnxModule, layers: Sequence[LinearLayer], feeds: Mapping[str, torch.Tensor]
) -> dict[str, Layout]:
    """Return each layer's layout by name, by experiment: which rows change when the first sample does.

    Args:
        module: the model.
        layers: the layers to look at; the module's hooks are replaced.
        feeds: a batch of at least two samples.
    """
    before, after = _inputs(module, layers, feeds), _inputs(module, layers, _other_first_sample(feeds))
    samples = len(next(iter(feeds.values())))
    return {name: _layout(before[name], after[name], samples) for name in before}


@torch.no_grad()
def samples_are_separate(module: OnnxModule, feeds: Mapping[str, torch.Tensor], *, fixed_batch: bool) -> bool:
    """Return, by experiment, whether what the model says of a sample depends on that sample alone.

    It does not where samples of a batch are compared with each other, as CLIP compares images with texts.

    Args:
        module: the model.
        feeds: a batch of at least two samples.
        fixed_batch: whether the model takes no other number of them.
    """
    before, after = module(feeds), module(_other_first_sample(feeds))
    alone = before if fixed_batch else module({name: value[:1] for name, value in feeds.items()})
    samples = len(next(iter(feeds.values())))
    return all(
        value.shape == (samples, *alone[name].shape[1:]) and not _changed(value[1:], after[name][1:]).any()
        for name, value in before.items()
        if value.is_floating_point()
    )


def _layout(before: torch.Tensor, after: torch.Tensor, samples: int) -> Layout:
    changed = _changed(before, after).any(dim=1)
    if len(changed) % samples:
        return "mixed"
    if not changed.reshape(samples, -1)[1:].any():
        return "samples first"
    return "mixed" if changed.reshape(-1, samples)[:, 1:].any() else "samples inside"


def _inputs(
    module: OnnxModule, layers: Sequence[LinearLayer], feeds: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def watch(layer: LinearLayer) -> LayerHook:
        def keep(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            found[layer.name] = _rows(layer, x).reshape(-1, layer.K).cpu()
            return y

        return keep

    module.hooks_by_node = {layer.name: watch(layer) for layer in layers}
    module(feeds)
    module.hooks_by_node = {}
    return found


def _changed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return (before - after).abs() > _CHANGED * before.abs().max()


def _other_first_sample(feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = {}
    for name, value in feeds.items():
        changed = value.clone()
        if value.is_floating_point():
            noise = np.random.default_rng(0).standard_normal(tuple(value.shape[1:]))
            changed[0] += torch.from_numpy(noise).to(value)
        else:
            changed[0] = value[1]
        result[name] = changed
    return result


def _rows(layer: LinearLayer, x: torch.Tensor) -> torch.Tensor:
    """Return the node's input with K as the last dimension."""
    if layer.node.op_type == "Conv":
        return _patches(x, evaluate(layer.weight_value).shape[2:])
    if layer.node.op_type == "Gemm" and layer.node.attributes.get_int("transA", False):
        return x.T
    return x


def _patches(x: torch.Tensor, kernel: Sequence[int]) -> torch.Tensor:
    """Return the patches that a convolution whose stride is its kernel sees: [batch, patches, channels · kernel]."""
    for axis, size in enumerate(kernel):
        x = x.narrow(2 + axis, 0, x.shape[2 + axis] // size * size)
    sizes = [number for axis, size in enumerate(kernel) for number in (x.shape[2 + axis] // size, size)]
    tiles = x.reshape(*x.shape[:2], *sizes)
    places = range(2, tiles.dim(), 2)
    tiles = tiles.permute(0, *places, 1, *(place + 1 for place in places))
    return tiles.reshape(len(x), int(np.prod(sizes[::2])), -1)
