"""Constants of their own for the nodes that read them."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from lsp_deploy.passes.layer_weights import add_initializer

__all__ = ["OwnConstantsPass"]


class OwnConstantsPass(ir.passes.InPlacePass):
    """f(x, c), g(y, c) becomes f(x, c), g(y, c'), c' a copy of c, for floating-point constants c.

    The canonical form stores equal constants once: the biases of two layers, all zeros say, are one tensor there, and
    one could not be changed without the other. The weights of linear layers stay shared: they are so on purpose.
    """

    def __init__(self, shared: Collection[str]) -> None:
        """Take the names of the constants that stay shared."""
        super().__init__()
        self.shared = frozenset(shared)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Copy what is shared."""
        modified = False
        for node in list(model.graph):
            for index, value in enumerate(node.inputs):
                if value is None or value.const_value is None or value.name in self.shared or len(value.uses()) == 1:
                    continue
                if value.const_value.dtype.is_floating_point() and not value.is_graph_output():
                    own = add_initializer(model.graph, f"{node.name}/own_{index}", value.const_value.numpy())
                    node.replace_input_with(index, own)
                    modified = True
        return ir.passes.PassResult(model, modified=modified)
