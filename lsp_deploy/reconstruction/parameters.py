"""A linear layer's weight and bias inside the torch module, in the orientation of the mathematics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lsp_deploy.autodiff.module import OnnxModule
    from lsp_deploy.linear_layers import LinearLayer

__all__ = ["LayerParameters", "why_not_writable"]


def why_not_writable(layer: LinearLayer, module: OnnxModule) -> str | None:
    """Return why a layer's parameters cannot be changed on their own, or None."""
    weight = layer.weight_value
    if str(weight.name) not in module.weights:
        return "its weight is computed in the graph"
    if len(weight.uses()) > 1:
        return "it shares its weight with another layer"
    return None


class LayerParameters:
    """Reads and writes one layer's W [K, N] and b [N] in `module`."""

    def __init__(self, layer: LinearLayer, module: OnnxModule) -> None:
        """Take a layer that `why_not_writable` has nothing against."""
        node = layer.node
        self.K, self.N = layer.K, layer.N
        self._weight = module.weights[str(layer.weight_value.name)]
        self._bias = None if layer.bias is None else module.weights.get(str(layer.bias.name))
        gemm = node.op_type == "Gemm"
        self._transposed = node.op_type == "Conv" or (gemm and node.attributes.get_int("transB", 0) == 1)
        self._alpha = node.attributes.get_float("alpha", 1.0) if gemm else 1.0
        self._beta = node.attributes.get_float("beta", 1.0) if gemm and layer.bias_node is node else 1.0

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a constant bias."""
        return self._bias is not None

    def read(self) -> torch.Tensor:
        """Return θ [K, N], or [K + 1, N] with the bias in the last row; float64."""
        stored = self._weight.detach().double()
        matrix = stored.reshape(self.N, self.K).T if self._transposed else stored.reshape(self.K, self.N)
        matrix = matrix * self._alpha
        if self._bias is None:
            return matrix
        return torch.cat([matrix, self._bias.detach().double().reshape(1, self.N) * self._beta])

    def write(self, theta: torch.Tensor) -> None:
        """Put θ, as `read` returns it, into the module, in the module's element type."""
        matrix = theta[: self.K] / self._alpha
        matrix = matrix.T if self._transposed else matrix
        self._weight.data.copy_(matrix.reshape(self._weight.shape))
        if self._bias is not None:
            self._bias.data.copy_((theta[self.K] / self._beta).reshape(self._bias.shape))
