"""Quantization, differentiable by the straight-through estimator."""

from __future__ import annotations

import torch

from lsp_deploy.autodiff.operators.registry import Attributes, operator


@operator("QuantizeLinear")
def quantize_linear(
    attributes: Attributes, opset: int, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """Round x / scale to the zero point's type; kept as a float tensor, so that gradients pass straight through."""
    kind = torch.uint8 if zero_point is None else zero_point.dtype
    limits = torch.iinfo(kind)
    scale, offset = _shaped(attributes, x, scale, zero_point)
    scaled = x / scale
    rounded = scaled + (torch.round(scaled) - scaled).detach()
    return torch.clamp(rounded + offset, limits.min, limits.max)


@operator("DequantizeLinear")
def dequantize_linear(
    attributes: Attributes, opset: int, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """(x - zero point) * scale."""
    scale, offset = _shaped(attributes, x, scale, zero_point)
    return (x.to(scale.dtype) - offset) * scale


def _shaped(
    attributes: Attributes, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point, both float, shaped to broadcast along the quantization axis."""
    if attributes.get("block_size", 0):
        raise ValueError("blockwise quantization is not supported")
    offset = torch.zeros_like(scale) if zero_point is None else zero_point.to(scale.dtype)
    if scale.numel() == 1:
        return scale.reshape(()), offset.reshape(())
    sizes = [1] * x.dim()
    sizes[attributes.get("axis", 1)] = -1
    return scale.reshape(sizes), offset.reshape(sizes)
