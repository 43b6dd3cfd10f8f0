"""A bias of its own for every linear layer."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from lsp_deploy.graph.layer_surroundings import find_bias
from lsp_deploy.passes.layer_weights import add_initializer

__all__ = ["OwnBiasesPass"]


class OwnBiasesPass(ir.passes.InPlacePass):
    """x @ W + b becomes x @ W + b', b' a copy of b, where other nodes read b too.

    The canonical form stores equal constants once: the biases of two layers, all zeros say, are one tensor there.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """Take N by the name of each layer's node."""
        super().__init__()
        self.sizes = sizes

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Copy the shared biases."""
        modified = False
        for node in list(model.graph):
            if str(node.name) not in self.sizes:
                continue
            bias, adder = find_bias(node, self.sizes[str(node.name)])
            if bias is None or adder is None or bias.const_value is None or len(bias.uses()) == 1:
                continue
            own = add_initializer(model.graph, f"{node.name}/own_bias", bias.const_value.numpy())
            adder.replace_input_with(next(i for i, value in enumerate(adder.inputs) if value is bias), own)
            modified = True
        return ir.passes.PassResult(model, modified=modified)
