"""A linear layer's input and output inside a torch run, as rows of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lsp_deploy.linear_layers import LinearLayer

__all__ = ["input_rows", "output_rows"]


def input_rows(layer: LinearLayer, x: torch.Tensor, samples: int) -> torch.Tensor:
    """Return a layer's input as [samples, tokens, K]; the patches of a Conv become tokens."""
    if layer.node.op_type == "Conv":
        kernel = tuple(layer.node.attributes.get_ints("kernel_shape"))
        x = torch.nn.functional.unfold(x, kernel, stride=kernel).transpose(1, 2)
    elif layer.node.op_type == "Gemm" and layer.node.attributes.get_int("transA", False):
        x = x.T
    return x.reshape(samples, -1, layer.K)


def output_rows(layer: LinearLayer, y: torch.Tensor, samples: int) -> torch.Tensor:
    """Return a layer's output, or what is shaped like it, as [samples, tokens, N]."""
    if layer.node.op_type == "Conv":
        y = y.flatten(2).transpose(1, 2)
    return y.reshape(samples, -1, layer.N)
