"""Normalizations and softmax."""

from __future__ import annotations

import torch
from torch.nn import functional

from lsp_deploy.autodiff.operators.registry import Attributes, operator


@operator("LayerNormalization")
def layer_normalization(
    attributes: Attributes, opset: int, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Normalize over the axes from `axis` on, then scale and shift."""
    axis = attributes.get("axis", -1) % x.dim()
    shape = list(x.shape[axis:])
    epsilon = attributes.get("epsilon", 1e-5)
    if list(scale.shape) == shape and (bias is None or bias.shape == scale.shape):
        return functional.layer_norm(x, shape, scale, bias, epsilon)
    normalized = functional.layer_norm(x, shape, eps=epsilon) * scale
    return normalized if bias is None else normalized + bias


@operator("RMSNormalization")
def rms_normalization(attributes: Attributes, opset: int, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Divide by the root mean square over the axes from `axis` on, then scale."""
    axis = attributes.get("axis", -1) % x.dim()
    axes = list(range(axis, x.dim()))
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + attributes.get("epsilon", 1e-5)) * scale


@operator("BatchNormalization")
def batch_normalization(
    attributes: Attributes,
    opset: int,
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
) -> torch.Tensor:
    """Normalize each channel by its stored mean and variance, which are statistics: no gradient flows to them."""
    return functional.batch_norm(x, mean.detach(), variance.detach(), scale, bias, eps=attributes.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def instance_normalization(
    attributes: Attributes, opset: int, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Normalize each channel of each sample."""
    return functional.instance_norm(x, weight=scale, bias=bias, eps=attributes.get("epsilon", 1e-5))


@operator("GroupNormalization")
def group_normalization(
    attributes: Attributes, opset: int, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Normalize groups of channels; up to opset 20 scale and bias are one per group."""
    groups = attributes["num_groups"]
    if opset < 21:
        scale, bias = (value.repeat_interleave(x.shape[1] // groups) for value in (scale, bias))
    return functional.group_norm(x, groups, scale, bias, eps=attributes.get("epsilon", 1e-5))


@operator("LpNormalization")
def lp_normalization(attributes: Attributes, opset: int, x: torch.Tensor) -> torch.Tensor:
    """Divide by the p-norm along an axis."""
    norm = torch.linalg.vector_norm(x, attributes.get("p", 2), dim=attributes.get("axis", -1), keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@operator("Softmax")
def softmax(attributes: Attributes, opset: int, x: torch.Tensor) -> torch.Tensor:
    """Softmax along an axis."""
    return torch.softmax(x, attributes.get("axis", -1))


@operator("LogSoftmax")
def log_softmax(attributes: Attributes, opset: int, x: torch.Tensor) -> torch.Tensor:
    """The logarithm of softmax along an axis."""
    return torch.log_softmax(x, attributes.get("axis", -1))
