"""The node of a planned layer, read as y = x @ W + b, for passes that put something else in its place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.errors import UserError
from lsp_deploy.graph.constants import evaluate
from lsp_deploy.graph.layer_surroundings import find_bias
from lsp_deploy.passes.layer_weights import add_initializer, weight_value

__all__ = ["LinearNode", "read_linear_node", "replace_nodes"]


@dataclass(frozen=True)
class LinearNode:
    """What a MatMul or Gemm computes, together with the Add of its bias."""

    x: ir.Value
    """[..., K], of the rank of y."""
    weight: NDArray[np.float32]
    """W [K, N], alpha included."""
    bias: NDArray[np.float32]
    """b [N], beta included; zeros where there is none."""
    y: ir.Value
    """[..., N]"""
    nodes: tuple[ir.Node, ...]
    """That compute y from x."""


def read_linear_node(graph: ir.Graph, node: ir.Node) -> LinearNode:
    """Return the layer that a MatMul or Gemm belongs to; its weight is constant (`layer_nodes` sees to it).

    Where the layer is no plain x @ W + b, nodes are put around it first: a Transpose before a Gemm that transposes x,
    an Unsqueeze before a MatMul whose weight has more dimensions than x, an Add behind a Gemm that adds no bias.

    Raises:
        UserError: the layer is a Conv.
    """
    if node.op_type == "Conv":
        raise UserError(
            f"the plan has layer {node.name} run by a matrix kernel, but it is a convolution; leave it to the engine"
        )
    weight = weight_value(node)
    assert weight.const_value is not None
    array = weight.const_value.numpy().astype(np.float32)
    matrix = array.reshape(*array.shape[-2:])
    if node.op_type == "Gemm":
        matrix = (matrix.T if node.attributes.get_int("transB", 0) == 1 else matrix) * np.float32(
            node.attributes.get_float("alpha", 1.0)
        )
    n = matrix.shape[1]
    x = _plain_x(graph, node, array.ndim)
    bias, adder = find_bias(node, n)
    if bias is None and len(node.inputs) > 2 and node.inputs[2] is not None:
        _add_behind(graph, node)
    y = node.outputs[0]
    if bias is None or adder is None or (adder is not node and _adds_dimensions(bias, y)):
        return LinearNode(x, matrix, np.zeros(n, np.float32), y, (node,))
    beta = node.attributes.get_float("beta", 1.0) if adder is node else 1.0
    vector = evaluate(bias).astype(np.float32).reshape(n) * np.float32(beta)
    return LinearNode(x, matrix, vector, adder.outputs[0], (node,) if adder is node else (node, adder))


def replace_nodes(
    graph: ir.Graph, old: Iterable[ir.Node], y: ir.Value, new: Sequence[ir.Node], result: ir.Value
) -> None:
    """Put the nodes `new`, which compute `result`, in place of the nodes `old`, the last of which gives `y`.

    `result` takes over name, type and shape of `y`. Constants that nothing reads any more are removed.
    """
    old = tuple(old)
    last = y.producer()
    assert last is not None
    result.name, result.type, result.shape = y.name, y.type, y.shape
    graph.insert_before(last, new)
    ir.convenience.replace_all_uses_with(y, result, replace_graph_outputs=True)
    constants = {value for node in old for value in node.inputs if value is not None and value.is_initializer()}
    graph.remove(old, safe=True)
    for value in constants:
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[str(value.name)]


def _plain_x(graph: ir.Graph, node: ir.Node, weight_rank: int) -> ir.Value:
    """Return x as y sees it, [..., K] and of the same rank."""
    x = node.inputs[0]
    assert x is not None
    if node.op_type == "Gemm" and node.attributes.get_int("transA", 0) == 1:
        turn = ir.Node("", "Transpose", [x], [ir.AttrInt64s("perm", [1, 0])], name=f"{node.name}/x/Transpose")
        return _insert(graph, node, turn, f"{node.name}/x_transposed", None if x.shape is None else [*x.shape][::-1])
    missing = 0 if x.shape is None else weight_rank - max(len(x.shape), 2)
    if missing <= 0 or x.shape is None:
        return x
    axes = add_initializer(graph, f"{node.name}/x_axes", np.arange(missing))
    widen = ir.Node("", "Unsqueeze", [x, axes], name=f"{node.name}/x/Unsqueeze")
    return _insert(graph, node, widen, f"{node.name}/x_unsqueezed", [*[1] * missing, *x.shape])


def _insert(
    graph: ir.Graph, node: ir.Node, new: ir.Node, name: str, shape: Sequence[int | ir.SymbolicDim] | None
) -> ir.Value:
    value, x = new.outputs[0], new.inputs[0]
    assert x is not None
    value.name, value.type, value.shape = name, x.type, None if shape is None else ir.Shape(shape)
    graph.insert_before(node, new)
    return value


def _add_behind(graph: ir.Graph, gemm: ir.Node) -> None:
    """Let an Add behind the Gemm add beta · C."""
    c, y = gemm.inputs[2], gemm.outputs[0]
    assert c is not None
    gemm.resize_inputs(2)
    nodes = []
    if (beta := gemm.attributes.get_float("beta", 1.0)) != 1.0:
        factor = add_initializer(graph, f"{gemm.name}/beta", np.array(beta, np.float32))
        scaled = ir.Node("", "Mul", [c, factor], name=f"{gemm.name}/Mul")
        c = scaled.outputs[0]
        c.name, c.type = f"{gemm.name}/scaled", y.type
        nodes.append(scaled)
    add = ir.Node("", "Add", [y, c], name=f"{gemm.name}/Add")
    total = add.outputs[0]
    total.name, total.shape, total.type = f"{y.name}/with_c", y.shape, y.type
    graph.insert_after(gemm, [*nodes, add])
    if y.is_graph_output():
        total.name, y.name = y.name, total.name
    ir.convenience.replace_all_uses_with(y, total, replace_graph_outputs=True)
    add.replace_input_with(0, y)


def _adds_dimensions(bias: ir.Value, y: ir.Value) -> bool:
    return y.shape is None or evaluate(bias).ndim > len(y.shape)
