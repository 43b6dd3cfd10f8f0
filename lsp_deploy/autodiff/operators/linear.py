"""Matrix products, convolutions and attention."""

from __future__ import annotations

import torch
from torch.nn import functional

from lsp_deploy.autodiff.operators.registry import Attributes, operator


@operator("MatMul")
def matmul(attributes: Attributes, opset: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """X @ y, batched and broadcast as numpy does."""
    return torch.matmul(x, y)


@operator("Gemm")
def gemm(
    attributes: Attributes, opset: int, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None
) -> torch.Tensor:
    """Alpha * A' @ B' + beta * C."""
    a = a.T if attributes.get("transA", 0) else a
    b = b.T if attributes.get("transB", 0) else b
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    product = a @ b if alpha == 1 else alpha * (a @ b)
    if c is None:
        return product
    return product + (c if beta == 1 else beta * c)


@operator("Einsum")
def einsum(attributes: Attributes, opset: int, *inputs: torch.Tensor) -> torch.Tensor:
    """The sum of products that the equation names."""
    return torch.einsum(attributes["equation"], *inputs)


@operator("Conv")
def conv(
    attributes: Attributes, opset: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Convolution in one or two dimensions, with any padding."""
    spatial = weight.dim() - 2
    strides = attributes.get("strides") or [1] * spatial
    dilations = attributes.get("dilations") or [1] * spatial
    x = functional.pad(x, _pads(attributes, x, weight.shape[2:], strides, dilations))
    convolve = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[spatial]
    result: torch.Tensor = convolve(
        x, weight, bias, stride=strides, dilation=dilations, groups=attributes.get("group", 1)
    )
    return result


def _pads(
    attributes: Attributes, x: torch.Tensor, kernel: torch.Size, strides: list[int], dilations: list[int]
) -> list[int]:
    """Return the padding as torch wants it: last dimension first, begin and end of each."""
    spatial = len(kernel)
    automatic = attributes.get("auto_pad", "NOTSET")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        pairs = []
        for size, width, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
            total = max(0, (-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size)
            small, large = total // 2, total - total // 2
            pairs.append((small, large) if automatic == "SAME_UPPER" else (large, small))
    else:
        pads = attributes.get("pads") or [0] * (2 * spatial)
        pairs = list(zip(pads[:spatial], pads[spatial:], strict=True))
    return [amount for pair in reversed(pairs) for amount in pair]
