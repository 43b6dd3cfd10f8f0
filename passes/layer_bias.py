"""What a layer's bias takes in."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.graph.layer_surroundings import find_bias
from lsp_deploy.passes.layer_weights import add_initializer

__all__ = ["add_to_bias"]


def add_to_bias(graph: ir.Graph, node: ir.Node, correction: NDArray[Any]) -> ir.Value:
    """Add `correction` [N] to what a MatMul, Gemm or Conv gives: to its bias, or by an Add of its own behind it.

    A bias that other nodes read too stays as it is for them; a graph output keeps its name.

    Returns:
        The value that holds the sum.
    """
    bias, adder = find_bias(node, correction.size)
    if bias is not None and adder is not None and bias.const_value is not None and not bias.is_graph_input():
        array = bias.const_value.numpy()
        beta = node.attributes.get_float("beta", 1.0) if adder is node else 1.0
        summed = array.astype(np.float64) + (correction / beta).reshape(array.shape)
        own = add_initializer(graph, f"{node.name}/folded_bias", summed.astype(array.dtype))
        for index, value in enumerate(adder.inputs):
            if value is bias:
                adder.replace_input_with(index, own)
        return adder.outputs[0]
    y = node.outputs[0]
    assert y.dtype is not None
    own = add_initializer(graph, f"{node.name}/folded_bias", correction.astype(y.dtype.numpy()))
    if node.op_type == "Conv":  # its channels are not the last axis, and it takes a bias itself
        node.resize_inputs(3)
        node.replace_input_with(2, own)
        return y
    add = ir.Node("", "Add", [y, own], name=f"{node.name}/Add")
    result = add.outputs[0]
    result.name, result.shape, result.type = f"{y.name}/with_bias", y.shape, y.type
    graph.insert_after(node, add)
    if y.is_graph_output():
        result.name, y.name = y.name, result.name
    ir.convenience.replace_all_uses_with(y, result, replace_graph_outputs=True)
    add.replace_input_with(0, y)
    return result
