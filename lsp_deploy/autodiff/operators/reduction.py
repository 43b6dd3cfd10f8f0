"""Reductions, pooling and resizing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from lsp_deploy.autodiff.operators.registry import OPERATORS, Attributes, ints, operator

_REDUCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceL2": lambda x, axes, keepdim: torch.linalg.vector_norm(x, 2, axes, keepdim=keepdim),
    "ReduceL1": lambda x, axes, keepdim: torch.linalg.vector_norm(x, 1, axes, keepdim=keepdim),
    "ReduceSumSquare": lambda x, axes, keepdim: torch.sum(x.square(), axes, keepdim=keepdim),
    "ReduceLogSumExp": lambda x, axes, keepdim: torch.logsumexp(x, axes, keepdim=keepdim),
}


def _reduction(reduce: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def function(attributes: Attributes, opset: int, x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
        given = ints(axes) or attributes.get("axes") or []
        if not given and attributes.get("noop_with_empty_axes", 0):
            return x
        return reduce(x, given or list(range(x.dim())), keepdim=bool(attributes.get("keepdims", 1)))

    return function


for _name, _reduce in _REDUCTIONS.items():
    OPERATORS["", _name] = _reduction(_reduce)


@operator("ReduceProd")
def reduce_prod(attributes: Attributes, opset: int, x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
    """The product over axes."""
    keep = bool(attributes.get("keepdims", 1))
    for axis in sorted(axis % x.dim() for axis in ints(axes) or attributes.get("axes") or range(x.dim()))[::-1]:
        x = x.prod(axis, keepdim=keep)
    return x


@operator("CumSum")
def cumulative_sum(attributes: Attributes, opset: int, x: torch.Tensor, axis: torch.Tensor) -> torch.Tensor:
    """Running sums along an axis, forwards and inclusive."""
    if attributes.get("exclusive", 0) or attributes.get("reverse", 0):
        raise ValueError("CumSum is supported forwards and inclusive only")
    return torch.cumsum(x, int(axis))


@operator("ArgMax")
def arg_max(attributes: Attributes, opset: int, x: torch.Tensor) -> torch.Tensor:
    """The index of the largest entry along an axis."""
    return torch.argmax(x, attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))


@operator("TopK")
def top_k(attributes: Attributes, opset: int, x: torch.Tensor, k: torch.Tensor) -> Sequence[torch.Tensor]:
    """The k largest or smallest entries along an axis, and where they are."""
    return torch.topk(x, int(k), attributes.get("axis", -1), largest=bool(attributes.get("largest", 1)))


@operator("GlobalAveragePool")
def global_average_pool(attributes: Attributes, opset: int, x: torch.Tensor) -> torch.Tensor:
    """The mean over all pixels."""
    return x.mean(list(range(2, x.dim())), keepdim=True)


@operator("AveragePool")
def average_pool(attributes: Attributes, opset: int, x: torch.Tensor) -> torch.Tensor:
    """The mean over windows, padded alike on both sides."""
    kernel = attributes["kernel_shape"]
    return functional.avg_pool2d(
        x,
        kernel,
        attributes.get("strides") or [1] * len(kernel),
        _symmetric(attributes, len(kernel)),
        ceil_mode=bool(attributes.get("ceil_mode", 0)),
        count_include_pad=bool(attributes.get("count_include_pad", 0)),
    )


@operator("MaxPool")
def max_pool(attributes: Attributes, opset: int, x: torch.Tensor) -> torch.Tensor:
    """The maximum over windows, padded alike on both sides."""
    kernel = attributes["kernel_shape"]
    return functional.max_pool2d(
        x,
        kernel,
        attributes.get("strides") or [1] * len(kernel),
        _symmetric(attributes, len(kernel)),
        ceil_mode=bool(attributes.get("ceil_mode", 0)),
    )


@operator("Resize")
def resize(
    attributes: Attributes,
    opset: int,
    x: torch.Tensor,
    roi: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    sizes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Resize the last two dimensions as torch's interpolate does."""
    target = ints(sizes)[-2:]
    if not target and scales is not None:
        target = [int(n * s) for n, s in zip(x.shape[-2:], scales.tolist()[-2:], strict=True)]
    mode = attributes.get("mode", "nearest")
    transform = attributes.get("coordinate_transformation_mode", "half_pixel")
    if mode == "nearest":
        if transform != "asymmetric":
            raise ValueError(f"Resize nearest with {transform} coordinates is not supported")
        return functional.interpolate(x, target, mode="nearest")
    if transform not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise ValueError(f"Resize {mode} with {transform} coordinates is not supported")
    return functional.interpolate(
        x,
        target,
        mode={"linear": "bilinear", "cubic": "bicubic"}[mode],
        align_corners=transform == "align_corners",
        antialias=bool(attributes.get("antialias", 0)),
    )


def _symmetric(attributes: Attributes, spatial: int) -> list[int]:
    pads = attributes.get("pads") or [0] * (2 * spatial)
    if pads[:spatial] != pads[spatial:] or attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise ValueError("pooling that pads its two sides differently is not supported")
    return list(pads[:spatial])
