"""The float inputs of int8 operators, quantized by nodes of their own: TensorRT's plugin reads int8."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lsp_deploy.errors import UserError
from lsp_deploy.passes.insertion import insert_after
from lsp_deploy.passes.layer_weights import add_initializer
from lsp_deploy.plugins.block_sparse.operator import OP_TYPE, BlockSparseLinear, from_node
from lsp_deploy.plugins.operators import operator_nodes

__all__ = ["QuantizeOperatorInputsPass"]


class QuantizeOperatorInputsPass(ir.passes.InPlacePass):
    """An int8 lsp::BlockSparseLinear that reads a float x reads QuantizeLinear(x - x_offset) instead.

    Operators that quantize one tensor alike read one QuantizeLinear. It divides where the operator multiplies by the
    rounded reciprocal, so that one value in many thousands lands on the neighbouring step. Runs when x has its final
    element type.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the nodes.

        Raises:
            UserError: an operator that is not valid, or whose scale or offset the type of its x does not hold exactly.
        """
        quantized: dict[tuple[ir.Value, float, float], ir.Value] = {}
        for node in operator_nodes(model):
            if node.op_type != OP_TYPE:
                continue
            operator, x = from_node(node), node.inputs[0]
            if operator.x_scale == 0 or x is None or x.dtype == ir.DataType.INT8:
                continue
            key = x, operator.x_scale, operator.x_offset
            if key not in quantized:
                quantized[key] = _quantize(node, operator, x)
            node.replace_input_with(0, quantized[key])
        return ir.passes.PassResult(model, modified=bool(quantized))


def _quantize(node: ir.Node, operator: BlockSparseLinear, x: ir.Value) -> ir.Value:
    """Insert the nodes behind `x`; return its int8."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    nodes, centered = [], x
    if operator.x_offset != 0:
        offset = _constant(graph, node, "x_offset", operator.x_offset, x)
        nodes.append(ir.Node("", "Sub", [x, offset], name=f"{node.name}/x/Sub"))
        centered = _describe(nodes[-1], f"{node.name}/x_centered", x, x.dtype)
    scale = _constant(graph, node, "x_scale", operator.x_scale, x)
    zero = add_initializer(graph, f"{node.name}/x_zero_point", np.array(0, np.int8))
    nodes.append(ir.Node("", "QuantizeLinear", [centered, scale, zero], name=f"{node.name}/x/QuantizeLinear"))
    result = _describe(nodes[-1], f"{node.name}/x_int8", x, ir.DataType.INT8)
    insert_after(graph, x, nodes)
    return result


def _constant(graph: ir.Graph, node: ir.Node, what: str, number: float, x: ir.Value) -> ir.Value:
    dtype = x.dtype or ir.DataType.FLOAT
    held = np.array(number, dtype.numpy())
    if float(held) != number:
        raise UserError(
            f"{node.name} has an {what} of {number:g}, which its {dtype.name} input holds as {float(held):g}; "
            "give the plan that value"
        )
    return add_initializer(graph, f"{node.name}/{what}", held)


def _describe(node: ir.Node, name: str, x: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    value = node.outputs[0]
    value.name, value.shape = name, x.shape
    value.type = None if dtype is None else ir.TensorType(dtype)
    return value
